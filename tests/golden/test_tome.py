"""ToMe against the public code: logits, groups, sizes and token streams of three schedules, and the plain function."""

import pytest
import torch

import prunex
from prunex.pruners.tome import match
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import largest, relative

pytestmark = present
both_seeds = pytest.mark.parametrize("seed", SEEDS)
SCHEDULES = {"r2": {"r": 2}, "r2_decreasing": {"r": 2, "inflect": -1.0}, "list": {"r": [3, 0, 4, 1]}}


@both_seeds
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_groups_and_sizes(seed, schedule, proportional, masked):
    model, images, _ = model_and_images(seed)
    want, run = arrays("tome", seed), f"tome_{schedule}_prop{int(proportional)}"
    with prunex.attach(model, "tome", proportional=proportional, **SCHEDULES[schedule]) as pruning, torch.no_grad():
        pruning.masked = masked
        tokens = model.forward_features(images)
        assert relative(model.forward_head(tokens), want[f"{run}_logits"]) < 2e-5
        groups, sizes = pruning.trace.groups().flatten(1), pruning._attached.handover.take(tokens).sizes
    source = want[f"{run}_source"]
    assert torch.equal(groups, source.argmax(1)[:, 1:] - 1)  # their first group is the class token
    assert torch.equal(sizes[:, : source.shape[1]], want[f"{run}_size"])
    if schedule == "r2":
        assert torch.equal(groups, want[f"{run}_group_of_patch"][:, 1:] - 1)


@both_seeds
@pytest.mark.parametrize("proportional", [False, True])
def test_the_metric_and_the_token_streams_after_every_block(seed, proportional):
    model, images, _ = model_and_images(seed)
    want, run = arrays("tome", seed), f"tome_r2_prop{int(proportional)}"
    streams, metrics = [], []
    with prunex.attach(model, "tome", r=2, proportional=proportional) as pruning, torch.no_grad():
        for i in range(6):
            after = model.norm if i == 5 else model.blocks[i + 1].norm1
            after.register_forward_pre_hook(lambda m, args: streams.append(args[0]))
        real = pruning.pruner.decide

        def watch(turn, state):
            metrics.append(state.key_mean)
            return real(turn, state)

        pruning.pruner.decide = watch
        model(images)
    assert relative(metrics[0], want[f"{run}_metric_block0"]) < 2e-5
    for i in range(6):
        assert streams[i].shape[1] == int(want[f"{run}_tokens_per_block"][i])
        assert relative(streams[i], want[f"{run}_block{i}_out"]) < 2e-5  # the order of tokens too


@both_seeds
@pytest.mark.parametrize(("run", "prefix"), [("cls0_dist0", 0), ("cls1_dist0", 1), ("cls1_dist1", 2)])
def test_the_matching_alone(seed, run, prefix):
    want = arrays("tome", seed)
    keys, values = want["tomefn_metric"], want["tomefn_values"]
    group = match(keys[:, prefix:], 4, odd=prefix == 1)
    ones = torch.zeros(4, 14 - prefix, 18 - prefix).scatter(1, group.unsqueeze(1), 1)
    sizes, merged = want[f"tomefn_{run}_size"][:, prefix:], want[f"tomefn_{run}_merged"][:, prefix:]
    found = ones @ values[:, prefix:] / ones.sum(2, keepdim=True)
    if prefix == 0:  # theirs are in the order of similarity here, ours stay in place: the same tokens either way
        order = torch.cdist(found, merged).argmin(2)
        assert torch.equal(order.sort(1).values, torch.arange(14).expand(4, -1))
        merged, sizes = merged.gather(1, order.unsqueeze(2).expand_as(merged)), sizes.gather(1, order)
    assert torch.equal(ones.sum(2), sizes)
    assert largest(found, merged) < 1e-6
    if prefix < 2:
        back = found.gather(1, group.unsqueeze(2).expand(-1, -1, 5))
        assert largest(back, want[f"tomefn_{run}_unmerged"][:, prefix:]) < 1e-6
