"""ViT-NeT: its definition in float64, planted prototypes, both inferences, pruned models, evidence, controls."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex.heads.final_tokens import FinalTokens
from prunex.heads.tree_modules import distances_to, numbers_of, paths_to, similarity_of
from prunex.heads.tree_routing import reach
from tests.vits import assert_same_state, images, images_for, largest, lively, relative, state_of, tiny

PRUNERS = {
    "evit": {"keep_ratio": 0.6, "stages": (1, 2)},
    "topk": {"keep_ratio": 0.6, "stages": (1, 2)},
    "tome": {"r": 3},
    "dynamicvit": {"keep_ratio": 0.6, "stages": (1, 2)},
}


def headed(family="vit", seed=0, pruner=None, **options):
    """A lively model with a tree whose branches send images both ways."""
    torch.manual_seed(seed)
    model = tiny(family, seed)
    if pruner is not None:
        prunex.attach(model, pruner, **PRUNERS[pruner])
    head = prunex.attach(model, "vit_net", **{"depth": 3, **options})
    return model, decisive(head, seed)


def decisive(head, seed=0):
    """Random weights, and prototypes as near to tokens of eight images that each branch sends half of them left."""
    module, model = head.head, head.model
    lively(module, seed)
    with torch.no_grad():
        # An untrained tree sends all images the same way: a norm's scale of 2 spreads tokens out.
        module.contexts.last.mul_(2)
        module.project.weight.mul_(2)
        reading = head.read(images_for(model, 8))
        levels = list(module.levels(reading.tokens))
        for node in (n for n in head.tree() if n.kind == "branch"):
            at = int(module.place[node.index]) - 2**node.depth + 1
            z = levels[node.depth][:, at : at + 1]
            tokens = z[node.index % 8, 0]
            if module.side == 2:
                first, gw = 1, reading.tokens.grid[1]
                near = torch.stack([tokens[first], tokens[first + 1], tokens[first + gw], tokens[first + gw + 1]])
            else:
                near = tokens[node.index % len(tokens)][None]
            near = near.T.reshape(-1, module.side, module.side)
            generator = torch.Generator().manual_seed(node.index)
            away = torch.randn(near.shape, generator=generator).to(near)
            low, high = 0.05, 4.0  # not at 0, where a rounding of 1e-7 is 1e-3 of a similarity
            for _ in range(30):
                far = (low + high) / 2
                distances = distances_to(z, (near + far * away)[None, None], reading.tokens).amin(2)
                low, high = (far, high) if float(similarity_of(distances).quantile(0.5)) > 0.5 else (low, far)
            module.prototypes[node.index] = near + far * away
    return head


def final(tokens, grid=(4, 4), counts=None):
    return FinalTokens(tokens[:, :0], tokens, counts, None, grid)


def slowly(module, tokens, scores):
    """The definition, one image and one node at a time, in float64: outputs [B, classes], and all m [B, branches]."""
    weights = {k: v.detach().double() for k, v in module.state_dict().items()}
    width, classes, side = module.slim_width, module.classes, module.side
    depth = module.depth
    edges = [p for p in paths_to(depth + 1) if p]

    def norm(x, scale, shift):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * scale + shift

    def edge(z, path):
        e = edges.index(path)
        w = {k.split(".")[1]: v for k, v in weights.items() if k.startswith("contexts.")}
        flat = {k: v.reshape(len(edges), -1)[e] for k, v in w.items()}
        score = z @ flat["attend"] + flat["attend_bias"]
        a = (score - score.max()).exp()
        a = a / a.sum()
        c = sum(a[p] * z[p] for p in range(len(z)))
        c = w["inner"][e] @ c + flat["inner_bias"]
        c = norm(c, flat["norm"], flat["norm_bias"])
        c = 0.5 * c * (1 + torch.erf(c / math.sqrt(2)))
        c = w["outer"][e] @ c + flat["outer_bias"]
        return 1 / (1 + (-norm(z + c, flat["last"], flat["last_bias"])).exp())

    def leaf(z, path, g):
        at = numbers_of(path, depth)[1]
        w = {k.split(".")[1]: v.reshape(2**depth, -1)[at] for k, v in weights.items() if k.startswith("leaves.")}
        v = torch.stack([z[:, i].max() for i in range(width)])
        return norm(
            w["predict"].reshape(classes, width) @ v + w["predict_bias"] + g, w["norm"], w["norm_bias"]
        ).softmax(0)

    def distances(z, branch):
        prototype, (gh, gw) = weights["prototypes"][branch], module.grid
        if side == 1:
            return torch.stack([(t - prototype[:, 0, 0]).norm() for t in z])
        found = []
        for row in range(gh - 1):
            for column in range(gw - 1):
                window = [z[(row + i) * gw + column + j] - prototype[:, i, j] for i in (0, 1) for j in (0, 1)]
                found.append(torch.cat(window).norm())
        return torch.stack(found)

    outputs, similarities = [], []
    for image, g in zip(tokens.double(), scores.double(), strict=True):
        seen = {}

        def walk(z, path, g=g, seen=seen):
            if len(path) == depth:
                return leaf(z, path, g)
            branch = numbers_of(path, depth)[1]
            near = distances(z, branch)
            seen[branch] = max(math.log((float(d) + 1) / (float(d) + 1e-4)) for d in near)
            m = seen[branch] if module.routing == "raw" else min(1.0, max(0.0, seen[branch]))
            return m * walk(edge(z, path + "l"), path + "l") + (1 - m) * walk(edge(z, path + "r"), path + "r")

        root = 1 / (1 + (-image @ weights["project.weight"].T).exp())
        outputs.append(walk(root, ""))
        similarities.append(torch.tensor([seen[i] for i in sorted(seen)], dtype=torch.float64))
    return torch.stack(outputs), torch.stack(similarities)


@pytest.mark.parametrize("prototype", [1, 2])
@pytest.mark.parametrize("routing", ["clamp", "raw"])
def test_as_defined(prototype, routing):
    model, head = headed(prototype=prototype, routing=routing)
    with torch.no_grad():
        head.head.prototypes[1] = 0.5  # somewhere near all tokens, so that m exceeds 1
    reading = head.read(images_for(model))
    want, similarity = slowly(head.head, reading.tokens.patches, reading.scores)
    assert relative(reading.probabilities, want) < 1e-5
    assert relative(reading.similarity, similarity) < 1e-5
    assert relative(reading.logits, (want.clamp(min=0) + 1e-12).log()) < 1e-4
    assert largest(reading.weights.sum(1), torch.ones(3)) < 1e-5
    assert largest(reading.probabilities.sum(1), torch.ones(3)) < 1e-5
    exact = copy.deepcopy(head.head).double()
    tokens = final(reading.tokens.patches.double())
    assert largest(exact(tokens, reading.scores.double()).probabilities, want) < 1e-12


def test_similarity():
    at = torch.tensor([0.0, 0.582, 1.541, 20.0, torch.inf])
    assert similarity_of(at).tolist() == pytest.approx([math.log(1e4), 1.0, 0.5, math.log(21 / 20.0001), 0], abs=1e-3)
    assert bool((similarity_of(torch.linspace(0, 30, 500)).diff() < 0).all())
    assert float(similarity_of(torch.zeros(1, dtype=torch.float64))) == pytest.approx(9.2103, abs=1e-4)


def test_a_planted_prototype_is_recognised():
    model, head = headed()
    x = images_for(model)
    tokens = head.read(x).tokens
    with torch.no_grad():
        head.head.prototypes[0] = next(head.head.levels(tokens))[1, 0, 6, :, None, None]
    reading = head.read(x)
    assert float(reading.similarity[1, 0]) == pytest.approx(math.log(1e4), abs=1e-4)
    assert int(reading.cells[1, 0]) == 6
    assert int(reading.path[1, 0]) == 0
    evidence = head.evidence(x)
    assert int(evidence.cells[1, 0]) == 6
    assert evidence.similarity_maps[1, 0].flatten().argmax() == 6
    # At a distance of 0 the square root has no slope: gradients are finite all the same.
    model.train()
    F.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_depth_one_is_the_hand_formula():
    model, head = headed(depth=1)
    reading = head.read(images_for(model))
    m = reading.similarity.clamp(0, 1)
    by_hand = m * reading.leaves[:, 0] + (1 - m) * reading.leaves[:, 1]
    assert largest(reading.probabilities, by_hand) < 1e-6
    assert float(reading.probabilities.min()) >= 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_forced_routes_agree_in_both_inferences(side):
    model, head = headed()
    x = images_for(model)
    # Far away m is next to 0; at a distance of 0 it is more than 1, which is clipped: for one image at a time.
    for i in range(len(x)):
        with torch.no_grad():
            head.head.prototypes.fill_(1e6)
            if side == "left":
                levels = list(head.head.levels(head.read(x[i : i + 1]).tokens))
                for node in head.tree():
                    if node.kind == "branch":
                        z = levels[node.depth][0, int(head.head.place[node.index]) - 2**node.depth + 1]
                        head.head.prototypes[node.index] = z[3, :, None, None]
        head.head.inference = "soft"
        soft = head.read(x[i : i + 1])
        head.head.inference = "hard"
        hard = head.read(x[i : i + 1])
        leaf = 0 if side == "left" else 7
        assert soft.leaf.tolist() == hard.leaf.tolist() == [leaf]
        assert largest(soft.probabilities, soft.leaves[:, leaf]) < 1e-5
        assert largest(hard.probabilities, soft.leaves[:, leaf]) < 1e-6


@pytest.mark.parametrize("prototype", [1, 2])
def test_hard_is_the_soft_trees_own_path(prototype):
    model, head = headed(prototype=prototype)
    x = images_for(model, 8)
    soft = head.read(x)
    assert len(set(soft.leaf.tolist())) > 1
    head.head.inference = "hard"
    hard = head.read(x)
    assert torch.equal(soft.path, hard.path)
    assert torch.equal(soft.leaf, hard.leaf)
    assert torch.equal(soft.visited, hard.visited)
    assert largest(hard.probabilities, soft.leaves[torch.arange(8), soft.leaf]) < 1e-6
    known = ~hard.similarity.isnan()
    assert known.sum(1).tolist() == [3] * 8
    assert largest(hard.similarity[known], soft.similarity[known]) < 1e-5
    assert torch.equal(hard.cells[known], soft.cells[known])
    assert bool((hard.cells[~known] == -1).all())
    assert torch.equal(hard.weights.argmax(1), hard.leaf)
    assert torch.equal(head.head.outputs(hard)["path"] @ torch.tensor([4, 2, 1]), hard.leaf)
    assert hard.leaves.isnan().all(2).sum(1).tolist() == [7] * 8
    logits = torch.cat([model(one[None]) for one in x])
    assert largest(logits, hard.logits) < 1e-5
    # Training is soft, whatever evaluation does.
    model.train()
    with torch.no_grad():
        assert largest(model(x), soft.logits) < 1e-5


def test_the_root_alone_does_not_see_who_left():
    model, head = headed()
    tokens = head.read(images_for(model, 1)).tokens.patches
    whole = head.head(final(tokens), None)
    used = set(whole.cells[0].tolist())
    rest = [i for i in range(16) if i in used]
    assert len(rest) < 16
    fewer = head.head(final(tokens[:, rest]), None)
    assert torch.equal(whole.similarity[:, 0], fewer.similarity[:, 0])
    assert largest(whole.similarity[:, 1:], fewer.similarity[:, 1:]) > 1e-6


def test_a_fresh_process_reads_the_same_tree(tmp_path):
    model, head = headed()
    x = images_for(model)
    torch.save({"state": model.state_dict(), "x": x}, tmp_path / "saved.pt")
    program = f"""
