"""Heads in the hands of people who do not know them: what is odd is right, refused in one line, or warned of once."""

import warnings

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from tests.heads.heads import HEADS, OPTIONS, attach
from tests.vits import images, largest, tiny


def trained(family="vit", batch=3, size=(32, 32), **concepts):
    model = tiny(family)
    torch.manual_seed(0)
    head = attach(model, "concept_transformer", dropout=0.0, **(concepts or {"spatial": ["ink", "paper", "edge"]}))
    model.train()
    model(images(batch, size))
    return model, head


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.float16])
def test_concept_labels_of_any_dtype(dtype):
    marks = torch.arange(6).reshape(3, 2) % 3 > 0
    losses = []
    for kind in (torch.float32, dtype):
        _, head = trained(concepts=["loop", "bar"])
        losses.append(head.losses(concepts=marks.to(kind))["explanation"])
    assert float(losses[0].detach()) > 0
    assert torch.equal(*losses)


def test_one_concept_needs_no_column():
    losses = []
    for shape in ((3, 1), (3,)):
        _, head = trained(concepts=["loop", "bar"], spatial=["ink"])
        with pytest.raises(PrunexError, match=r"global concept labels have shape \[3\]: give \[3, 2\]"):
            head.losses(concepts=torch.ones(3))
        _, head = trained(concepts=["loop"], spatial=["ink"])
        plain = torch.tensor([True, False, True])
        ink = (torch.arange(16) % 2 > 0).expand(3, 16)
        parts = head.losses(concepts=plain.reshape(shape), spatial=ink.reshape(3, 16, *shape[1:]))
        losses.append(parts["explanation"])
    assert torch.equal(*losses)


@pytest.mark.parametrize("given", [[1, 0, 1], 1.0, torch.tensor(1.0), torch.zeros(3, 2, dtype=torch.complex64)])
def test_what_is_no_tensor_of_labels_is_refused(given):
    _, head = trained(concepts=["loop", "bar"])
    with pytest.raises(PrunexError, match="concept"):
        head.losses(concepts=given)


def test_the_grid_of_labels_is_the_patches_own():
    _, head = trained("not_square", size=(40, 24))  # 5 x 3 patches
    with pytest.raises(PrunexError, match=r"shape \[3, 3, 5, 3\]: give \[3, 15, 3\] or \[3, 5, 3, 3\]"):
        head.losses(spatial=torch.ones(3, 3, 5, 3))
    _, head = trained("not_square", size=(40, 24))
    assert "explanation" in head.losses(spatial=torch.ones(3, 5, 3, 3))
    for other in ((8, 2), (4, 4)):  # as many patches as there are
        _, head = trained("dynamic", size=(16, 64))
        with pytest.raises(PrunexError, match=r"give \[3, 16, 3\] or \[3, 2, 8, 3\]"):
            head.losses(spatial=torch.ones(3, *other, 3))
    _, head = trained("dynamic", size=(16, 64))
    assert "explanation" in head.losses(spatial=torch.ones(3, 2, 8, 3))
    # Of tokens that no forward gave nothing tells the grid: as many patches are taken as they come.
    head = attach(tiny("dynamic").train(), "concept_transformer")
    head.from_tokens(torch.randn(3, 17, 48))
    assert "explanation" in head.losses(spatial=torch.ones(3, 8, 2, 3))


def test_labels_go_to_every_forward_of_as_many_images():
    _, alone = trained(batch=4)
    marks = torch.ones(4, 16, 3)
    wanted = alone.losses(spatial=marks)["explanation"]
    model, head = trained(batch=4)
    model(images(2))  # a small view, which nobody has annotated
    assert torch.equal(head.losses(spatial=marks)["explanation"], wanted)


@pytest.mark.parametrize("name", HEADS)
def test_class_labels_that_nobody_reads_fit_any_forward(name):
    model = tiny()
    head = attach(model, name)
    model.train()
    model(images(8))  # two views in one batch, with one label for both
    wanted = head.losses()
    losses = head.losses(torch.zeros(4, dtype=torch.long))
    assert losses.keys() == wanted.keys()
    assert all(losses[k].equal(wanted[k]) for k in wanted)


