"""Commands of prunex in processes of their own, one or several, which can be killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
COMMAND = "from prunex.recipes.commands.cli import main\nif __name__ == '__main__':\n    main()\n"


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def started(tmp_path, *arguments, processes=None):
    """A command in a process of its own, or in several that torchrun starts."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    before = [sys.executable]
    if processes:
        before = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*before, str(script), *map(str, arguments), "--device", "cpu"]
    with open(tmp_path / "log.txt", "w") as log:
        return subprocess.Popen(
            command, env=environment(), cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )


def ended(tmp_path, *arguments, processes=None):
    code = started(tmp_path, *arguments, processes=processes).wait(timeout=400)
    log = (tmp_path / "log.txt").read_text()
    assert code == 0, log[-3000:]
    return log


def killed(tmp_path, process, ready):
    """Kill a process and all that it started, once something is ready."""
    while not ready() and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(1000):  # until no process of the group is left
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
