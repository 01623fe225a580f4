"""Two machines, as torchrun and Slurm tell of them: here both are this one, with one process each."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import prunex
from tests.recipes.commands.starting import COMMAND, environment, free_port
from tests.vits import tiny


def torchrun(node, port):
    """What is typed on each machine."""
    where = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--master-addr", "localhost"], {}, []


def slurm(node, port):
    """What srun sets on each machine; the job's name is that of a script, or Lightning takes it for a shell."""
    job = {"JOB_ID": 1, "JOB_NAME": "train", "NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2, "NODELIST": "localhost"}
    task = {"PROCID": node, "LOCALID": 0, "NODEID": node}
    variables = {f"SLURM_{name}": str(value) for name, value in (job | task).items()}
    return [sys.executable], variables | {"MASTER_PORT": str(port)}, ["--devices", "1", "--num_nodes", "2"]


def ended(tmp_path, arguments, how):
    script, port, running = tmp_path / "command.py", free_port(), []
    script.write_text(COMMAND)
    for node in (0, 1):
        before, variables, more = how(node, port)
        command = [*before, str(script), *map(str, arguments), *more, "--accelerator", "cpu"]
        with open(tmp_path / f"log-{node}.txt", "w") as log:
            running.append(
                subprocess.Popen(command, env=environment() | variables, cwd=tmp_path, stdout=log, stderr=log)
            )
    codes = [process.wait(timeout=200) for process in running]
    assert codes == [0, 0], "\n".join((tmp_path / f"log-{node}.txt").read_text()[-2000:] for node in (0, 1))


@pytest.mark.slow  # processes that import everything
@pytest.mark.parametrize("how", [torchrun, slurm])
def test_two_machines_do_as_one_does(tmp_path, how):
    model = prunex.save(tiny(), tmp_path / "slim")
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(11):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02d}.png")
    explain = ["explain", model, "--images", tmp_path / "photos", "--methods", "rollout", "--batch", "2", "--out"]
    score = ["score", model, "--data", tmp_path / "photos", "--methods", "rollout", "--metrics", "deletion", "--out"]
    one = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, [*explain, tmp_path / "one"])],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr[-2000:]
    ended(tmp_path, [*explain, tmp_path / "two"], how)
    maps, wanted = prunex.open_maps(tmp_path / "two"), prunex.open_maps(tmp_path / "one")
    assert maps.names == wanted.names
    assert np.array_equal(maps[:, "rollout"], wanted[:, "rollout"])
    ended(tmp_path, [*score, tmp_path / "scored"], how)
    with np.load(tmp_path / "scored" / "values" / "dense" / "rollout.npz") as values:
        # Scoring cuts batches of its own.
        assert np.allclose(values["maps"], wanted[:, "rollout"], atol=1e-6)
        assert values["deletion"].shape == (11,)
