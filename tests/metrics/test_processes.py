"""Two processes with unequal shares of the images give what one gives."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunex.metrics import Deletion, PerturbationAUC, removal_curves
from tests.vits import images, tiny


def measured(part):
    """Both metrics over some of five images."""
    model, x = tiny().double(), images(5, dtype=torch.float64)
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    area, deletion = PerturbationAUC(removal="drop", keep=True), Deletion(keep=True)
    area.update(model, x[part], maps[part], 1)
    deletion.update(removal_curves(model, x[part], maps[part]))
    return [float(area.compute()), float(deletion.compute())], [sorted(m.values().tolist()) for m in (area, deletion)]


def process(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found, _ = measured(slice(0, 2) if rank == 0 else slice(2, 5))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes that import everything
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(process, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    wanted, _ = measured(slice(0, 5))
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == pytest.approx(wanted, abs=1e-9)
