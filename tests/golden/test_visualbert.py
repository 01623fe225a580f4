"""VisualBERT's relevance against the authors' code: the matrix, the row that answers, and the baselines."""

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
ROLES = [(f"visual_bert.encoder.layer.{i}.attention.self", "ss") for i in range(3)]


def row(e):
    return torch.cat([e.text, e.image], 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_matrix_and_row(seed, target):
    model, inputs, want = model_and_inputs("visualbert", seed)
    e = prunex.multimodal.explain(model, inputs, want[f"targets_{target}"])
    assert relative(e.logits, want["logits"]) < 2e-5
    assert relative(e.relevance["R_ss"], want[f"ours_R__{target}"]) < 2e-5
    assert relative(row(e), want[f"ours_row__{target}"]) < 2e-5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rule_on_stored_maps_is_the_one_of_a_single_stream(seed, target):
    model, inputs, want = model_and_inputs("visualbert", seed)
    maps = stored_maps(want, ROLES, target)
    ours = adapter_of(model, inputs).relevance(maps, Rules()).matrices()["R_ss"]
    plain = torch.eye(11, dtype=torch.float64).expand(2, -1, -1)
    for map_ in maps:
        plain = plain + (map_.attention * map_.gradient).clamp(min=0).mean(1) @ plain
    assert relative(ours, plain) < 1e-12
    assert relative(ours, want[f"ours_R__{target}"]) < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_baselines(seed):
    model, inputs, want = model_and_inputs("visualbert", seed)
    assert relative(row(prunex.multimodal.explain(model, inputs, method="raw_attention")), want["raw_attn_row"]) < 2e-5
    e = prunex.multimodal.explain(model, inputs, method="rollout")
    assert relative(e.relevance["R_ss"], want["rollout_R"]) < 2e-5
    assert relative(row(e), want["rollout_row"]) < 2e-5
    for target in TARGETS:
        e = prunex.multimodal.explain(model, inputs, want[f"targets_{target}"], "grad_cam")
        assert relative(row(e), want[f"attn_gradcam_row__{target}"]) < 2e-5
