"""Models on the Hub by name, as the commands take them: from the folder that stands in for the Hub."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.recipes.commands import cli
from tests.slim.test_hub import hub  # noqa: F401  (a fixture)
from tests.vits import images, tiny

NAME = "hf-hub:me/small"


@pytest.fixture
def model(hub, tmp_path, monkeypatch):  # noqa: F811
    """A pruned model that was uploaded, and an empty place in which commands are typed."""
    pruned = tiny().eval()
    prunex.attach(pruned, "evit", keep_ratio=0.5, stages=(1, 2))
    prunex.push_to_hub(pruned, "me/small", labels=list("abcde"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return pruned


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes of images, which lies elsewhere."""
    for name in "ab":
        folder = tmp_path / "photos" / "val" / name
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.slow  # half a minute
def test_export(model, hub, tmp_path):  # noqa: F811
    assert cli.run(["export", NAME + "@v2", "--format", "pt2"]) == 0
    assert hub[1]["me/small"]["revision"] == "v2"
    assert [str(p.relative_to(tmp_path / "here")) for p in (tmp_path / "here").rglob("*.*")] == ["small/model.pt2"]
    exported, x = torch.export.load("small/model.pt2").module(), images(2)
    with torch.no_grad():
        assert torch.allclose(exported(x), model(x), atol=1e-5)
    # What lies in the Hub's cache is as it was downloaded.
    assert sorted(p.name for p in (tmp_path / "cache" / "me" / "small").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_explain(model, photos):
    assert cli.run(["explain", NAME, "--images", str(photos / "val"), "--methods", "rollout"]) == 0
    assert len(prunex.open_maps("explained/small")) == 4


@pytest.mark.slow  # half a minute
def test_bench(model, tmp_path, capsys):
    assert cli.run(["bench", NAME, "--batches", "1", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "small/bench.json"
    bench = json.loads((tmp_path / "here" / "small" / "bench.json").read_text())
    assert [row["model"] for row in bench["rows"]] == ["dense (evit taken off)", "slim: evit"]
    assert bench["rows"][1]["gmacs"] < bench["rows"][0]["gmacs"]
    assert not any("slim/" in note for note in bench["notes"])


def test_score(model, photos, capsys):
    typed = ["score", NAME, "--data", str(photos), "--methods", "rollout", "--metrics", "deletion", "--images", "2"]
    assert cli.run(typed) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "score/scores.csv"
    with pytest.raises(PrunexError, match="hf-hub:me/small brings no data: give --data DIR"):
        cli.run(["score", NAME, "--methods", "rollout"])


def test_doctor(model, capsys, tmp_path):
    for where in (NAME, str(tmp_path / "hub" / "me" / "small")):
        cli.run(["doctor", "--model", where])
        assert "attach: it is pruned already" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["explain", "bench", "score", "export"])
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["hf-hub:small"], "name='small' is not allowed: give owner/name"),
        (["hf-hub:me/small@../x"], "give owner/name"),
        (["hf-hub:me/gone"], "cannot download hf-hub:me/gone: LocalEntryNotFoundError"),
    ],
)
def test_names_that_are_none_or_nobodys(model, photos, command, typed, message, tmp_path):
    more = {"explain": ["--images", str(photos)], "score": ["--data", str(photos)]}.get(command, [])
    with pytest.raises(PrunexError, match=message):
        cli.run([command, *typed, *more])
    assert not list((tmp_path / "here").iterdir())


def test_options_of_timms_names_do_not_go_with_them(model, photos):
    with pytest.raises(
        PrunexError, match="--img-size goes with a timm model name, and hf-hub:me/small is a model on the"
    ):
        cli.run(["explain", NAME, "--images", str(photos), "--img-size", "32"])
