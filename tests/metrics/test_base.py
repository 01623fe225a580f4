"""The mean over images in several processes, and what a metric is registered as."""

import copy
import inspect
import math
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

import prunex
import prunex.metrics
from prunex.metrics import (
    EnergyInMask,
    EqualAreaIoU,
    ForegroundAUC,
    ForegroundF1,
    KeptAUC,
    MassKept,
    MeanIoU,
    MeanOverImages,
    PixelAccuracy,
    PointingGame,
    RankAccuracy,
    RankBiasedOverlap,
    TopKOverlap,
)


def data():
    generator = torch.Generator().manual_seed(4)
    maps = torch.randn(7, 5, 6, generator=generator)
    masks = torch.rand(7, 5, 6, generator=generator) < 0.4
    masks[2] = False
    return maps, masks


def filled(parts):
    maps, masks = data()
    made = [RankAccuracy(keep=True), EqualAreaIoU(), PixelAccuracy(), MeanIoU()]
    for part in parts:
        for metric in made:
            given = (masks, maps) if isinstance(metric, EqualAreaIoU) else (maps, masks)
            metric.update(*(t[part] for t in given))
    return made


def _process(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    made = filled([slice(0, 3)] if rank == 0 else [slice(3, 4), slice(4, 7)])
    found = [m.compute() for m in made]
    with made[0].sync_context():
        found += [made[0].count.clone(), made[0].undefined.clone(), made[0].values().clone()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_process, (port, str(tmp_path)), nprocs=2)
    whole = filled([slice(0, 7)])
    wanted = [m.compute() for m in whole] + [whole[0].count, whole[0].undefined, whole[0].values()]
    for rank in (0, 1):
        for a, b in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), wanted, strict=True):
            assert torch.allclose(a, b, equal_nan=True)


def test_sums_of_processes_add_up():
    whole, first, second = (filled([p]) for p in (slice(0, 7), slice(0, 3), slice(3, 7)))
    for all_of_it, one, other in zip(whole, first, second, strict=True):
        if not hasattr(one, "merge_state"):
            pytest.skip("this torchmetrics has no merge_state")
        one.merge_state(other)
        assert torch.allclose(one.compute(), all_of_it.compute())
        assert one.undefined == all_of_it.undefined


def test_several_numbers_an_image():
    class Two(MeanOverImages):
        def measure(self, values):
            return values

    metric = Two(keep=True, shape=(2,))
    assert metric.values().shape == (0, 2)
    metric.update(torch.tensor([[1.0, math.nan], [3.0, math.nan]]))
    assert metric.compute().tolist() == [2.0, pytest.approx(math.nan, nan_ok=True)]
    assert (metric.count.tolist(), metric.undefined.tolist()) == ([2, 0], [0, 2])
    assert metric.values().shape == (2, 2)
    metric.update(torch.tensor([[-math.inf, 1.0]]))
    assert metric.compute().tolist() == [-math.inf, 1.0]  # infinite is a number, and no very large finite one


def test_forward_gives_the_batch_and_keeps_the_sum():
    maps, masks = data()
    metric = RankAccuracy()
    first = metric(maps[:3], masks[:3])
    metric(maps[3:], masks[3:])
    assert first == RankAccuracy()(maps[:3], masks[:3])
    assert torch.allclose(metric.compute(), filled([slice(0, 7)])[0].compute())


def test_every_metric_is_registered_and_exported():
    for found in prunex.methods("metric"):
        assert getattr(prunex.metrics, found.name) is found.make
    for name in prunex.metrics.__all__:
        assert hasattr(prunex.metrics, name)


@pytest.mark.parametrize("first", ["nothing kept", "no object", "all hit"])
def test_metrics_of_a_collection_stay_apart(first):
    """Equal states after the first batch are no reason to go on with one of the metrics alone."""
    maps, masks = data()
    if first == "nothing kept":
        made, start = [EqualAreaIoU, KeptAUC, MassKept, TopKOverlap], (torch.ones_like(masks), maps)
        rest = (masks, maps)
    else:
        made = [RankAccuracy, ForegroundAUC, ForegroundF1, EnergyInMask, PointingGame]
        start, rest = (maps, torch.zeros_like(masks)), (maps, masks)
    if first == "all hit":
        made, start = [RankAccuracy, ForegroundAUC, PointingGame], (masks.float(), masks)
    together = MetricCollection([m() for m in made])
    together.update(*start)
    together.update(*rest)
    found = together.compute()
    for m in made:
        alone = m()
        alone.update(*start)
        alone.update(*rest)
        assert torch.allclose(found[m.__name__], alone.compute(), equal_nan=True), m.__name__


def test_a_process_that_saw_nothing_sends_nothing_of_the_right_kind():
    """What is gathered has the dtype and the shape that other processes send, or collectives would not match."""

    class Two(MeanOverImages):
        def measure(self, values):
            return values

    other = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    sent = []

    def gather(tensor, group=None):
        sent.append(tensor)
        return [tensor, other if tensor.shape == (0, 2) else tensor + 1]

    metric = Two(keep=True, shape=(2,))
    metric._sync_dist(dist_sync_fn=gather)
    assert [t.dtype for t in sent if t.shape == (0, 2)] == [torch.float64]
    assert metric.values().equal(other)


def test_generated_classes_are_pickled_copied_and_told():
    maps, masks = data()
    metric = PointingGame(1.5, keep=True)
    metric.update(maps, masks)
    for again in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        assert isinstance(again, PointingGame)
        assert (again.tolerance, again.keep, type(again)) == (1.5, True, PointingGame)
        assert torch.equal(again.compute(), metric.compute())
        again.update(maps, masks)
        assert int(again.count) == 2 * int(metric.count)
    for made in (PointingGame, EqualAreaIoU):
        assert getattr(prunex.metrics, made.__name__) is made
        assert made.__doc__.startswith(f"Mean over images of :func:`{made.function.__name__}`. ")
        assert ">>>" not in made.__doc__
    assert list(inspect.signature(RankBiasedOverlap).parameters) == ["judge", "persistence", "keep", "kwargs"]
    with pytest.raises(TypeError, match="too many"):
        PointingGame(1, True, 2)
    with pytest.raises(prunex.PrunexError, match="unknown option of PointingGame 'tolerence': did you mean"):
        PointingGame(tolerence=2)