import torch, prunex
from tests.vits import tiny
saved = torch.load({str(tmp_path / "saved.pt")!r}, weights_only=True)
model = tiny("vit", 3)
prunex.attach(model, "vit_net", depth=3)
model.load_state_dict(saved["state"])
torch.set_num_threads(1)
with torch.no_grad():
    torch.save(model(saved["x"]), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), model(x))
    assert "prunex_head.vit_net.prototypes" in model.state_dict()
    assert not [name for name in model.state_dict() if name.endswith(("order", "place"))]


@pytest.mark.parametrize("inference", ["soft", "hard"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_is_removed_and_a_batch_its_images(pruner, inference):
    model, head = headed(pruner=pruner, inference=inference)
    x = images_for(model, 4)
    removed, masked = head.read(x, masked=False), head.read(x, masked=True)
    assert removed.tokens.patches.shape[1] < masked.tokens.patches.shape[1]
    assert largest(removed.probabilities, masked.probabilities) < 2e-5
    assert torch.equal(removed.path, masked.path)
    seen = ~removed.similarity.isnan()
    assert relative(masked.similarity[seen], removed.similarity[seen]) < 2e-5
    for i in range(4):
        assert largest(head.read(x[i : i + 1]).probabilities, removed.probabilities[i : i + 1]) < 2e-5
    evidence = head.evidence(x)
    assert evidence.maps.shape == (4, 4, 4)
    assert evidence.similarity_maps.shape == (4, 3, 4, 4)
    present = removed.tokens.on_patches(removed.tokens.patches)[1]
    assert torch.equal(
        ~evidence.similarity_maps.isnan(), present.unflatten(1, (4, 4)).unsqueeze(1).expand(-1, 3, -1, -1)
    )
    assert bool((evidence.cells >= 0).all())
    # A patch that was recognised is one that is there: its similarity is the largest on the map.
    at_cell = evidence.similarity_maps.flatten(2).gather(2, evidence.cells.unsqueeze(2)).squeeze(2)
    own = ~at_cell.isnan()
    assert bool(own.any())
    assert largest(at_cell[own], evidence.similarity[own]) < 1e-5
    left = evidence.steps.masked_fill(evidence.path == 1, 0).sum(1)
    assert largest(evidence.maps.sum((1, 2)), left) < 1e-5


@pytest.mark.parametrize("pruner", PRUNERS)
def test_training_beside_a_pruner(pruner):
    model, head = headed(pruner=pruner)
    x = images_for(model, 4)
    model.train()
    F.cross_entropy(model(x), torch.arange(4)).backward()
    assert head.losses() == {}
    for name, p in model.named_parameters():
        if name.startswith(("prunex_head", "head.", "blocks", "patch_embed")):
            assert p.grad is not None, name
            assert bool(torch.isfinite(p.grad).all()), name
    assert float(head.head.prototypes.grad.abs().sum()) > 0


def test_an_image_without_patches_reads_nothing():
    _, head = headed()
    tokens = torch.randn(2, 16, 48)
    counts = torch.ones(2, 16)
    counts[1] = 0
    reading = head.head(final(tokens, counts=counts), torch.zeros(2, 5))
    assert reading.similarity[1].tolist() == [0] * 7
    assert reading.leaf[1] == 7
    other = head.head(final(torch.randn(2, 16, 48), counts=counts), torch.zeros(2, 5))
    assert torch.equal(reading.probabilities[1], other.probabilities[1])
    assert bool(torch.isfinite(reading.logits).all())


def test_a_merged_token_counts_as_its_patches():
    _, head = headed()
    tokens = torch.randn(2, 3, 48)
    merged = head.head(final(tokens, counts=torch.tensor([[2.0, 1.0, 1.0]]).expand(2, -1)), None)
    apart = head.head(final(tokens[:, [0, 0, 1, 2]]), None)
    assert largest(merged.probabilities, apart.probabilities) < 1e-6


@pytest.mark.parametrize(
    "family", ["vit", "avg_pool_no_class", "dinov2_reg", "deit_distilled", "siglip", "eva02", "beit"]
)
def test_on_families(family):
    model, head = headed(family, depth=2)
    x = images_for(model)
    logits = model(x)
    assert largest(logits.exp().sum(1), torch.ones(3)) < 1e-4
    assert largest(logits, head.read(x).logits) < 1e-5
    assert largest(logits, head.from_tokens(model.forward_features(x)).logits) < 1e-5


def test_detach_gives_the_model_back():
    model = tiny()
    before, x = state_of(model), images()
    with torch.no_grad():
        want = model(x)
        head = prunex.attach(model, "vit_net", depth=2)
        assert not torch.equal(model(x), want)
        head.detach()
        assert torch.equal(model(x), want)
    assert_same_state(model, before)


def test_classifier_is_trained_along():
    model, _ = headed()
    assert all(p.requires_grad for p in model.head.parameters())
    model.train()
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    assert float(model.head.weight.grad.abs().max()) > 0


def test_raw_outputs_below_zero_have_finite_logits():
    model, head = headed(routing="raw")
    with torch.no_grad():
        head.head.prototypes.copy_(torch.full_like(head.head.prototypes, 0.5))
        head.head.contexts.last.mul_(0.05)  # all tokens near the middle: m is far above 1
    model.train()
    x = images_for(model, 8).requires_grad_()
    logits = model(x)
    head.forget()
    reading = head.read(x.detach())
    assert float(reading.probabilities.min()) < 0
    assert bool((reading.probabilities.sum(1) - 1).abs().max() < 1e-4)
    assert bool(torch.isfinite(logits).all())
    logits.sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_evidence_is_what_turning_round_would_change():
    model, head = headed()
    x = images_for(model, 6)
    for inference in ("soft", "hard"):
        head.head.inference = inference
        evidence = head.evidence(x, target=2)
        reading = head.head.soft(head.read(x).tokens, head.read(x).scores)
        for i in range(6):
            for t in range(3):
                values = []
                for way in (1.0 - float(evidence.path[i, t]), float(evidence.path[i, t])):
                    routing = reading.routing[i : i + 1].clone()
                    routing[0, evidence.visited[i, t]] = way
                    weights = reach(routing, head.head.order, head.head.depth)[-1]
                    output = (weights.unsqueeze(2) * reading.leaves[i : i + 1]).sum(1)[0, 2]
                    values.append(float((output + 1e-12).log().detach()))
                assert float(evidence.steps[i, t]) == pytest.approx(values[0] - values[1], abs=1e-4)
        row = torch.zeros(6, 16)
        for i in range(6):
            for t in range(3):
                if evidence.path[i, t] == 0:
                    row[i, evidence.cells[i, t]] += evidence.steps[i, t]
        assert largest(evidence.maps.flatten(1), row) < 1e-6
        assert torch.equal(evidence.distribution, reading.leaves[torch.arange(6), evidence.leaf])
        assert {v.shape[0] for v in evidence.info().values()} == {6}


def test_evidence_of_two_by_two_prototypes():
    model, head = headed(prototype=2)
    x = images_for(model, 6)
    evidence, reading = head.evidence(x), head.read(x)
    windows = similarity_of(reading.distances).unflatten(2, (3, 3))
    for i in range(6):
        for t in range(3):
            shown = evidence.similarity_maps[i, t]
            window = windows[i, evidence.visited[i, t]]
            for row in range(4):
                for column in range(4):
                    held = window[max(0, row - 1) : row + 1, max(0, column - 1) : column + 1]
                    assert shown[row, column] == held.max()
            assert shown.flatten()[evidence.cells[i, t]] == shown.max()
    left = evidence.steps.masked_fill(evidence.path == 1, 0).sum(1)
    assert largest(evidence.maps.sum((1, 2)), left) < 1e-5


def test_controls_say_what_decides():
    model, head = headed()
    x = images_for(model, 8)
    reading = head.read(x)
    labels = reading.probabilities.argmax(1)
    controls = head.controls(x, labels)
    assert set(controls) == {"soft", "hard", "classifier", "tree", "shuffled"}
    assert controls["soft"] == 1
    assert controls["classifier"] == float((reading.scores.argmax(1) == labels).float().mean())
    alone = head.head.soft(reading.tokens, None).probabilities
    assert controls["tree"] == float((alone.argmax(1) == labels).float().mean())
    walked = head.head.hard(reading.tokens, reading.scores).probabilities
    assert controls["hard"] == float((walked.argmax(1) == labels).float().mean())
    head.head.inference = "hard"
    assert head.controls(x, labels) == controls
    assert head.controls(x, head.read(x).probabilities.argmax(1))["hard"] == 1
    # Leaves of their own, one class each: routing is all that decides, and shuffled it is another image's.
    with torch.no_grad():
        head.head.leaves.predict.zero_()
        head.head.leaves.norm.fill_(0)
        bias = torch.zeros(8, 5)
        bias[torch.arange(8), torch.arange(8) % 5] = 50.0
        head.head.leaves.norm_bias.copy_(bias.flatten())
    head.head.inference = "soft"
    labels = head.read(x).probabilities.argmax(1)
    assert len(labels.unique()) > 1
    controls = head.controls(x, labels)
    assert controls["soft"] == controls["tree"] == 1
    assert controls["shuffled"] < 1


@pytest.mark.parametrize("inference", ["soft", "hard"])
def test_controls_walk_the_tree_once(inference):
    model, head = headed(depth=3, inference=inference)
    x = images_for(model, 8)
    reading, calls = head.read(x), []
    head.head.contexts.register_forward_hook(lambda *_: calls.append(1))
    head.head.controls(reading, torch.zeros(8, dtype=torch.long))
    assert len(calls) == (0 if inference == "soft" else 3)  # a level each


def test_controls_refuse():
    model, head = headed()
    x = images_for(model)
    for labels in (torch.zeros(2, dtype=torch.long), torch.zeros(3), [0, 1, 2], torch.tensor([0, 1, 5])):
        with pytest.raises(prunex.PrunexError, match="labels"):
            head.controls(x, labels)
    with pytest.raises(prunex.PrunexError, match="two images"):
        head.controls(x[:1], torch.zeros(1, dtype=torch.long))
    other = prunex.attach(tiny(), "concept_transformer", concepts=2)
    for ask in (lambda: other.controls(x, torch.zeros(3, dtype=torch.long)), other.tree):
        with pytest.raises(prunex.PrunexError, match="vit_net"):
            ask()


def test_the_tree_in_pre_order():
    _, head = headed(depth=2)
    nodes = head.tree()
    assert [(n.kind, n.index, n.depth, n.parent, n.side, n.children) for n in nodes] == [
        ("branch", 0, 0, None, None, (1, 4)),
        ("branch", 1, 1, 0, "left", (2, 3)),
        ("leaf", 0, 2, 1, "left", ()),
        ("leaf", 1, 2, 1, "right", ()),
        ("branch", 2, 1, 0, "right", (5, 6)),
        ("leaf", 2, 2, 4, "left", ()),
        ("leaf", 3, 2, 4, "right", ()),
    ]
    assert [n.number for n in nodes] == list(range(7))


@pytest.mark.parametrize("prototype", [1, 2])
def test_nearest_patches_are_collected(prototype):
    model, head = headed(prototype=prototype)
    x = images_for(model, 10)
    for start in (0, 4, 8, 4):  # some images come twice
        ids = list(range(start, min(10, start + 4)))
        head.head.collect(head.read(x[ids]), x[ids], ids)
    reading = head.read(x)
    for node in head.tree():
        if node.kind == "leaf":
            assert node.nearest == []
            continue
        values, order = reading.similarity[:, node.index].sort(descending=True)
        assert [n.id for n in node.nearest] == order[:3].tolist()
        assert [n.value for n in node.nearest] == pytest.approx(values[:3].tolist(), abs=1e-4)
        for n in node.nearest:
            cell = int(reading.cells[n.id, node.index])
            row, column = divmod(cell, 4 if prototype == 1 else 3)
            assert n.cell == (row, column)
            size = 8 * prototype
            assert torch.equal(n.pixels, x[n.id, :, 8 * row : 8 * row + size, 8 * column : 8 * column + size])
    again = pickle.loads(pickle.dumps(head.head.nearest))
    assert [n.id for n in again[0]] == [n.id for n in head.head.nearest[0]]
    assert not [k for k in model.state_dict() if "nearest" in k]
    # Pictures as they look, of another size, give larger cuttings.
    head.head.nearest.clear()
    head.head.collect(head.read(x), torch.zeros(10, 3, 64, 64, dtype=torch.uint8), range(10))
    assert head.tree()[0].nearest[0].pixels.shape == (3, 16 * prototype, 16 * prototype)
    with pytest.raises(prunex.PrunexError, match="one id an image"):
        head.head.collect(head.read(x), x, [1, 2])


def test_collecting_waits_for_no_device(monkeypatch):
    model, head = headed(depth=2)
    x = images_for(model, 8)
    reading = head.read(x)

    def waits(*_, **__):
        raise AssertionError("the device was waited for")

    with monkeypatch.context() as patched:
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patched.setattr(torch.Tensor, name, waits)
        for i in range(20):
            head.head.collect(reading, x, range(8 * i, 8 * i + 8))
    # Of equal ones the first to come stay, also where steps were looked at on the way.
    for i in range(20, 60):
        head.head.collect(reading, x, range(8 * i, 8 * i + 8))
    top = int(reading.similarity[:, 0].argmax())
    assert [n.id for n in head.head.nearest[0]] == [top, top + 8, top + 16]


def test_nearest_patches_of_pruned_and_hard_models():
    model, head = headed(pruner="tome", inference="hard")
    x = images_for(model, 6)
    reading = head.read(x)
    head.head.collect(reading, x, range(6))
    seen = {int(b) for b in reading.visited.flatten()}
    assert set(head.head.nearest) == seen
    groups = reading.tokens.trace.groups()
    for branch, held in head.head.nearest.items():
        for n in held:
            assert groups[n.id][n.cell] == reading.cells[n.id, branch]


@pytest.mark.parametrize("inference", ["soft", "hard"])
def test_macs_by_hand(inference):
    _, head = headed(depth=2, inference=inference)
    branches, edges, leaves, mixing = (3, 6, 4, 20) if inference == "soft" else (2, 2, 1, 0)
    context = 10 * 12 + 10 * 12 + 2 * 12 * 12
    assert head.head.macs(10) == 10 * 48 * 12 + branches * 10 * 12 + edges * context + leaves * 12 * 5 + mixing


@pytest.mark.parametrize("inference", ["soft", "hard"])
def test_bfloat16(inference):
    model, head = headed(inference=inference)
    x = images_for(model, 4)
    want = head.read(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert largest(model(x).float().exp().sum(1), torch.ones(4)) < 1e-2
        model.train()
        F.cross_entropy(model(x), torch.arange(4)).backward()
    assert bool(torch.isfinite(head.head.prototypes.grad).all())
    model.eval().bfloat16()
    reading = head.read(x.bfloat16())
    seen = ~(reading.similarity.isnan() | want.similarity.isnan())
    assert reading.similarity.dtype == torch.float32
    assert largest(reading.similarity[seen], want.similarity[seen]) < 0.1


@pytest.mark.parametrize("inference", ["soft", "hard"])
def test_exported_for_any_batch(inference):
    model, head = headed(depth=2, inference=inference)
    x = images_for(model, 5)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for batch in (1, 5):
        assert largest(program.module()(x[:batch]), model(x[:batch])) < 1e-5


def test_compiled_as_one_graph():
    _, head = headed(depth=2)
    module, g = head.head, torch.randn(3, 5)
    tokens = torch.randn(3, 16, 48)

    def scores(tokens, g):
        return module(final(tokens), g).logits

    compiled = torch.compile(scores, fullgraph=True, backend="eager")
    assert largest(compiled(tokens, g), scores(tokens, g)) < 1e-6


def test_copies_and_pickles():
    model, head = headed()
    x = images_for(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"depth": 0}, "depth=0"),
        ({"depth": 20}, "depth=20"),
        ({"depth": "4"}, "depth='4'"),
        ({"depth": True}, "depth=True"),
        ({"prototype": 3}, "prototype=3"),
        ({"prototype": "2"}, "prototype='2'"),
        ({"routing": "x"}, "routing"),
        ({"routing": None}, "routing"),
        ({"inference": "fast"}, "inference"),
        ({"dept": 2}, "depth"),
    ],
)
def test_options_are_checked(options, word):
    model = tiny()
    before = state_of(model)
    with pytest.raises(prunex.PrunexError, match=word):
        prunex.attach(model, "vit_net", **options)
    assert_same_state(model, before)


