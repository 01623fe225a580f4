"""Modules of several inputs are explained call by call: the named call varies, all else is held fixed."""

import pytest
import torch
from torch import nn

import prunex
from prunex.errors import PrunexError
from prunex.targets import Class
from tests.vits import tiny


def image(seed, batch=1):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Two(nn.Module):
    """Two encoders, compared."""

    def __init__(self):
        super().__init__()
        self.encoder_a, self.encoder_b = tiny("vit", depth=2, num_classes=0), tiny("deit3", depth=2, num_classes=0)

    def forward(self, a, b):
        return {"likeness": torch.cosine_similarity(self.encoder_a(a), self.encoder_b(b))}


class Siamese(nn.Module):
    """One encoder, called three times, and a loss of all three: one number for the batch."""

    def __init__(self):
        super().__init__()
        self.encoder = tiny("vit", depth=2, num_classes=0)

    def forward(self, anchor, positive, negative, margin=50.0):
        a, p, n = self.encoder(anchor), self.encoder(positive), self.encoder(negative)
        return nn.functional.triplet_margin_loss(a, p, n, margin)


class Reference(nn.Module):
    """The same with the other inputs inside: an ordinary module of one input."""

    def __init__(self, siamese, number, inputs):
        super().__init__()
        self.encoder, self.number, self.inputs = siamese.encoder, number, inputs

    def forward(self, x):
        with torch.no_grad():
            others = [self.vit_copy(each) for each in self.inputs]
        parts = list(others)
        out = self.encoder(x)
        parts = [part.expand_as(out) for part in parts]
        parts[self.number] = out
        a, p, n = parts
        return nn.functional.triplet_margin_loss(a, p, n, 50.0, reduction="none")


def reference(siamese, number, inputs):
    import copy

    module = Reference(siamese, number, inputs)
    twin = copy.deepcopy(siamese.encoder)
    object.__setattr__(module, "vit_copy", twin)
    return module.eval()


@pytest.mark.parametrize("method", ["generic_attention", "tokentm", "grad_cam", "atman", "shap", "rollout"])
def test_each_of_two_encoders_has_its_own_map(method):
    torch.manual_seed(0)
    model, options = Two().eval(), {"shap": {"budget": 40}}.get(method, {})
    target = lambda output: output["likeness"]  # noqa: E731
    maps = {}
    for name in ("encoder_a", "encoder_b"):
        e = prunex.explain(method, model, (image(1), image(2)), target, through=name, **options)
        assert e.maps.shape == (1, 4, 4)
        torch.testing.assert_close(e.logits[:, 0], model(image(1), image(2))["likeness"], rtol=1e-4, atol=1e-5)
        maps[name] = e.maps
    assert not torch.equal(maps["encoder_a"], maps["encoder_b"])
    named = prunex.explain(method, model, {"b": image(2), "a": image(1)}, target, through="encoder_a", **options)
    assert torch.equal(named.maps, maps["encoder_a"])


@pytest.mark.parametrize("method", ["generic_attention", "atman", "integrated_gradients"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_call_is_the_module_with_the_others_held_fixed(method, number):
    torch.manual_seed(0)
    model, inputs = Siamese().eval(), (image(1), image(2), image(3))
    options = {"integrated_gradients": {"steps": 4}}.get(method, {})
    target = lambda output: output  # noqa: E731
    e = prunex.explain(method, model, inputs, target, through=f"encoder#{number}", **options)
    want = prunex.explain(method, reference(model, number, inputs), inputs[number], target, **options)
    torch.testing.assert_close(e.maps, want.maps, rtol=1e-4, atol=1e-6)
    assert e.maps.abs().max() > 0


def test_classes_of_a_module_of_two_inputs():
    class Judge(Two):
        def __init__(self):
            super().__init__()
            self.judge = nn.Linear(2 * self.encoder_a.embed_dim, 3)

        def forward(self, a, b):
            return self.judge(torch.cat([self.encoder_a(a), self.encoder_b(b)], 1))

    torch.manual_seed(0)
    model = Judge().eval()
    e = prunex.explain("generic_attention", model, (image(1), image(2)), through="encoder_b")
    assert e.target.tolist() == model(image(1), image(2)).argmax(1).tolist()
    same = prunex.explain("generic_attention", model, (image(1), image(2)), Class(int(e.target)), through="encoder_b")
    assert torch.equal(e.maps, same.maps)


def test_a_pruned_encoder():
    torch.manual_seed(0)
    model = Two().eval()
    pruning = prunex.attach(model.encoder_a, "topk", keep_ratio=0.5, stages=(1,))
    e = prunex.explain("tokentm", model, (image(1), image(2)), lambda o: o["likeness"], through="encoder_a")
    assert e.trace.kept().sum() == 8
    pruning.detach()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("inputs", "through", "message"),
    [
        ((image(1, 2), image(2, 2)), "encoder_a", "one sample"),
        ((image(1), image(2)), "encoder_c", "does not exist"),
        ((image(1), image(2)), "encoder_a#3", "does not exist"),
        ((image(1), image(2)), "encoder_a#first", "not allowed"),
    ],
)
def test_bad_calls(inputs, through, message):
    with pytest.raises(PrunexError, match=message):
        prunex.explain("rollout", Two().eval(), inputs, lambda o: o["likeness"], through=through)


def test_several_calls_must_be_told_apart():
    with pytest.raises(PrunexError, match="3 times: say which"):
        prunex.explain("rollout", Siamese().eval(), (image(1), image(2), image(3)), lambda o: o, through="encoder")
