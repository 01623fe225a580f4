"""The recorder leaves no trace, whatever happens, sees what the model computes, and refuses what it cannot see."""

import copy
import gc
import pickle
import threading

import lightning
import numpy as np
import pytest
import torch
from torch import nn

import prunex.multimodal
from prunex.errors import PrunexError
from prunex.multimodal.families import adapter_of
from prunex.multimodal.recorder import recorded
from prunex.multimodal.rules import last
from tests.multimodal.models import MAKERS, clip, detector, lxmert, vilt, visual_bert
from tests.vits import quick

ALL = pytest.mark.parametrize("kind", MAKERS)
FUSED = ("detr", "conditional_detr", "clip", "owlvit")
DETECTORS = ("detr", "conditional_detr", "dab_detr", "table_transformer", "owlvit")


def explain(kind, model, inputs, target=None, method="generic_attention", **options):
    """Of a detector every object query, since nothing is detected at random."""
    options = {"queries": [0, 2], **options} if kind in DETECTORS else options
    return prunex.multimodal.explain(model, inputs, target, method, **options)


def state(model):
    """All that must be as it was."""
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "kinds": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "values": [v.clone() for v in model.state_dict().values()],
        "random": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Untouched:
    """Nothing about a model changes meanwhile."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = state(self.model)

    def __exit__(self, *_):
        after = state(self.model)
        assert [name for name in after if not same(after[name], self.before[name])] == []


@ALL
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_changes_and_logits_are_the_models(kind, train, frozen):
    model, inputs = MAKERS[kind]()
    model.requires_grad_(not frozen)
    for parameter in [*model.parameters()][::2]:
        parameter.grad = torch.randn_like(parameter)
    draws = torch.get_rng_state()
    with torch.no_grad():
        want = adapter_of(model, inputs).logits(model(**inputs))
    torch.set_rng_state(draws)
    model.train(train)
    [*model.children()][0].train(not train)  # flags of the parts are their own
    with Untouched(model):
        e = explain(kind, model, inputs)
    if kind in FUSED:
        torch.testing.assert_close(e.logits, want, rtol=0, atol=1e-5)
        assert model.config._attn_implementation == "sdpa"
    else:
        assert torch.equal(e.logits, want)
    assert not e.image.requires_grad
    assert e.image.abs().sum() > 0


@ALL
def test_maps_as_many_as_the_formula_and_of_every_role(kind):
    model, inputs = MAKERS[kind]()
    adapter = adapter_of(model, inputs)
    with recorded(model, adapter.prepared, adapter.roles, adapter.feature_map) as recording:
        config = model.config
        formulas = {
            "lxmert": lambda: config.l_layers + config.r_layers + 4 * config.x_layers,
            "clip": lambda: config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers,
            "visual_bert": lambda: config.num_hidden_layers,
        }
        formulas |= {"owlvit": formulas["clip"], "vilt": formulas["visual_bert"]}
        expected = formulas.get(kind, lambda: config.encoder_layers + 2 * config.decoder_layers)()
        assert len(recording.maps) == adapter.count() == expected
        assert {m.role for m in recording.maps} == {role for each in adapter.roles.values() for role in each}
        for m in recording.maps:
            assert m.attention.ndim == 4
            torch.testing.assert_close(m.attention.sum(-1), torch.ones(m.attention.shape[:3]))


class Softmaxes:
    """The attention of a forward, one after the other, and one entry of one of them moved by a little."""

    def __init__(self, monkeypatch, path):
        self.maps, self.place, self.step = [], None, 0.0
        softmax = nn.functional.softmax

        def moved(scores, *args, **kwargs):
            kwargs.pop("dtype", None)  # CLIP's is single precision, whatever the model's is
            out = softmax(scores, *args, **kwargs)
            if self.place is not None and self.place[0] == len(self.maps):
                out = out.clone()
                out[self.place[-out.ndim :]] += self.step
            self.maps.append(out if out.ndim == 4 else out[None])  # some have samples and heads in one dimension
            return out

        monkeypatch.setattr(path, moved)

    def score(self, run, place, step):
        self.maps, self.place, self.step = [], place, step
        with torch.no_grad():
            return run()


@ALL
def test_gradients_are_those_of_moving_one_entry_of_one_map(kind, monkeypatch):
    """Finite differences in double precision, without renormalising; eager, so that there is a softmax to move."""
    model, inputs = MAKERS[kind](batch=1) if kind not in ("clip", "owlvit") else MAKERS[kind](images=1, texts=2)
    model.set_attn_implementation("eager")
    step, near = (3e-3, 3e-2) if kind == "dab_detr" else (1e-5, 1e-3)
    if kind != "dab_detr":  # which knows single precision alone
        model = model.double()
        inputs = {n: v.double() if v.is_floating_point() and "mask" not in n else v for n, v in inputs.items()}
    adapter = adapter_of(model, inputs)
    torch.manual_seed(3)  # ViLT draws
    with recorded(model, adapter.prepared, adapter.roles, adapter.feature_map) as recording:
        score = adapter.logits(recording.outputs).flatten()[1]
        maps = recording.with_gradients(score, last=True, unread=adapter.unread)
    seen = Softmaxes(monkeypatch, "torch.nn.functional.softmax")

    def run():
        torch.manual_seed(3)
        return adapter.logits(model(**inputs)).flatten()[1].item()

    seen.score(run, None, 0.0)
    assert len(seen.maps) == len(maps), "an attention that the recorder did not see, or the other way round"
    for kept, computed in zip(maps, seen.maps, strict=True):
        torch.testing.assert_close(kept.attention, computed, rtol=0, atol=1e-7 if kind == "clip" else 1e-14)
    large = 0
    for number, m in enumerate(maps):
        gradient = torch.as_tensor(m.gradient)
        largest = int(gradient.abs().argmax())
        for flat in {largest, (largest + 7) % gradient.numel()}:
            place = tuple(int(i) for i in np.unravel_index(flat, gradient.shape))
            up, down = (seen.score(run, (number, *place), sign * step) for sign in (1, -1))
            assert (up - down) / (2 * step) == pytest.approx(gradient[place].item(), rel=near, abs=near * 1e-3)
            large += abs(gradient[place].item()) > 10 * near * 1e-3
    assert large >= len(maps) // 2


@ALL
def test_what_the_answer_reads_is_all_that_the_last_map_matters_by(kind):
    """The family's rows are those of the model: another token's row of the last map has no gradient."""
    model, inputs = MAKERS[kind]()
    adapter = adapter_of(model, inputs)
    options = {**adapter.options, "queries": [1]} if "queries" in adapter.options else adapter.options
    with recorded(model, adapter.prepared, adapter.roles, adapter.feature_map) as recording:
        targets = adapter.targets(recording, None, options)
        maps = recording.with_gradients(targets.passes[0].score, last=True, unread=adapter.unread)
    answering = adapter.answering(targets, targets.passes[0].column)
    assert answering
    for role, tokens in answering.items():
        gradient = torch.as_tensor(last(maps, role).gradient).abs().amax((1, 3))
        read = torch.zeros_like(gradient, dtype=torch.bool).scatter(1, tokens, True)
        assert gradient[~read].abs().sum() == 0
        assert (gradient.masked_fill(~read, 0).amax(1) > 0).any()


class Stopped(KeyboardInterrupt):
    pass


@ALL
@pytest.mark.parametrize("error", [RuntimeError("out of order"), Stopped()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_whatever_is_raised_in_the_middle_leaves_no_trace(kind, where, error):
    model, inputs = MAKERS[kind]()
    model.train()
    model.requires_grad_(False)
    adapter = adapter_of(model, inputs)
    modules = [m for path, m in model.named_modules() if path.endswith(("self_attn", ".self", "attention.attention"))]

    def fail(*_):
        raise error

    def fail_later(_module, _args, output):
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(fail)

    handle = modules[-1].register_forward_hook(fail if where == "forward" else fail_later)
    if where == "backward" and kind == "lxmert":
        handle.remove()  # its last self attention of the image is read by nobody
        handle = modules[0].register_forward_hook(fail_later)
    wanted = Stopped if isinstance(error, Stopped) else (PrunexError if where == "forward" else RuntimeError)
    with Untouched(model), pytest.raises(wanted, match="out of order" if wanted is not Stopped else ""):
        explain(kind, model, inputs)
    handle.remove()
    with Untouched(model):
        assert explain(kind, model, inputs).image.abs().sum() > 0
    assert adapter.count()


@ALL
def test_inside_no_grad_and_inference_mode_the_map_is_the_same(kind):
    model, inputs = MAKERS[kind]()
    want = explain(kind, model, inputs).image
    with torch.no_grad():
        assert torch.equal(explain(kind, model, inputs).image, want)
    with torch.inference_mode():
        made = {name: value.clone() for name, value in inputs.items()}
        assert made["input_ids" if "input_ids" in made else "pixel_values"].is_inference()
        e = explain(kind, model, made)
        assert not e.image.is_inference()
    torch.testing.assert_close(e.image, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["detr", "vilt"])
def test_inside_a_lightning_validation(kind):
    model, inputs = MAKERS[kind]()
    want = explain(kind, model, inputs).image
    maps = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def validation_step(self, batch, _index):
            assert torch.is_inference_mode_enabled()
            maps.append(explain(kind, self.model, batch).image)

    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(Module(), torch.utils.data.DataLoader([inputs], batch_size=None), verbose=False)
    torch.testing.assert_close(maps[0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_half_precision_is_near_single_and_adds_up_in_single(kind, dtype):
    model, inputs = MAKERS[kind]()
    want = explain(kind, model, inputs, 1, queries=[2]) if kind in DETECTORS else explain(kind, model, inputs, 1)
    half = {n: v.to(dtype) if v.is_floating_point() and "mask" not in n else v for n, v in inputs.items()}
    options = {"queries": [2]} if kind in DETECTORS else {}
    try:
        with torch.no_grad():
            copy.deepcopy(model).to(dtype)(**half)
    except RuntimeError as error:
        with pytest.raises(PrunexError, match="when called with"):
            explain(kind, model.to(dtype), half, 1, **options)
        pytest.skip(f"the model itself: {error}")
    e = explain(kind, model.to(dtype), half, 1, **options)
    assert e.image.dtype == torch.float32
    assert e.image.isfinite().all()
    # Tiny gradients vanish in float16; what is left points the same way.
    similar = torch.cosine_similarity(e.image.flatten(), want.image.flatten(), dim=0)
    assert similar > 0.9


@ALL
def test_under_autocast_sums_stay_in_single_precision(kind):
    model, inputs = MAKERS[kind]()
    want = explain(kind, model, inputs, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16), Untouched(model):
        e = explain(kind, model, inputs, 1)
    assert e.image.dtype == torch.float32
    assert all(m.dtype == torch.float32 for m in e.relevance.values())
    assert torch.cosine_similarity(e.image.flatten(), want.image.flatten(), dim=0) > 0.9


def test_threads_that_explain_models_of_one_configuration_wait_for_each_other():
    (first, inputs), (other, _) = detector("Detr"), detector("Detr")
    second = type(other)(first.config).eval()
    second.load_state_dict(other.state_dict())
    assert second.config is first.config
    want = explain("detr", first, inputs).image
    found, errors = [], []

    def work(model):
        try:
            for _ in range(4):
                found.append(explain("detr", model, inputs).image)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in (first, second, first)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(found) == 12
    assert all(torch.equal(each, want) for each in found)
    assert first.config._attn_implementation == "sdpa"


@ALL
def test_hooks_of_the_user_stay_and_are_called_once(kind):
    model, inputs = MAKERS[kind]()
    calls = []
    handles = [
        model.register_forward_hook(lambda *_: calls.append(1)),
        model.register_forward_pre_hook(lambda *_: None),
    ]
    explain(kind, model, inputs)
    assert calls == [1]
    assert [len(model._forward_hooks), len(model._forward_pre_hooks)] == [1, 1]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["lxmert", "detr", "owlvit"])
def test_copied_and_pickled_afterwards(kind):
    model, inputs = MAKERS[kind]()
    want = explain(kind, model, inputs).image
    assert torch.equal(explain(kind, copy.deepcopy(model), inputs).image, want)
    assert torch.equal(explain(kind, pickle.loads(pickle.dumps(model)), inputs).image, want)


@pytest.mark.parametrize("kind", quick(MAKERS, ["lxmert", "vilt", "detr", "clip"]))
def test_one_forward_for_many_targets_and_nothing_is_left_over(kind):
    model, inputs = MAKERS[kind]()
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    target = torch.tensor([[0, 1], [1, 0]]) if kind not in DETECTORS else None
    explain(kind, model, inputs, target)
    assert len(calls) == 1
    handle.remove()

    def alive():
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    explain(kind, model, inputs, target)
    before = alive()
    for _ in range(2):
        explain(kind, model, inputs, target)
        with pytest.raises(PrunexError):
            explain(kind, model, inputs, 10_000)
    assert alive() <= before


def test_memory_stays_flat_over_200_calls():
    model, inputs = visual_bert()

    def alive():
        gc.collect()
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        return len(tensors), sum(each.numel() for each in tensors)

    prunex.multimodal.explain(model, inputs)
    before = alive()
    for _ in range(200):
        prunex.multimodal.explain(model, inputs)
    assert alive() == before


def refused(model, inputs, match, kind="lxmert"):
    with Untouched(model) if hasattr(model, "config") else torch.enable_grad(), pytest.raises(PrunexError) as caught:
        explain(kind, model, inputs)
    assert match in str(caught.value)
    assert "\n" not in str(caught.value)


def test_compiled_checkpointed_meta_and_inference_models_are_refused():
    model, inputs = lxmert()
    compiled = copy.deepcopy(model)
    compiled.compile()
    refused(compiled, inputs, "is compiled")
    compiled = copy.deepcopy(model)
    compiled.lxmert.encoder.layer[0] = torch.compile(compiled.lxmert.encoder.layer[0])
    refused(compiled, inputs, "is compiled")
    refused(torch.compile(model), inputs, "holds a LxmertForQuestionAnswering at '_orig_mod'")
    checkpointed, inputs = detector("Detr")
    try:
        checkpointed.gradient_checkpointing_enable()
    except ValueError:
        checkpointed.model.encoder.gradient_checkpointing = True
    refused(checkpointed, inputs, "gradient_checkpointing_disable()", "detr")
    with pytest.raises(PrunexError, match="meta device"):
        explain("detr", detector("Detr")[0].to("meta"), inputs)
    with torch.inference_mode():
        model, inputs = lxmert()
    with pytest.raises(PrunexError, match="inference_mode"):
        explain("lxmert", model, inputs)


def test_wrappers_say_what_they_hold():
    import peft

    model, inputs = lxmert()
    refused(nn.DataParallel(model), inputs, "holds a LxmertForQuestionAnswering at 'module'")
    want = explain("lxmert", model, inputs).image
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"]))
    refused(adapted, inputs, "LxmertForQuestionAnswering at 'base_model.model'")
    base = adapted.get_base_model()
    torch.testing.assert_close(explain("lxmert", base, inputs).image, want)  # LoRA starts as nothing
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with Untouched(base):
        assert not torch.allclose(explain("lxmert", base, inputs).image, want)


def test_attention_that_cannot_be_seen_is_told():
    model, inputs = visual_bert()
    attention = model.visual_bert.encoder.layer[1].attention.self
    handle = attention.register_forward_hook(lambda _m, _a, out: out[:1])
    refused(model, inputs, "returned no attention map", "visual_bert")
    handle.remove()
    handle = attention.register_forward_hook(lambda _m, _a, out: (out[0], out[1].detach()))
    refused(model, inputs, "lets no gradient through", "visual_bert")
    handle.remove()
    handle = attention.register_forward_hook(lambda _m, _a, out: (out[0], out[1] * 1.0))
    refused(model, inputs, "it is a copy", "visual_bert")
    handle.remove()
    handle = attention.register_forward_hook(lambda _m, _a, out: (out[0], out[1] * 3))
    refused(model, inputs, "rows sum to 3", "visual_bert")
    handle.remove()
    handle = model.register_forward_hook(lambda _m, _a, out: out.__setitem__("logits", out.logits.detach()))
    refused(model, inputs, "the scores do not depend on", "visual_bert")
    handle.remove()
    assert explain("visual_bert", model, inputs).image.sum() > 0


def test_fewer_layers_than_the_configuration_says_are_told():
    for kind, (model, inputs) in {"lxmert": lxmert(), "clip": clip(), "vilt": vilt(), "detr": detector("Detr")}.items():
        config = model.config
        name = {"lxmert": "x_layers", "clip": "", "vilt": "num_hidden_layers", "detr": "decoder_layers"}[kind]
        target = config.text_config if kind == "clip" else config
        name = name or "num_hidden_layers"
        setattr(target, name, getattr(target, name) + 1)
        with pytest.raises(PrunexError, match="maps where"):
            explain(kind, model, inputs)