def test_models_it_is_not_for():
    with pytest.raises(prunex.PrunexError, match="two or more"):
        prunex.attach(tiny(num_classes=1), "vit_net", depth=1)
    with pytest.raises(prunex.PrunexError, match="num_classes=0"):
        prunex.attach(tiny(num_classes=0), "vit_net", depth=1)
    with pytest.raises(prunex.PrunexError, match="2 x 2 patches"):
        prunex.attach(tiny(img_size=(8, 32)), "vit_net", depth=1, prototype=2)
    with pytest.warns(UserWarning, match="two classes"):
        prunex.attach(tiny(num_classes=2), "vit_net", depth=1)


def test_two_by_two_prototypes_need_every_patch():
    model = tiny()
    prunex.attach(model, "evit", keep_ratio=0.7, stages=(1,))
    before = state_of(model)
    with pytest.raises(prunex.PrunexError, match="a token pruner"):
        prunex.attach(model, "vit_net", prototype=2, depth=1)
    assert_same_state(model, before)
    model = tiny()
    head = prunex.attach(model, "vit_net", prototype=2, depth=1)
    with pytest.raises(prunex.PrunexError, match="a token pruner"):
        prunex.attach(model, "evit", keep_ratio=0.7, stages=(1,))
    with pytest.raises(prunex.PrunexError, match="15 patch tokens for a grid of 4 x 4"):
        head.from_tokens(torch.randn(2, 16, 48))
    with pytest.raises(prunex.PrunexError, match="some were pruned"):
        head.head(final(torch.randn(2, 16, 48), counts=torch.ones(2, 16)), None)
    with pytest.raises(prunex.PrunexError, match="at least one"):
        head.head(final(torch.randn(2, 0, 48)), None)


