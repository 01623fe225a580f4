"""What a forward hands on to its pooling belongs to its tokens: among threads, views and copies."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import prunex
from tests.vits import images, largest, randomise, tiny

CASES = {
    "tome, average": ("tome", {"r": 3}, {"global_pool": "avg"}, "vit"),
    "tome, maximum": ("tome", {"r": 3}, {"global_pool": "max"}, "vit"),
    "tome, class token": ("tome", {"r": 3}, {}, "vit"),
    "masked dynamicvit": ("dynamicvit", {"keep_ratio": 0.5}, {"global_pool": "avg"}, "vit"),
    "adaptive dynamicvit": ("dynamicvit", {"keep_ratio": 0.5, "count": "adaptive"}, {"global_pool": "avg"}, "vit"),
    "attention pooling": ("tome", {"r": 3}, {}, "siglip"),
    "diffrate, average": ("diffrate", {"keep_ratio": 0.7}, {"global_pool": "avg"}, "vit"),
    "prune or pool": ("ppt", {"r": 3, "tau": 0.01}, {"global_pool": "avg"}, "vit"),
    "beit": ("tome", {"r": 3}, {"global_pool": "avg"}, "beit"),
}


def pruned(case):
    method, options, more, family = CASES[case]
    model = tiny(family, **more).eval()
    pruning = prunex.attach(model, method, **options)
    randomise(pruning.pruner)
    if case.startswith("masked"):
        pruning.masked = True
    return model, pruning


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_threads_share_a_model(case, changed):
    """Batches of several sizes, whole forwards or in two parts, whose tokens may be changed in between."""
    model, _ = pruned(case)
    batches = [images(n, seed=n) for n in (1, 4, 2, 3, 2)] * 12

    @torch.no_grad()
    def run(x):
        tokens = model.forward_features(x)
        return model.forward_head(tokens * 1 if changed else tokens)

    wanted = [run(x) for x in batches[:5]] * 12
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, batches))
    assert max(largest(a, b) for a, b in zip(results, wanted, strict=True)) < 1e-5


@pytest.mark.parametrize("case", ["tome, average", "adaptive dynamicvit", "attention pooling"])
def test_tokens_are_pooled_later_and_in_any_order(case):
    model, _ = pruned(case)
    with torch.no_grad():
        wanted = [model(images(2, seed=s)) for s in range(3)]
        tokens = [model.forward_features(images(2, seed=s)) for s in range(3)]
        for s in (1, 2, 0):
            assert largest(model.forward_head(tokens[s]), wanted[s]) < 1e-6


def test_copies_start_without_forwards():
    model, pruning = pruned("tome, average")
    x = images(2)
    wanted = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert largest(copied(x), wanted) < 1e-6
    assert largest(model.forward_head(model.forward_features(x)), wanted) < 1e-6
    del x, wanted
    assert len(pruning._attached.handover._known) == 0
