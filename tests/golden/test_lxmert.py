"""LXMERT's relevance against the authors' code: matrices, ablations, baselines, from weights and from stored maps."""

import pytest
import torch

from tests.explainers.reference import SEEDS, present

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

import prunex.multimodal  # noqa: E402
from prunex.multimodal.families import adapter_of  # noqa: E402
from prunex.multimodal.rules import Rules  # noqa: E402
from tests.golden.multimodal import model_and_inputs, relative, stored_maps  # noqa: E402

pytestmark = present
TARGETS = ["pred", "fixed"]
VARIANTS = {
    "ours_no_lrp": {},
    "ours_no_lrp_no_norm": {"normalise": False},
    "ablation_no_self_in_10": {"self_terms": False},
    "ablation_no_aggregation": {"normalise": False, "accumulate": False},
}
NAMES = ("R_tt", "R_ti", "R_ii", "R_it")


def roles():
    """Paths and roles in the order of execution."""
    each = [(f"lxmert.encoder.layer.{i}.attention.self", "tt") for i in range(2)]
    each += [(f"lxmert.encoder.r_layers.{i}.attention.self", "ii") for i in range(2)]
    for i in range(3):
        layer = f"lxmert.encoder.x_layers.{i}"
        each += [(f"{layer}.visual_attention.att#0", "ti"), (f"{layer}.visual_attention.att#1", "it")]
        each += [(f"{layer}.lang_self_att.self", "tt"), (f"{layer}.visn_self_att.self", "ii")]
    return each


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_matrices(seed, target, variant, literal):
    model, inputs, want = model_and_inputs("lxmert", seed)
    e = prunex.multimodal.explain(model, inputs, want[f"targets_{target}"], literal=literal, **VARIANTS[variant])
    assert relative(e.logits, want["logits"]) < 2e-5
    for name in NAMES:
        assert relative(e.relevance[name], want[f"{variant}_{name}__{target}"]) < 2e-5, name
    torch.testing.assert_close(e.text, e.relevance["R_tt"][:, 0])
    torch.testing.assert_close(e.image, e.relevance["R_ti"][:, 0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rules_on_stored_maps(seed, target):
    model, inputs, want = model_and_inputs("lxmert", seed)
    matrices = adapter_of(model, inputs).relevance(stored_maps(want, roles(), target), Rules()).matrices()
    for name in NAMES:
        assert relative(matrices[name], want[f"ours_no_lrp_{name}__{target}__dbl"]) < 1e-6, name


@pytest.mark.parametrize("seed", SEEDS)
def test_maps_and_gradients(seed):
    from prunex.multimodal.recorder import recorded

    model, inputs, want = model_and_inputs("lxmert", seed)
    adapter = adapter_of(model, inputs)
    with recorded(model, adapter.prepared, adapter.roles) as recording:
        assert [map_.path for map_ in recording.maps] == [path for path, _ in roles()]
        score = recording.outputs.question_answering_score.gather(1, want["targets_pred"][:, None]).sum()
        for map_, (path, role) in zip(
            recording.with_gradients(score, last=True, unread=adapter.unread), roles(), strict=True
        ):
            assert map_.role == role
            assert relative(map_.attention, want[f"attn/{path}"]) < 2e-5
            assert relative(map_.gradient, want[f"attn_grad__pred/{path}"]) < 2e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_baselines(seed):
    model, inputs, want = model_and_inputs("lxmert", seed)
    for method, stored in (("raw_attention", "raw_attn"), ("rollout", "rollout")):
        e = prunex.multimodal.explain(model, inputs, method=method)
        for name in e.relevance:
            assert relative(e.relevance[name], want[f"{stored}_{name}"]) < 2e-5, (method, name)
    for target in TARGETS:
        e = prunex.multimodal.explain(model, inputs, want[f"targets_{target}"], "grad_cam")
        for name in ("R_tt", "R_ti"):
            assert relative(e.relevance[name], want[f"attn_gradcam_{name}__{target}"]) < 2e-5