def by_every_way(model, x):
    """Logits of images as users ask for them."""
    head = prunex.attached(model, head=True)
    yield model(x)
    yield model.forward_head(model.forward_features(x))
    yield head.from_tokens(model.forward_features(x)).logits
    tokens = model.forward_features(x)
    model.forward_features(x.transpose(2, 3))  # another grid meanwhile
    yield model.forward_head(tokens)


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (32, 32), (24, 40)])
@pytest.mark.parametrize("family", ["dynamic", "dinov3"])
def test_windows_lie_on_the_grid_that_images_have(family, size):
    model, head = headed(family, prototype=2, depth=2)
    x = images(3, size)
    reading = head.read(x)
    gh, gw = size[0] // 8, size[1] // 8
    assert reading.distances.shape == (3, 3, (gh - 1) * (gw - 1))
    with torch.no_grad():
        for logits in by_every_way(model, x):
            assert largest(logits, reading.logits) < 1e-5
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert largest(copied(x), reading.logits) < 1e-5
    head.detach()
    assert not {"forward_features", "forward_intermediates", "forward_head"} & set(vars(model))


def test_final_tokens_of_intermediates_tell_their_grid():
    model, head = headed("dynamic", prototype=2, depth=2)
    x = images(3, (16, 64))
    with torch.no_grad():
        tokens, _ = model.forward_intermediates(x)
        assert largest(model.forward_head(tokens), head.read(x).logits) < 1e-5
        assert len(model.forward_intermediates(x, intermediates_only=True)) == 4


