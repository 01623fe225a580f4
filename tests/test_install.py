"""What pip makes of a clone works, wherever Python is started."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement

import prunex

ROOT = Path(__file__).parent.parent
PARTS = ("prunex", "callbacks", "recipes", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.parametrize("how", ["build_editable", "build_wheel"])
def test_python_is_started_beside_a_clone_called_prunex(tmp_path, how):
    pytest.importorskip("setuptools")
    clone, site = tmp_path / "prunex", tmp_path / "site"
    clone.mkdir()
    for part in PARTS:
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


def python(site, script, *options):
    """A Python that sees this folder of packages in front of all others."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    command = [sys.executable, *options, "-c", script]
    return subprocess.run(command, cwd=site, capture_output=True, text=True, env=environment)


@pytest.fixture
def site(tmp_path):
    """Our package as it is installed, of links."""
    package = tmp_path / "prunex"
    package.mkdir()
    for entry in [*(ROOT / "prunex").iterdir(), *(ROOT / room for room in ("callbacks", "recipes", "configs"))]:
        (package / entry.name).symlink_to(entry)
    # Python resolves the link of the file that it reads first, and ours asks where it lies.
    (package / "__init__.py").unlink()
    (package / "__init__.py").write_text((ROOT / "prunex" / "__init__.py").read_text())
    return tmp_path


def test_another_project_of_our_name_is_told_of_at_import(site):
    alone = python(site, "import prunex, prunex.errors; print(prunex.__file__)", "-W", "error")
    assert alone.stdout.strip() == str(site / "prunex" / "__init__.py"), alone.stderr
    (site / "prunex-1.0.0.dist-info").mkdir()
    beside = python(site, "import prunex.errors; print(prunex.__version__)")
    (line,) = [line for line in beside.stderr.splitlines() if "Warning" in line]
    assert "PyPI's project prunex (1.0.0), which is not prunex-vit" in line
    assert "pip uninstall prunex" in line
    assert beside.stdout  # it works all the same


@pytest.mark.parametrize("first", ["theirs", "none"])
def test_ours_without_its_first_file_says_what_happened(site, first):
    (site / "prunex" / "__init__.py").unlink()
    if first == "theirs":  # was installed last; without it: was uninstalled after ours
        (site / "prunex" / "__init__.py").write_text("__version__ = '1.0.0'\n")
    # -S: an editable install would stand in for a folder without a first file.
    for script in ("from prunex.recipes.commands.cli import main", "import prunex.errors"):
        last = python(site, script, "-S").stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: 'import prunex' gives another package than prunex-vit"), last
        assert "pip uninstall prunex" in last


@pytest.mark.slow
def test_what_is_built_is_installed_in_a_fresh_environment_and_runs(tmp_path):
    for tool in ("build", "twine"):
        pytest.importorskip(tool, reason=f"{tool} is not installed: pip install '.[release]'")
    clone, fresh = tmp_path / "clone", tmp_path / "fresh"
    clone.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, clone / part)

    def done(*command):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    # The wheel is built from the sdist, which therefore lacks nothing.
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(clone))
    built = sorted((tmp_path / "dist").iterdir())
    assert [file.suffix for file in built] == [".whl", ".gz"]
    done(sys.executable, "-m", "twine", "check", "--strict", *map(str, built))
    done(sys.executable, "-m", "venv", str(fresh))
    binaries = fresh / ("Scripts" if os.name == "nt" else "bin")
    done(str(binaries / "python"), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(built[0]))
    # What it needs is gigabytes, and is taken from where these tests have it.
    (inside,) = fresh.rglob("site-packages/prunex")
    (inside.parent / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    done(str(binaries / "prunex"), "fit", *few)
    (run,) = (tmp_path / "runs").rglob("report.html")
    assert run.stat().st_size > 10_000


@pytest.mark.slow
def test_no_dependency_has_a_known_vulnerability():
    pytest.importorskip("pip_audit", reason="pip-audit is not installed: pip install '.[release]'")
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--local"]
    ran = subprocess.run(command, capture_output=True, text=True)
    told = json.loads(ran.stdout)["dependencies"] if ran.stdout.startswith("{") else []
    audited = [entry for entry in told if "skip_reason" not in entry]
    if not audited:
        said = [entry["skip_reason"] for entry in told[:1]] or ran.stderr.strip().splitlines() or ["no answer"]
        pytest.skip(f"no database of vulnerabilities can be reached from here: {said[-1][:200]}")
    known = {f"{e['name']} {e['version']}": [v["id"] for v in e["vulns"]] for e in audited if e["vulns"]}
    assert not known


def test_whoever_cites_names_the_version_that_is_there():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["version"] == prunex.__version__
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


def test_forms_for_issues_ask_for_what_is_needed():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 2
    for form in forms:
        asked = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= set(asked)
        names = [part["id"] for part in asked["body"] if part["type"] != "markdown"]
        assert len(names) == len(set(names)) > 0
