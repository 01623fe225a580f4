"""An interrupted ``prunex fit`` that is continued ends as one that nothing happened to, bit for bit."""

import random

import pytest

from prunex import PrunexError
from prunex.recipes.commands.resuming import go_on
from prunex.recipes.runs import versions
from tests.recipes.interrupted import callback, differences, fit, hooks, write_config

MONITORS = [callback("KeptTokenMonitor", images=2, every_n_epochs=2), callback("SlimExport", formats=[])]
TOKENS = {
    "topk": {"keep_ratio": 0.7, "stages": [1, 2]},
    "evit": {"keep_ratio": 0.7, "stages": [1, 2], "options": {"shrink_length": 0.8}},
    "dynamicvit": {"keep_ratio": 0.7, "stages": [1, 2], "backbone_lr_scale": 0.5, "freeze_backbone": 0.2},
    "ia_red2": {},
    "hvt": {},
    "patch_slimming": {"options": {"calibration_images": 16}},
    "tome": {"options": {"r": 2}},
    "diffrate": {"keep_ratio": 0.7},
    "ppt": {"options": {"r": 2}},
}
RUNS = {
    "dense": [],
    **{name: [callback("TokenPruning", method=name, **options), *MONITORS] for name, options in TOKENS.items()},
    "xpruner": [
        callback("MaskPruning", method="xpruner", budget=0.6, masks=0.34, thresholds=0.33, threshold_lr=0.5),
        callback("UnitMonitor", images=2),
        callback("SlimExport", formats=[]),
    ],
    "taylor": [callback("MaskPruning", method="taylor", budget=0.6, start=0.4, images=16), MONITORS[1]],
    "xpruner+dynamicvit": [
        callback("TokenPruning", method="dynamicvit", budget=0.8, stages=[1, 2]),
        callback("MaskPruning", method="xpruner", budget=0.5, masks=0.34, thresholds=0.33, threshold_lr=0.5),
        *MONITORS,
    ],
    "guided": [
        callback("TokenPruning", method="evit", keep_ratio=0.7, stages=[1, 2]),
        callback("RelevancyGuidance", method="generic_attention", weight=1.0),
        callback("RelevancyMonitor", images=2, methods=["tokentm"]),
        callback("FaithfulnessMonitor", images=2),
    ],
}  # fmt: skip
WAYS = {"kill": -9, "exception": 3, "ctrl-c": None, "full disk": None}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Uninterrupted runs by name, made when first asked for."""
    made = {}

    def run(name, **data):
        key = (name, *sorted(data.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            assert fit(write_config(folder, RUNS[name], **data), log=folder / "log") == 0, (folder / "log").read_text()
            made[key] = folder / "run" / "version_0"
        return made[key]

    return run


def interrupted(folder, name, when, **data):
    config = write_config(folder, RUNS[name], **data)
    code = fit(config, when=when, log=folder / "first.log")
    more = fit(config, "--ckpt_path", "last", log=folder / "second.log")
    assert more == 0, (folder / "second.log").read_text()
    assert [p.name for p in (folder / "run").iterdir()] == ["version_0"]
    return code, folder / "run" / "version_0"


@pytest.mark.parametrize(
    ("name", "at", "how"),
    [
        ("dynamicvit", 60, "kill"),
        ("xpruner", 62, "exception"),
        ("patch_slimming", 64, "exception"),
        ("ia_red2", 31, "kill"),
    ],
)
def test_an_interrupted_run_ends_as_a_whole_one(tmp_path, whole_runs, name, at, how):
    code, run = interrupted(tmp_path, name, f"{at} {how}")
    assert code == WAYS[how], (tmp_path / "first.log").read_text()
    assert differences(run, whole_runs(name)) == []


def points(name, count, hooks):
    """Moments of a run, spread over its hooks, and what happens there."""
    draw = random.Random(name)
    ways = list(WAYS)
    return [(draw.randrange(1, hooks), ways[i % len(ways)]) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_whatever_happens_whenever(tmp_path, whole_runs, name):
    whole = whole_runs(name)
    count = hooks(whole.parents[1] / "log")
    for number, (at, how) in enumerate(points(name, 20, count)):
        code, run = interrupted(tmp_path / str(number), name, f"{at} {how}")
        assert WAYS[how] in (None, code), (at, how, code, (tmp_path / str(number) / "first.log").read_text())
        assert differences(run, whole) == [], (at, how)


class Namespace(dict):
    """A config as jsonargparse gives it: keys are attributes too."""

    __getattr__ = dict.__getitem__


def config_of(folder, logger="CSVLogger", version=None):
    logger = {
        "class_path": f"lightning.pytorch.loggers.{logger}",
        "init_args": {"save_dir": str(folder), "name": "run", "version": version},
    }
    return Namespace(trainer={"logger": logger}, ckpt_path="last")


def test_which_run_is_the_last(tmp_path):
    config = config_of(tmp_path)
    go_on(config, training=True)  # none yet
    assert config["ckpt_path"] is None
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / "run" / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "version_11").write_text("a file")
    draft = tmp_path / "run" / "version_10" / "maps" / ".draft-epoch=000-x.npz"
    draft.parent.mkdir()
    draft.write_text("half")
    config = config_of(tmp_path)
    go_on(config, training=True)  # stopped before its first checkpoint
    assert (config["ckpt_path"], config["trainer"]["logger"]["init_args"]["version"]) == (None, "version_10")
    assert not draft.exists()
    last = tmp_path / "run" / "version_10" / "checkpoints" / "last.ckpt"
    last.write_text("")
    for version, wanted in ((None, last), (10, last), ("version_10", last)):
        config = config_of(tmp_path, version=version)
        go_on(config, training=True)
        assert config["ckpt_path"] == str(wanted)
    config = config_of(tmp_path)
    go_on(config, training=False)
    assert (config["ckpt_path"], config["trainer"]["logger"]["init_args"]["version"]) == (str(last), None)


def test_folders_are_numbered_by_digits_alone(tmp_path):
    for name in ("version_2", "version_10", "version_²", "version_x", "version_"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_11").touch()
    assert [folder.name for folder in versions(tmp_path)] == ["version_10", "version_2"]
    assert versions(tmp_path / "nowhere") == []


def test_last_needs_numbered_folders_and_something_to_look_at(tmp_path):
    for logger in (True, None, [], {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {}}):
        with pytest.raises(PrunexError, match="needs a logger whose folders are numbered"):
            go_on(Namespace({"trainer": {"logger": logger}, "ckpt_path": "last"}), training=True)
    with pytest.raises(PrunexError, match="there is no run in .*run; train first"):
        go_on(config_of(tmp_path), training=False)
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    with pytest.raises(PrunexError, match="there is no .*version_0/checkpoints/last.ckpt"):
        go_on(config_of(tmp_path), training=False)


def test_a_config_of_another_model_is_refused_in_one_line(tmp_path, whole_runs):
    run = whole_runs("dynamicvit")
    config = write_config(tmp_path, RUNS["dynamicvit"])
    text = config.read_text().replace("embed_dim: 24", "embed_dim: 48")
    config.write_text(text)
    last = run / "checkpoints" / "last.ckpt"
    assert fit(config, "--ckpt_path", str(last), log=tmp_path / "log") == 2
    told = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("prunex: error:")]
    assert len(told) == 1
    assert "weights do not fit this model: model_args=" in told[0]
    assert "'embed_dim': 24" in told[0]
    assert "Traceback" not in (tmp_path / "log").read_text()
