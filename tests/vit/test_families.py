"""Every family that works, by a published architecture made small: parity, pruning, explanation, slim, load, export."""

import re
from pathlib import Path

import pytest
import torch

import prunex
from prunex.vit.forward import run
from prunex.vit.recorder import Recorder
from prunex.vit.tape import Tape
from tests.vit.families import FAMILIES, build, double, table
from tests.vits import assert_same_state, images_for, largest, randomise, relative, state_of

METHODS = ("topk", "evit", "dynamicvit")
RELEVANCE = ("lrp", "partial_lrp", "transformer_attribution")
EXPLAINERS = ("raw_attention", "rollout", "generic_attention", "grad_cam")
EXPORTED = ("eva02", "beit")  # the others are exported by make test-all
ONNX = ("eva02", "beit", "pe")
README = Path(__file__).parent.parent.parent / "README.md"


def families(chosen):
    """All families, those that are not chosen marked slow."""
    return [f if f in chosen else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


def attach(model, method, keep_ratio=0.6, stages=(1, 2), **options):
    pruning = prunex.attach(model, method, keep_ratio=keep_ratio, stages=stages, **options)
    randomise(pruning.pruner)
    return pruning


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_parity(family):
    model = build(family)
    x = images_for(model)
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        assert largest(run(model, x).tokens, features) == 0  # whole blocks: the very same calls
        opened = run(model, x, recorder=Recorder(Tape(rows=frozenset(range(len(model.blocks)))))).tokens
        assert relative(opened, features) < 5e-6
        tape = Tape(attention=True, streams=True)
        assert relative(run(model, x, recorder=Recorder(tape)).tokens, features) < 5e-6
        for step in tape.attended() if FAMILIES[family].shares else ():
            assert largest(step.attention.sum(-1), torch.ones_like(step.attention[..., 0])) < 1e-5
        before = state_of(model)
        with prunex.attach(model, "evit", keep_ratio=1.0):
            assert largest(model(x), logits) <= 1e-6
        assert_same_state(model, before)
        assert torch.equal(model(x), logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned(family, method):
    model = double(family)
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        with attach(model, method, keep_ratio=1.0) as pruning:
            for masked in (None, True):
                pruning.masked = masked
                assert largest(model(x), dense) < 1e-12
        with attach(model, method) as pruning:
            removed, kept = model(x), pruning.trace.kept()
            assert not kept.all()
            assert largest(removed, dense) > 1e-4
            pruning.masked = True
            assert largest(model(x), removed) < 1e-10
            assert pruning.trace.kept().equal(kept)
            pruning.masked = None
            for i in range(3):
                assert largest(model(x[i : i + 1])[0], removed[i]) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_removed_in_gradients(family):
    model = double(family).train()
    x = images_for(model)
    pruning = attach(model, "evit")

    def step(masked, recompute=False):
        pruning.masked = masked
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(0)  # Sapiens2 draws the scale of its rotary positions
        model(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    removed = step(False)
    if not hasattr(model, "head_dist"):
        assert removed.keys() == {n for n, _ in model.named_parameters()}
    for again in (step(True), step(False, recompute=True)):
        assert removed.keys() == again.keys()
        assert max(largest(removed[n], again[n]) / (1 + float(removed[n].abs().max())) for n in removed) < 1e-9


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_explained(family, explainer):
    model = double(family)
    x = images_for(model)
    dense = prunex.explain(explainer, model, x)
    assert dense.maps.shape == (3, 4, 4)
    assert torch.isfinite(dense.maps).all()
    assert float(dense.maps.flatten(1).var(1).min()) > 0
    with attach(model, "evit") as pruning:
        removed = prunex.explain(explainer, model, x)
        pruning.masked = True
        assert relative(prunex.explain(explainer, model, x).maps, removed.maps) < 1e-9
        pruning.masked = None
        assert relative(prunex.explain(explainer, model, x[:1]).maps, removed.maps[:1]) < 1e-9
        if explainer == "rollout":
            assert largest(removed.raw.sum(1), torch.ones(3, dtype=torch.float64)) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("explainer", RELEVANCE)
def test_relevance_rules_reach_it_or_say_so(family, explainer):
    model = double(family)
    x = images_for(model)
    if FAMILIES[family].rules != "yes":
        with pytest.raises(prunex.PrunexError, match=f"do not know {FAMILIES[family].rules}: known are .*rollout take"):
            prunex.explain(explainer, model, x)
        return
    dense = prunex.explain(explainer, model, x)
    assert float(dense.maps.flatten(1).var(1).min()) > 0
    for method in ("topk", "evit"):
        with attach(model, method) as pruning:
            removed = prunex.explain(explainer, model, x)
            assert torch.isfinite(removed.raw).all()
            pruning.masked = True
            assert relative(prunex.explain(explainer, model, x).raw, removed.raw) < 1e-7
            pruning.masked = None
            assert relative(prunex.explain(explainer, model, x[:1]).raw, removed.raw[:1]) < 1e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_slim_and_loaded_again(family, tmp_path):
    model = build(family)
    x = images_for(model)
    attach(model, "evit")
    with torch.no_grad():
        wanted = model(x)
        small = prunex.slim(model)
        assert torch.equal(small(x), wanted)
        again = prunex.load(prunex.save(small, tmp_path / "slim"))
        assert torch.equal(again(x), wanted)
    assert prunex.cost(again) == prunex.cost(model)


@pytest.mark.parametrize("family", families(EXPORTED))
def test_exported(family, tmp_path):
    model = build(family)
    attach(model, "evit")
    assert prunex.export(prunex.slim(model), tmp_path / "model.pt2", images_for(model)).is_file()  # checked in there


@pytest.mark.slow
@pytest.mark.parametrize("family", ONNX)
def test_exported_to_onnx(family, tmp_path):
    pytest.importorskip("onnxscript")
    model = build(family)
    attach(model, "evit")
    assert prunex.export(prunex.slim(model), tmp_path / "model.onnx", images_for(model)).is_file()


def test_the_page_of_explainers_says_what_relevance_sums_to_in_every_family():
    page = (README.parent / "docs" / "explainers.md").read_text()
    rows = page.split("## What relevance sums to")[1].split("\n## ")[0].splitlines()
    told = {cells[1].strip(): cells[2:-1] for cells in (row.split("|") for row in rows) if len(cells) == 8}
    for family in FAMILIES.values():
        z, cp, _, whole, _ = (float(cell) for cell in told[family.title])
        assert z == whole == 1.0
        assert 0.2 < cp < 1.5


def test_the_readme_shows_the_table_of_families():
    text = README.read_text()
    if "<!-- families -->" not in text:
        pytest.skip("the README has no table of families")
    shown = re.search(r"<!-- families -->\n(.*?)\n<!-- /families -->", text, re.DOTALL)
    assert shown is not None, "the table ends with <!-- /families -->"
    assert shown.group(1).strip() == table(), "run python docs/make_families.py"
