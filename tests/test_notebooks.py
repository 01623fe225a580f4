"""The notebooks: what is stored is of no machine, and each, run anew, shows what its prose claims."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook):
    """All that cells have written, as one text."""
    outputs = [output for cell in code(notebook) for output in cell["outputs"]]
    return "\n".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def pictures(notebook):
    data = [output.get("data", {}) for cell in code(notebook) for output in cell["outputs"]]
    return [each["image/png"] for each in data if "image/png" in each]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_whole_and_of_no_machine(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [(o["output_type"], o.get("name")) for cell in cells for o in cell["outputs"]]
    assert kinds
    assert not {("error", None), ("stream", "stderr")} & set(kinds)
    assert all(not cell["metadata"] for cell in notebook["cells"])
    assert not re.search(r"(?<![\w.:/<])/(?:tmp|home|root|usr|opt|var|work|mnt|Users)/", json.dumps(cells))
    assert path.stat().st_size < 1_500_000
    # Readers of the text alone see what a cell is for.
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_notebooks_lead_somewhere(path):
    text = "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
    for link in re.findall(r"\]\(([^)]+\.ipynb)\)", text):
        assert (path.parent / link).is_file()
    for page in re.findall(r"`(docs/\w+\.md)`", text):
        assert (ROOT / page).is_file()


def test_no_photo_of_the_solar_cells_is_stored():
    """Their licence allows no commercial use: what is stored is drawn from one brightness a patch."""
    notebook = json.loads((ROOT / "notebooks" / "solar_cells.ipynb").read_text(encoding="utf-8"))
    assert "PHOTOS = False" in "".join("".join(cell["source"]) for cell in code(notebook))
    assert "CC BY-NC-SA 4.0" in "".join("".join(cell["source"]) for cell in notebook["cells"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A notebook with the outputs of now."""
    for package in ("nbclient", "ipykernel"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'prunex-vit[notebooks]'")
    folder = tmp_path_factory.mktemp("notebooks")

    def execute(name):
        command = [sys.executable, str(ROOT / "docs" / "run_notebooks.py"), "--out", str(folder), name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]
        notebook = json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))
        return notebook, printed(notebook)

    return execute


def number(text, pattern):
    """The number that a line of the output has in the place of the group."""
    match = re.search(pattern, text)
    assert match, f"{pattern} is not in\n{text}"
    return float(match.group(1))


@pytest.mark.slow
def test_a_first_pruned_model_keeps_the_digits_at_two_thirds_of_the_cost(run):
    notebook, text = run("01_first_pruned_model")
    assert number(text, r"multiply-adds: ([\d.]+) of the dense") < 0.7
    assert number(text, r"accuracy: ([+-][\d.]+) points") > -4
    assert number(text, r"of the digits' patches left at the end: (\d+)%") > 85
    assert "same answers: True" in text
    assert number(text, r"after detach: ([\d.]+) million") == number(text, r"dense: .* ([\d.]+) million")
    assert len(pictures(notebook)) == 1


@pytest.mark.slow
def test_maps_lie_on_the_digit(run):
    notebook, text = run("02_what_does_it_look_at")
    chance = number(text, r"says nothing +(\d+)%")
    assert number(text, r"tokentm +(\d+)%") > 2 * chance
    mass, kept = (number(text, f"on patches that EViT keeps: {p}") for p in (r"(\d+)%", r"\d+%, by chance (\d+)%"))
    assert mass > 1.5 * kept
    assert len(pictures(notebook)) == 3


@pytest.mark.slow
def test_what_is_made_up_for_comes_back(run):
    notebook, text = run("03_slimming_and_heads")
    dense, out, made_up = (
        number(text, pattern + r" +([\d.]+)% right") for pattern in ("dense:", "half taken out", "and made up for")
    )
    assert out < made_up <= dense + 1
    assert number(text, r"X-Pruner: .* at ([\d.]+) of the multiply-adds") < 0.62
    assert len(re.findall(r"block \d head \d \([+-]", text)) == 9


@pytest.mark.slow
def test_explanations_are_better_than_chance(run):
    notebook, text = run("04_scoring_explanations")
    rows = dict(re.findall(r"(?m)^(\w+) +[\d.]+ +\(([\d.]+ to [\d.]+)\)", text))
    random = float(rows.pop("random").split(" to ")[0])
    assert set(rows) == {"rollout", "generic_attention", "tokentm", "lrp"}
    assert all(float(interval.split(" to ")[1]) < random for interval in rows.values())
    alike = [abs(float(value)) for value in re.findall(r"random weights: ([+-][\d.]+)", text)]
    assert len(alike) == 4
    assert max(alike) < 0.5
    assert len(pictures(notebook)) == 1


@pytest.mark.slow
def test_the_service_answers_as_the_model_does(run):
    notebook, text = run("05_onnx_service")
    assert number(text, r"largest difference to torch: (\S+);") < 1e-3
    assert number(text, r"right: ([\d.]+)%") > 85
    whole, small = (number(text, p) for p in (r"([\d.]+) MB, in int8", r"in int8 ([\d.]+) MB"))
    assert small < whole
    assert number(text, r"same class for ([\d.]+)%") > 90
    assert len(pictures(notebook)) == 1
