"""ViT-NeT against the public code: tokens of all nodes, distances, leaves, both outputs, losses, every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunex
from prunex.heads.final_tokens import FinalTokens
from prunex.heads.tree_modules import EDGE, LEAF, numbers_of, official_node, paths_to
from tests.explainers.reference import SEEDS, arrays, present
from tests.vits import largest, relative, tiny

pytestmark = present
CASES = ["d2p1", "d2p2", "d3p1", "d3p2"]
RAW = ["raw_d2p1", "raw_d2p2"]


def attached(case, seed, **options):
    """A head with a case's weights, tokens and classifier scores as leaves, the case's arrays, and all of the file."""
    every = arrays("vit_net", seed)
    state = {k.removeprefix(f"{case}_sd/"): v for k, v in every.items() if k.startswith(f"{case}_sd/")}
    want = {k.removeprefix(f"{case}_"): v for k, v in every.items() if k.startswith(f"{case}_")}
    model = tiny("avg_pool_no_class", depth=1)
    model.fc_norm = nn.Identity()
    with torch.no_grad():
        model.head.weight.copy_(every["head/weight"])
        model.head.bias.copy_(every["head/bias"])
    shape = {"depth": int(case[-3]), "prototype": int(case[-1])}
    head = prunex.attach(model, "vit_net", **shape, routing="raw" if case in RAW else "clamp", **options)
    head.load_official(state)
    tokens, g = (every[name].clone().requires_grad_() for name in ("tokens", "g"))
    return head, tokens, g, want, every


def final(tokens):
    return FinalTokens(tokens[:, :0], tokens, None, None, (4, 4))


def tolerance(case, gradients=False):
    """What is left to rounding: small distances cancel in the reference's convolutions."""
    if case in RAW:
        return 1e-3 if gradients else 1e-4
    return 1e-4 if gradients else 2e-5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES + RAW)
def test_nodes_and_outputs(case, seed):
    head, tokens, g, want, _ = attached(case, seed)
    near = tolerance(case)
    reading = head.head(final(tokens), g)
    depth = head.head.depth
    for level, z in enumerate(head.head.levels(final(tokens))):
        for place, path in enumerate(p for p in paths_to(depth + 1) if len(p) == level):
            assert relative(z[:, place], want["node_tokens"][:, numbers_of(path, depth)[0]]) < 2e-5, path
    assert relative(reading.distances, want["dist"].flatten(2)) < near
    assert relative(reading.similarity, want["sim_max"]) < near
    assert torch.equal(reading.cells, want["argmax_cell"])
    assert relative(reading.leaves, want["leaf_q"]) < 2e-5
    assert relative(reading.probabilities, want["soft"]) < near
    assert torch.equal(reading.path, want["hard_path"])
    assert torch.equal(reading.leaf, want["hard_leaf"])
    assert largest(reading.probabilities.sum(1), torch.ones(4)) < 1e-5
    if case in RAW:
        assert float(want["soft"].min()) < -0.001 < 1.2 < float(want["sim_max"].max())
    nodes = head.tree()
    assert [n.number for n in nodes if n.kind == "branch"] == want["branch_node"].tolist()
    assert [n.number for n in nodes if n.kind == "leaf"] == want["leaf_node"].tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES + RAW)
def test_hard_inference(case, seed):
    head, tokens, g, want, _ = attached(case, seed, inference="hard")
    reading = head.head(final(tokens), g)
    assert relative(reading.probabilities, want["hard"]) < 2e-5
    assert relative(reading.logits, (want["hard"] + 1e-12).log()) < 2e-5
    assert torch.equal(reading.path, want["hard_path"])
    assert torch.equal(reading.leaf, want["hard_leaf"])
    at = reading.visited
    assert relative(reading.similarity.gather(1, at), want["sim_max"].gather(1, at)) < tolerance(case)
    assert torch.equal(reading.cells.gather(1, at), want["argmax_cell"].gather(1, at))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_the_backbones_scores_take_part(case, seed):
    head, tokens, _, want, every = attached(case, seed)
    reading = head.from_tokens(tokens)
    assert relative(reading.scores, every["g"]) < 2e-5
    assert relative(reading.probabilities, want["soft"]) < 2e-5
    assert largest(F.cross_entropy(reading.logits, every["labels"]), want["loss_eval"]) < 2e-5