@pytest.mark.parametrize("name", HEADS)
def test_attached_under_inference_mode_it_can_be_trained(name):
    model = tiny()
    with torch.inference_mode():
        head = attach(model, name)
    assert not any(p.is_inference() for p in model.parameters())
    model.train()
    model(images()).sum().backward()
    assert all(p.grad is not None for p in head.head.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [*HEADS, "evit", "dynamicvit", "xpruner"])
def test_attached_where_new_tensors_are_on_the_meta_device(name):
    model, twin = tiny(), tiny()
    options = OPTIONS.get(name, {})
    torch.manual_seed(0)
    with torch.device("meta"):
        prunex.attach(model, name, **options)
    torch.manual_seed(0)
    prunex.attach(twin, name, **options)
    assert torch.equal(model(images()), twin(images()))


@pytest.mark.parametrize("name", HEADS)
def test_frozen_after_it_was_attached_it_says_so_once(name):
    model = tiny().train()
    head = attach(model, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
    model = tiny().train()
    head = attach(model, name)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())  # nothing trains
    model.blocks[0].requires_grad_(True)
    number = len(list(head.head.parameters()))
    with pytest.warns(UserWarning, match=rf"{number} of {number} parameters of {name} .* frozen while others train"):
        model(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())


@pytest.mark.parametrize("name", HEADS)
def test_adapters_freeze_a_head_that_is_there_and_thawed_it_learns(name):
    peft = pytest.importorskip("peft")
    model = tiny()
    head = attach(model, name)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"])).train()
    with pytest.warns(UserWarning, match=rf"parameters of {name} .* frozen while others train"):
        wrapped(images())
    prunex.attached(wrapped, head=True).head.requires_grad_(True)
    head.forget()
    wrapped(images()).square().sum().backward()
    assert all(p.grad is not None for p in head.head.parameters())


def test_contributions_know_an_adapter_on_the_heads_own_layers():
    peft = pytest.importorskip("peft")
    model = tiny()
    head = attach(model, "concept_transformer", concepts=["loop", "bar"])
    targets = r"prunex_head.*\.(q|kv|proj)"
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    evidence = head.evidence(images())
    assert largest(evidence.contributions.sum(1) + evidence.bias, evidence.logits) < 1e-5


def test_an_intervention_is_no_part_of_a_slim_model(tmp_path):
    model, x = tiny(), images()
    head = attach(model, "concept_transformer")
    plain = model(x)
    with head.intervene({"ink": 0}):
        assert not torch.equal(model(x), plain)
        with pytest.warns(UserWarning, match=r"attention set by hand \(\{'ink': 0.0\}\) is left out"):
            slim = prunex.slim(model)
        with pytest.warns(UserWarning, match="attention set by hand"):
            prunex.save(model, tmp_path / "forced")
        assert torch.equal(slim(x), plain)
        assert largest(prunex.load(tmp_path / "forced")(x), plain) < 1e-6
        assert head.head.forced == {"ink": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(prunex.slim(model)(x), plain)


@pytest.mark.parametrize("name", HEADS)
def test_distilled_training_gives_two_outputs_and_a_head_one(name):
    model = tiny("deit_distilled")
    model.set_distilled_training(True)
    before = list(model.state_dict())
    with pytest.raises(PrunexError, match=f"{name} gives one output, and this DeiT's distilled_training two"):
        attach(model, name)
    assert list(model.state_dict()) == before
    model.set_distilled_training(False)
    attach(model, name)
    model.set_distilled_training(True)
    assert model(images()).shape == (3, 5)  # in eval mode timm's own gives one, too
    model.train()
    with pytest.raises(PrunexError, match="distilled_training two"):
        model(images())


class Shares(nn.Module):
    """Goes by its ViT's classifier elsewhere too, or by its weight alone; the ViT itself has two names."""

    def __init__(self, whole):
        super().__init__()
        self.vit = self.same = tiny()
        self.aux = self.vit.head if whole else nn.Linear(48, 5)
        self.aux.weight = self.vit.head.weight

    def forward(self, x):
        return self.vit(x) + self.aux(self.vit.forward_features(x).mean(1))


@pytest.mark.parametrize("whole", [True, False])
def test_a_classifier_that_the_module_uses_elsewhere_goes_on_learning(whole):
    module = Shares(whole)
    head = attach(module, "attributes")
    module.train()
    module(images()).sum().backward()
    assert module.aux.weight.grad is not None
    assert module.vit.head.bias.requires_grad == whole  # the rest of it rests
    head.detach()
    assert module.vit.head.bias.requires_grad
