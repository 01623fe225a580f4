"""What pip makes of a clone works, wherever Python is started."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("how", ["build_editable", "build_wheel"])
def test_python_is_started_beside_a_clone_called_prunex(tmp_path, how):
    pytest.importorskip("setuptools")
    clone, site = tmp_path / "prunex", tmp_path / "site"
    clone.mkdir()
    for part in ("prunex", "callbacks", "recipes", "configs", "pyproject.toml", "README.md", "LICENSE"):
        (clone / part).symlink_to(ROOT / part)
    build = f"from setuptools import build_meta; print(build_meta.{how}({str(tmp_path)!r}))"
    built = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True, check=True)
    with ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    # addsitedir reads .pth files, as Python does with site-packages when it starts.
    script = f"import site; site.addsitedir({str(site)!r}); import prunex.callbacks; print(prunex.attach.__name__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert found.stdout == "attach\n", found.stderr


def test_a_wheel_has_every_room():
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    inside = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "prunex").rglob("__init__.py")}
    beside = (init for room in ("callbacks", "recipes", "configs") for init in (ROOT / room).rglob("__init__.py"))
    assert listed == inside | {".".join(("prunex", *init.parent.relative_to(ROOT).parts)) for init in beside}


def test_releases_of_lightning_that_an_attacker_published_are_left_out():
    with open(ROOT / "pyproject.toml", "rb") as file:
        needed = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
    allowed = next(r.specifier for r in needed if r.name == "lightning")
    assert [v for v in ("2.5.0", "2.6.1", "2.6.2", "2.6.3", "2.6.6") if v in allowed] == ["2.5.0", "2.6.1", "2.6.6"]