def test_windows_of_padded_images():
    model, head = headed("dynamic", prototype=2, depth=1)
    model.patch_embed.dynamic_img_pad = True
    x = images(3, (13, 60))
    with torch.no_grad():
        assert largest(model(x), head.read(x).logits) < 1e-5
    assert head.read(x).distances.shape == (3, 1, 7)


def test_tokens_that_do_not_tell_their_grid_have_no_windows():
    _, head = headed("dynamic", prototype=2, depth=1)
    with pytest.raises(prunex.PrunexError, match="do not tell their patch grid"):
        head.from_tokens(torch.randn(2, 17, 48))
    model, head = headed("dynamic", prototype=2, depth=1)
    with pytest.raises(prunex.PrunexError, match="16 patch tokens for a grid of 1 x 16"):
        model(images(2, (8, 128)))
    _, head = headed("dynamic", depth=1)
    reading = head.from_tokens(torch.randn(2, 17, 48))
    with pytest.raises(prunex.PrunexError, match="do not tell their patch grid"):
        head.head.collect(reading, images(2), [0, 1])


def test_a_compiled_model_knows_the_grid():
    model, head = headed("dynamic", prototype=2, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((16, 64), (64, 16)):
        x = images(2, size)
        with torch.no_grad():
            assert largest(compiled(x), head.read(x).logits) < 1e-5


def test_prototypes_on_a_grid_that_is_not_square():
    model, head = headed("not_square", prototype=2, depth=2)
    x = images_for(model)
    reading = head.read(x)
    want, _ = slowly(head.head, reading.tokens.patches, reading.scores)
    assert relative(reading.probabilities, want) < 1e-5
    assert head.evidence(x).similarity_maps.shape == (3, 2, 5, 3)
