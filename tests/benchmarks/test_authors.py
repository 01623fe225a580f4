"""The comparison with the authors' code, without any of it: refusals, and what does not run is told."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def authors(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import authors

    return authors


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give at least one checkout: --dynamicvit DIR, --evit DIR, --tome DIR"),
        (["--evit", "nowhere"], "--evit nowhere holds no evit.py: give a checkout, git clone https://github.com/"),
    ],
)
def test_what_is_no_checkout_is_refused(authors, capsys, given, said):
    with pytest.raises(SystemExit):
        authors.main(given)
    assert said in capsys.readouterr().err


def test_what_does_not_run_is_told_and_leaves_nothing(authors, capsys, tmp_path):
    (tmp_path / "utils.py").write_text("from torchprofile import profile_macs\nfrom timm.data.old import gone\n")
    (tmp_path / "evit.py").write_text("import utils\n")
    before, path = set(sys.modules), list(sys.path)
    authors.main(["--evit", str(tmp_path)])
    assert "evit: theirs does not run with torch" in (out := capsys.readouterr().out)
    assert "No module named 'timm.data.old'" in out
    assert "| evit" not in out
    assert not {"utils", "evit", "torchprofile"} & (set(sys.modules) - before)
    assert sys.path == path


def test_equal_weights_give_equal_outputs(authors, capsys, tmp_path, monkeypatch):
    """With a stand-in for theirs: timm's own model, pruned by ours, so that the difference has to be nothing."""
    (tmp_path / "tome" / "patch").mkdir(parents=True)
    (tmp_path / "tome" / "__init__.py").touch()
    (tmp_path / "tome" / "patch" / "__init__.py").touch()
    text = "import prunex\n\ndef apply_patch(model):\n    prunex.attach(model, 'tome', r=13)\n"
    (tmp_path / "tome" / "patch" / "timm.py").write_text(text)
    authors.main(["--tome", str(tmp_path), "--model", "deit_tiny_patch16_224", "--batch", "2", "--repeats", "3"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tome")]
    assert [row.split(" | ")[1] for row in rows] == ["theirs", "ours"]
    assert "100%" in rows[1]
    assert float(rows[1].split("|")[-2].split(",")[0]) < 1e-5
