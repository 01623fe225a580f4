"""What holds for every head: reversible, beside any pruner, explained on original patches, saved, loaded, exported."""

import copy
import pickle
import warnings
from itertools import product

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from tests.explainers.quick import EXPLAINERS, explain
from tests.heads.heads import HEADS, attach
from tests.vits import assert_same_state, images_for, largest, quick, randomise, relative, state_of, tiny

QUICK = ["vit", "deit_distilled", "avg_pool_no_class", "eva02"]
FAMILIES = [*QUICK, "dinov2_reg", "avg_pool", "beit", "siglip", "not_square"]
PRUNERS = {
    "topk": {"keep_ratio": 0.6, "stages": (1, 2)},
    "evit": {"keep_ratio": 0.6, "stages": (1, 2)},
    "dynamicvit": {"keep_ratio": 0.6, "stages": (1, 2)},
    "tome": {"r": 2},
    "diffrate": {"keep_ratio": 0.7, "learns": False},
    "ppt": {"r": 3, "tau": 0.01},
}
every_head = pytest.mark.parametrize("name", HEADS)
every_family = pytest.mark.parametrize("family", quick(FAMILIES, QUICK))
every_pruner = pytest.mark.parametrize("pruner", PRUNERS)


@every_head
@every_family
def test_it_comes_off_bit_for_bit(name, family):
    model = tiny(family)
    model.head.weight.requires_grad_(False)  # somebody's own choice
    before, x = state_of(model), images_for(model)
    logits = model(x)
    head = attach(model, name)
    assert model(x).shape == logits.shape
    assert largest(model(x), logits) > 1e-3
    assert [k for k in model.state_dict() if not k.startswith("prunex_head.")] == list(before["tensors"])
    assert head.detach() is model
    assert_same_state(model, before)
    assert model(x).equal(logits)
    assert head.detach() is model
    with pytest.raises(PrunexError, match="detached"):
        head.evidence(x)


@every_head
@every_family
@pytest.mark.parametrize("train", [False, True])
def test_one_answers_as_in_a_batch_and_by_evidence(name, family, train):
    model = tiny(family).double()
    head, x = attach(model, name), images_for(model)
    randomise(head.head)
    model.train(train)
    evidence = head.evidence(x, target=1)
    assert model.training == train
    model.eval()
    assert relative(evidence.logits, model(x)) < 1e-12
    assert evidence.maps.shape == (3, *model.patch_embed.grid_size)
    for i in range(3):
        alone = head.evidence(x[i : i + 1], target=1)
        assert relative(alone.logits, evidence.logits[i : i + 1]) < 1e-11
        assert largest(alone.row, evidence.row[i : i + 1]) < 1e-11
    e = prunex.explain(name, model, x, target=1)
    assert largest(e.maps, evidence.maps) < 1e-11
    assert {k: v.shape for k, v in e.info.items()} == {k: v.shape for k, v in evidence.info().items()}
    assert all(len(v) == 3 for v in e.info.values())


@every_head
@every_pruner
@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class"])
@pytest.mark.parametrize("first", ["head", "pruner"])
def test_masked_is_removed_and_evidence_lands_on_patches(name, pruner, family, first):
    model = tiny(family).double()
    x = images_for(model)
    if first == "head":
        head, pruning = attach(model, name), prunex.attach(model, pruner, **PRUNERS[pruner])
    else:
        pruning, head = prunex.attach(model, pruner, **PRUNERS[pruner]), attach(model, name)
    randomise(head.head)
    randomise(pruning.pruner)
    removed = model(x)
    evidence = head.evidence(x, target=2)
    assert relative(evidence.logits, removed) < 1e-12
    pruning.masked = True
    masked = head.evidence(x, target=2)
    assert relative(masked.logits, removed) < 1e-9
    assert largest(masked.row, evidence.row) < 1e-9
    assert largest(model(x), removed) < 1e-9
    if pruner in ("topk", "dynamicvit"):
        assert not bool(evidence.maps[~pruning.trace.kept()].any())
    pruning.detach()
    assert relative(model(x), head.evidence(x).logits) < 1e-12
    head.detach()
    assert model(x).equal(tiny(family).double()(x))


