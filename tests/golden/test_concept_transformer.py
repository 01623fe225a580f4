"""The Concept Transformer's head against the public code: scores, attention, losses, gradients; dropout replayed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunex
from tests.explainers.reference import SEEDS, arrays, present
from tests.vits import relative, tiny

pytestmark = present
STREAMS = {
    "global": ("concept_tranformer", "attn_global", "concepts"),
    "spatial": ("spatial_concept_tranformer", "attn_spatial", "spatial_concepts"),
    "unsupervised": ("unsup_concept_tranformer", "attn_unsup", "unsup_concepts"),
}
CASES = ["vit_h1", "vit_h2", "vit_h4", "globalonly_h2", "spatialonly_h2", "unsup_h2", "seq_h2", "allnan_h2"]


class Kept(nn.Module):
    """A dropout whose mask is known."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        return x * self.kept.to(x).reshape(x.shape) / 0.9


def attached(case, seed):
    """A head with a case's weights, the tokens as a leaf, and the case's arrays by their plain names."""
    every = arrays("concept_transformer", seed)
    # These two have another's weights.
    source = {"train_h2": "vit_h2", "allnan_h2": "vit_h2"}.get(case, case)
    state = {k.removeprefix(f"{source}_sd/"): v for k, v in every.items() if k.startswith(f"{source}_sd/")}
    want = {k.removeprefix(f"{case}_"): v for k, v in every.items() if k.startswith(f"{case}_")}
    pooled = case == "seq_h2"
    model = tiny(embed_dim=24, depth=1, num_heads=2, **({"class_token": False, "global_pool": "avg"} if pooled else {}))
    if pooled:
        model.fc_norm = nn.Identity()
    count = {stream: state[names[2]].shape[1] if names[2] in state else 0 for stream, names in STREAMS.items()}
    head = prunex.attach(
        model,
        "concept_transformer",
        concepts=count["global"],
        spatial=count["spatial"],
        unsupervised=count["unsupervised"],
        heads=int(case[-1]),
        query="pooled" if pooled else "class",
        explanation_weight=float(every["lambda_expl"]),
        sparsity_weight=float(every["lambda_sparsity"]),
        parity=True,
    )
    head.load_official(state)
    tokens = every["tokens"][:, 1:] if pooled else every["tokens"]
    return model, head, tokens.clone().requires_grad_(), want, every


def targets(case, every, head):
    """Concept labels of a case, for the streams that the head has."""
    concepts, spatial = every["target_global"], every["target_spatial"]
    if case == "allnan_h2":
        concepts, spatial = torch.full_like(concepts, torch.nan), torch.full_like(spatial, torch.nan)
    streams = head.head.streams
    return {"concepts": concepts if "global" in streams else None, "spatial": spatial if "spatial" in streams else None}


def replay(head, want):
    """Dropout as it was drawn."""
    for stream, (name, *_) in STREAMS.items():
        if stream in head.head.streams:
            module = head.head.streams[stream]
            module.attn_drop = Kept(want[f"keep/{name}.attn_drop"])
            module.proj_drop = Kept(want[f"keep/{name}.proj_drop"])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_scores_and_attention(case, seed):
    _, head, tokens, want, _ = attached(case, seed)
    reading = head.from_tokens(tokens)
    assert relative(reading.logits, want["scores"]) < 2e-5
    for stream, (name, mean, _) in STREAMS.items():
        if stream not in reading.attention:
            assert mean not in want or want[mean].numel() == 0
            continue
        assert relative(reading.attention[stream].mean(1), want[mean]) < 2e-5
        if f"attn_heads/{name}" in want:
            assert relative(reading.attention[stream], want[f"attn_heads/{name}"]) < 2e-5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", [*CASES, "train_h2"])
def test_losses_and_gradients(case, seed):
    model, head, tokens, want, every = attached(case, seed)
    model.train()
    for module in head.head.streams.values():
        module.attn_drop = module.proj_drop = nn.Identity()
    if case == "train_h2":
        replay(head, want)
    reading = head.from_tokens(tokens)
    if case == "train_h2":
        assert relative(reading.logits, want["scores"]) < 2e-5
        for stream, (name, mean, _) in STREAMS.items():
            if stream in reading.attention:
                assert relative(reading.dropped[stream].mean(1), want[mean]) < 2e-5
                assert relative(reading.attention[stream], want[f"attn_heads_predropout/{name}"]) < 2e-5
    task = F.cross_entropy(reading.logits, every["labels"])
    losses = head.losses(**targets(case, every, head))
    explanation, sparsity = losses.get("explanation", torch.zeros(())), losses["sparsity"]
    weights = head.options
    assert relative(task, want["loss_ce"]) < 2e-5
    assert abs(float(explanation / weights["explanation_weight"] - want["loss_expl"])) < 2e-5
    assert relative(sparsity / weights["sparsity_weight"], want["loss_sparsity"]) < 2e-5
    total = task + explanation + sparsity
    assert relative(total, want["loss_total"]) < 2e-5
    total.backward()
    assert relative(tokens.grad, want["grad_tokens"]) < 2e-5
    gradients = {name: p.grad for name, p in head.head.named_parameters()}
    theirs = {k.removeprefix("grad/"): v for k, v in want.items() if k.startswith("grad/")}
    named = head.head.official(theirs)
    assert set(named) == set(gradients)
    for name, ours in gradients.items():
        if "pool.bias" in name:  # 0 but for rounding: a softmax does not see it
            assert float(ours.abs().max()) < 1e-6
            continue
        if case == "unsup_h2" and not name.endswith("concepts") and not name.startswith("attentions.spatial"):
            continue
        assert relative(ours, named[name]) < 2e-5, name
    if case == "unsup_h2":
        # Theirs asks one attention for both: its gradient is the sum of ours.
        for name in ("q.weight", "kv.weight", "proj.weight", "proj.bias"):
            both = sum(gradients[f"attentions.{s}_concepts.{name}"] for s in ("global", "unsupervised"))
            assert relative(both, theirs[f"concept_tranformer.{name}"]) < 2e-5, name


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_functions_on_given_attention(seed):
    _, head, tokens, _, every = attached("vit_h2", seed)
    reading = head.from_tokens(tokens)
    given = {stream: every[f"lossfn_attn_{stream}"].unsqueeze(1) for stream in ("global", "spatial")}
    reading.attention = reading.dropped = given
    losses = head.head.losses(
        reading, None, every["lossfn_target_global"], every["lossfn_target_spatial"].reshape(4, 16, 6)
    )
    want = every["lossfn_expl_global"] + every["lossfn_expl_spatial"]
    assert relative(losses["explanation"] / head.options["explanation_weight"], want) < 2e-5
    assert relative(losses["sparsity"] / head.options["sparsity_weight"], every["lossfn_sparsity"]) < 2e-5