def losses(case, reading, want, every):
    """The reference's scalar of a case by the name of its gradients, and what it should be."""
    if case in RAW:
        return {"probe": ((reading.probabilities * want["probe"]).sum(), (want["soft"] * want["probe"]).sum())}
    smooth = F.cross_entropy(reading.logits, every["labels"], label_smoothing=0.1)
    soft = F.cross_entropy(reading.logits, every["soft_targets"])
    return {"smooth": (smooth, want["loss_smooth"]), "soft": (soft, want["loss_soft"])}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES + RAW)
def test_losses_and_gradients(case, seed):
    head, tokens, g, want, every = attached(case, seed)
    head.model.train()
    near = tolerance(case, gradients=True)
    for name in losses(case, head.head(final(tokens), g), want, every):
        for leaf in (tokens, g, *head.head.parameters()):
            leaf.grad = None
        loss, wanted = losses(case, head.head(final(tokens), g), want, every)[name]
        assert largest(loss, wanted) < tolerance(case)
        loss.backward()
        assert relative(tokens.grad, want[f"grad_{name}_tokens"]) < near
        assert relative(g.grad, want[f"grad_{name}_g"]) < near
        theirs = {k.removeprefix(f"grad_{name}/"): v for k, v in want.items() if k.startswith(f"grad_{name}/")}
        ours = by_their_names(head.head, {n: p.grad for n, p in head.head.named_parameters()})
        assert set(ours) == set(theirs)
        for parameter, gradient in theirs.items():
            if parameter.endswith("cm.bias"):  # 0 but for rounding: a softmax does not see it
                assert float(ours[parameter].abs().max()) < 1e-6
                continue
            assert relative(ours[parameter], gradient) < near, parameter


def by_their_names(head, values):
    """What is one tensor here, apart again: each edge's and leaf's own is compared by its own size."""
    named = {"attrib_pvec": values["prototypes"], "add_on.0.weight": values["project.weight"]}
    for path in paths_to(head.depth + 1):
        if path:
            level, place = len(path), int(path.replace("l", "0").replace("r", "1"), 2)
            edge = 2**level - 2 + place
            for ours, theirs in EDGE.items():
                row = values[f"contexts.{ours}"].reshape(2 ** (head.depth + 1) - 2, -1)[edge]
                shape = {"cm.weight": (1, -1), "wv1.weight": (12, 12), "wv2.weight": (12, 12)}.get(theirs, (-1,))
                named[f"{official_node(path[:-1])}.gcb_{path[-1]}.{theirs}"] = row.reshape(shape)
        if len(path) == head.depth:
            for ours, theirs in LEAF.items():
                row = values[f"leaves.{ours}"].reshape(2**head.depth, -1)[place]
                named[f"{official_node(path)}.{theirs}"] = row.reshape(5, 12) if theirs == "pred.weight" else row
    return named


def test_a_missing_entry_is_named():
    head, *_ = attached("d2p1", 0)
    state = {k.removeprefix("d2p1_sd/"): v for k, v in arrays("vit_net", 0).items() if k.startswith("d2p1_sd/")}
    before = {k: v.clone() for k, v in head.head.state_dict().items()}
    state.pop("_root.l.gcb_r.wv1.weight")
    with pytest.raises(prunex.PrunexError, match="contexts.inner"):
        head.load_official(state)
    with pytest.raises(prunex.PrunexError, match="of other shapes"):
        attached("d2p1", 0)[0].load_official(
            {k.removeprefix("d2p2_sd/"): v for k, v in arrays("vit_net", 0).items() if k.startswith("d2p2_sd/")}
        )
    assert all(torch.equal(v, before[k]) for k, v in head.head.state_dict().items())
