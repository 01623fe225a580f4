"""ToMe against the public code: logits, groups, sizes and token streams of three schedules."""

import pytest
import torch

import prunex
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
        assert relative(model(images), want[f"{run}_logits"]) < 2e-5
        source, sizes = want[f"{run}_source"], pruning._attached.sizes
    groups = source.argmax(1)[:, 1:] - 1  # the class token is their first group
    assert torch.equal(pruning_groups := pruning_trace(pruning, model, images, masked, schedule, proportional), groups)
    assert pruning_groups.max() < source.shape[1]
    assert largest(sizes[:, : source.shape[1]], want[f"{run}_size"]) == 0


def pruning_trace(pruning, model, images, masked, schedule, proportional):
    """The groups of a fresh pruning of the same model."""
    with prunex.attach(model, "tome", proportional=proportional, **SCHEDULES[schedule]) as again, torch.no_grad():
        again.masked = masked
        model(images)
        return again.trace.groups().flatten(1)


@both_seeds
def test_the_metric_and_the_token_streams_after_every_block(seed):
    model, images, _ = model_and_images(seed)
    want, streams, metrics = arrays("tome", seed), [], []
    with prunex.attach(model, "tome", r=2) as pruning, torch.no_grad():
        for i in range(6):
            after = model.norm if i == 5 else model.blocks[i + 1].norm1
            after.register_forward_pre_hook(lambda m, args: streams.append(args[0]))
        real = pruning.pruner.between

        def watch(block, state):
            metrics.append(state.key_mean)
            return real(block, state)

        pruning.pruner.between = watch
        model(images)
    assert relative(metrics[0], want["tome_r2_prop1_metric_block0"]) < 2e-5
    for i in range(6):
        assert streams[i].shape[1] == int(want["tome_r2_prop1_tokens_per_block"][i])
        assert relative(streams[i], want[f"tome_r2_prop1_block{i}_out"]) < 2e-5  # the order of tokens too