@every_head
@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("pruner", [None, "evit"])
def test_every_explainer_works_on_a_model_with_a_head(name, explainer, pruner):
    model = tiny()
    head = attach(model, name)
    randomise(head.head)
    if pruner is not None:
        prunex.attach(model, pruner, **PRUNERS[pruner])
    x = images_for(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # r_cut tells of images without a cut
        e = explain(explainer, model, x, target=3)
    assert torch.isfinite(e.maps).all()
    assert relative(e.logits, model(x)) < 1e-5
    assert bool((e.maps.flatten(1).std(1) > 0).any())  # Grad-CAM of a tiny model may be 0 for an image


def with_a_head(name, pruner):
    model = tiny()
    if pruner is not None:
        prunex.attach(model, pruner, **PRUNERS[pruner])
    head = attach(model, name)
    randomise(head.head)
    return model, head


@every_head
@pytest.mark.parametrize("pruner", [None, "evit", "tome"])
def test_slim_saved_loaded(name, pruner, tmp_path):
    model, head = with_a_head(name, pruner)
    x = images_for(model, 4)
    want = model(x)
    assert prunex.slim(model)(x).equal(want)
    again = prunex.load(prunex.save(prunex.slim(model), tmp_path / "slim"))
    assert relative(again(x), want) < 1e-6
    loaded = prunex.attached(again, head=True)
    assert loaded.spec == head.spec
    assert largest(loaded.evidence(x, 1).maps, head.evidence(x, 1).maps) < 1e-5
    assert prunex.cost(again) == prunex.cost(model)


@pytest.mark.parametrize(
    ("name", "pruner"), quick(list(product(HEADS, [None, "evit", "tome"])), [("mean_patch", None), ("vit_net", "evit")])
)
def test_exported(name, pruner, tmp_path):
    model, head = with_a_head(name, pruner)
    x = images_for(model, 4)
    want = model(x)
    path = prunex.export(model, tmp_path / "model.pt2", head=True, kept=True)
    logits, *more, kept = torch.export.load(path).module()(torch.cat([x, x]))
    assert relative(logits[:4], want) < 1e-5
    assert kept.shape == (8, 4, 4)
    wanted = head.head.outputs(head.read(x))
    assert len(more) == len(wanted) > 0
    assert all(largest(ours[:4], theirs) < 1e-5 for ours, theirs in zip(more, wanted.values(), strict=True))


@pytest.mark.parametrize("name", quick(HEADS, ["concept_transformer"]))
def test_onnx_has_its_outputs_by_name(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny()
    head = attach(model, name)
    x = images_for(model, 3)
    path = prunex.export(model, tmp_path / "model.onnx", head=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = head.head.outputs(head.read(x))
    assert [o.name for o in session.get_outputs()] == ["logits", *wanted]
    assert session.get_outputs()[0].shape == ["batch", 5]
    logits, *more = session.run(None, {"images": x.numpy()})
    assert relative(torch.from_numpy(logits), model(x)) < 1e-5
    assert all(largest(torch.from_numpy(a), b) < 1e-5 for a, b in zip(more, wanted.values(), strict=True))


@every_head
def test_half_of_the_units_removed(name):
    model = tiny()
    head = attach(model, name)
    prunex.attach(model, "evit", **PRUNERS["evit"])
    units = prunex.attach(model, "magnitude", budget=0.6)
    units.calibrate()
    x = images_for(model)
    want, cost = model(x), prunex.cost(model)
    small = prunex.slim(model)
    assert relative(small(x), want) < 1e-5
    assert prunex.cost(small).macs == cost.macs
    evidence = prunex.attached(small, head=True).evidence(x, 0)
    assert largest(evidence.maps, head.evidence(x, 0).maps) < 1e-5


@every_head
def test_copies_and_pickles_are_the_same_model(name):
    model = tiny()
    attach(model, name)
    model.train()
    model(images_for(model)).sum().backward()  # leaves a reading behind
    model.eval()
    x = images_for(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(model(x))
        assert prunex.attached(twin, head=True).spec == prunex.attached(model, head=True).spec


@every_head
def test_what_trains(name):
    model = tiny()
    head = attach(model, name)
    model.train()
    model(images_for(model)).square().sum().backward()
    unmoved = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unmoved  # processes that share gradients wait for every one of them
    assert any(p.grad.abs().sum() > 0 for p in head.head.parameters())


@every_head
def test_half_precision_and_autocast(name):
    model = tiny()
    attach(model, name)
    x = images_for(model)
    want = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()
        out = model(x)
        assert torch.isfinite(out).all()
        out.float().sum().backward()
        model.eval()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    half = model.bfloat16()
    assert relative(half(x.bfloat16()).float(), want) < 0.2


@every_head
def test_a_dense_state_dict_loads_and_another_size_is_refused(name):
    model, other = tiny(), tiny(seed=1)
    head = attach(model, name)
    before = {k: v.clone() for k, v in head.head.state_dict().items()}
    model.load_state_dict(other.state_dict())
    assert all(v.equal(before[k]) for k, v in head.head.state_dict().items())
    assert model.head.weight.equal(other.head.weight)
    model.reset_classifier(7)
    with pytest.raises(PrunexError, match="made for 5 classes, and the model has 7 now: detach"):
        model(images_for(model))


@every_head
def test_refused_at_the_door(name):
    with pytest.raises(PrunexError, match="num_classes=0"):
        attach(tiny(num_classes=0), name)
    model = tiny()
    before = state_of(model)
    with pytest.raises(PrunexError, match="budget=0.5 is for pruners"):
        attach(model, name, budget=0.5)
    with pytest.raises(PrunexError, match=f"unknown option of {name} 'atributes'"):
        attach(model, name, atributes=3)
    assert_same_state(model, before)
    attach(model, name)
    with pytest.raises(PrunexError, match=f"has a head that explains itself, {name}: detach"):
        attach(model, name)
    with pytest.raises(PrunexError, match="images are 8 x 8 pixels"):
        prunex.attached(model, head=True).evidence(torch.zeros(1, 3, 8, 8))
    with pytest.raises(PrunexError, match=r"target=9 is out of range"):
        prunex.attached(model, head=True).evidence(images_for(model), 9)
    with pytest.raises(PrunexError, match=r"tokens are \[2, 17, 47\]: give \[B, 1 \+ patches, 48\]"):
        prunex.attached(model, head=True).from_tokens(torch.zeros(2, 17, 47))


def test_explained_by_a_head_that_is_not_there():
    model = tiny()
    for name in HEADS:
        with pytest.raises(PrunexError, match=f"this one's is timm's own: prunex.attach.model, '{name}'"):
            prunex.explain(name, model, images_for(model))

    class Wrapped(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.vit, self.last = vit, nn.Linear(5, 2)

        def forward(self, x):
            return self.last(self.vit(x))

    attach(model, HEADS[0])
    with pytest.raises(PrunexError, match="the module round the ViT makes other ones"):
        prunex.explain(HEADS[0], Wrapped(model), images_for(model))


@every_head
def test_patch_slimming_leaves_no_patch_to_read(name):
    keep = [list(range(8)), list(range(4)), [0, 1]]
    model = tiny()
    attach(model, name)
    with pytest.raises(PrunexError, match="an explainable head that reads patches"):
        prunex.attach(model, "patch_slimming", keep=keep)
    model = tiny()
    prunex.attach(model, "patch_slimming", keep=keep)
    before = state_of(model)
    with pytest.raises(PrunexError, match="an explainable head that reads patches"):
        attach(model, name)
    assert_same_state(model, before)
