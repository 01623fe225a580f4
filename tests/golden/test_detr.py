"""DETR's relevance against the authors' code: every object query, ablations, baselines, padding, dropped layers."""

import pytest
import torch

from tests.explainers.reference import SEEDS, present

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

import prunex.multimodal  # noqa: E402
from prunex.multimodal.families import adapter_of  # noqa: E402
from prunex.multimodal.rules import Attended, Rules  # noqa: E402
from tests.golden.multimodal import model_and_inputs, relative, stored_maps  # noqa: E402

pytestmark = present
TARGETS = ["pred", "fixed"]
VARIANTS = {
    "ours_no_lrp": {"literal": True},
    "ours_no_lrp_safe": {},
    "ours_no_lrp_no_norm": {"normalise": False},
    "ablation_no_self_in_10": {"self_terms": False},
    "ablation_no_aggregation": {"normalise": False, "accumulate": False},
}
LAYERS = [(f"model.encoder.layers.{i}.self_attn", "ii") for i in range(2)] + [
    layer
    for i in range(3)
    for layer in ((f"model.decoder.layers.{i}.self_attn", "qq"), (f"model.decoder.layers.{i}.encoder_attn", "qi"))
]


def stored(want, variant, name, target, prefix=""):
    """An array, from the authors' double precision where it is stored: theirs in single loses digits to R - I."""
    key = f"{prefix}{variant}_{name}__{target}"
    return want.get(f"{key}__dbl", want.get(key))


def explained(model, inputs, want, target, **options):
    return prunex.multimodal.explain(model, inputs, want[f"targets_{target}"], queries="all", **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_matrices_and_rows(seed, target, variant):
    model, inputs, want = model_and_inputs("detr", seed)
    e = explained(model, inputs, want, target, **VARIANTS[variant])
    assert relative(e.logits, want["logits"]) < 2e-5
    assert relative(e.boxes, want["pred_boxes"]) < 2e-5
    # From weights, single precision under the stored maps leaves more than the rules do.
    tolerance = 2e-4 if "aggregation" in variant else 5e-5
    for name in ("R_qi", "R_ii", "R_qq"):
        if (array := stored(want, variant, name, target)) is not None:
            assert relative(e.relevance[name], array) < tolerance, name
    assert relative(e.image, stored(want, variant, "row", target)) < tolerance
    if variant == "ours_no_lrp":
        assert torch.equal(e.dropped, want[f"ours_no_lrp_dropped__{target}"].bool())


@pytest.mark.parametrize("prefix", ["", "pad_"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rules_on_stored_maps(seed, variant, prefix):
    model, inputs, want = model_and_inputs("detr", seed)
    adapter = adapter_of(model, inputs)
    for query in range(7):
        maps = stored_maps(want, LAYERS, "pred", query, prefix)
        relevance = adapter.relevance(maps, Rules(**VARIANTS[variant]))
        want_qi = stored(want, variant, "R_qi", "pred", prefix)[:, query]
        assert relative(relevance.matrices()["R_qi"], want_qi) < 2e-5
        if variant == "ours_no_lrp":
            dropped = want[f"{prefix}ours_no_lrp_dropped__pred"][:, query].bool()
            assert torch.equal(torch.stack(relevance.dropped, 1), dropped)


@pytest.mark.parametrize("seed", SEEDS)
def test_padded_cells_cropped_from_every_map_are_the_safe_rule(seed):
    model, inputs, want = model_and_inputs("detr", seed)
    adapter, valid = adapter_of(model, inputs), want["pad_cell_valid"][1].flatten().bool()
    assert not valid.all()
    for query in range(7):
        maps = stored_maps(want, LAYERS, "pred", query, "pad_")
        safe = adapter.relevance(maps, Rules()).matrices()["R_qi"][1:, :, valid]
        cropped = [Attended(m.role, crop(m.attention, m.role, valid), crop(m.gradient, m.role, valid)) for m in maps]
        assert relative(adapter.relevance(cropped, Rules()).matrices()["R_qi"], safe) < 1e-9
        assert safe.abs().max() > 0


def crop(values, role, valid):
    values = values[1:]
    values = values[:, :, valid] if role[0] == "i" else values
    return values[:, :, :, valid] if role[1] == "i" else values


@pytest.mark.parametrize("seed", SEEDS)
def test_padded_batch_from_weights(seed):
    model, inputs, want = model_and_inputs("detr", seed)
    mask = want["pad_inputs/pixel_mask"]
    padded = {"pixel_values": inputs["pixel_values"] * mask[:, None], "pixel_mask": mask}
    e = prunex.multimodal.explain(model, padded, want["pad_targets_pred"], queries="all")
    assert relative(e.logits, want["pad_logits"]) < 2e-5
    assert relative(e.image, want["pad_ours_no_lrp_safe_row__pred__dbl"]) < 5e-5
    assert torch.equal(e.image_valid, want["pad_cell_valid"].flatten(1).bool())
    assert e.queries[1, 0].map.shape == (3, 3)
    assert e.queries[0, 0].map.shape == (3, 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_baselines(seed):
    model, inputs, want = model_and_inputs("detr", seed)
    for method, name in (("raw_attention", "raw_attn"), ("rollout", "rollout")):
        e = prunex.multimodal.explain(model, inputs, method=method, queries="all")
        assert relative(e.image, want[f"{name}_row"]) < 2e-5
    assert relative(e.relevance["R_ii"][:, 3], want["rollout_R_ii"]) < 2e-5
    assert relative(e.relevance["R_qq"][:, 3], want["rollout_R_qq"]) < 2e-5
    for target in TARGETS:
        e = explained(model, inputs, want, target, method="grad_cam")
        assert relative(e.image, want[f"attn_gradcam_row__{target}"]) < 5e-5
        assert relative(e.relevance["R_qi"], want[f"attn_gradcam_R_qi__{target}"]) < 5e-5
