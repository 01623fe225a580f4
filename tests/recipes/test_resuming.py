"""An interrupted ``prunex fit`` that is continued ends as one that nothing happened to, bit for bit."""

import random

import pytest

from tests.recipes.interrupted import callback, differences, fit, write_config

MONITORS = [callback("KeptTokenMonitor", images=2, every_n_epochs=2), callback("SlimExport", formats=[])]
TOKENS = {
    "topk": {"keep_ratio": 0.7, "stages": [1, 2]},
    "evit": {"keep_ratio": 0.7, "stages": [1, 2], "options": {"shrink_length": 0.8}},
    "dynamicvit": {"keep_ratio": 0.7, "stages": [1, 2], "backbone_lr_scale": 0.5, "freeze_backbone": 0.2},
    "ia_red2": {},
    "hvt": {},
    "patch_slimming": {"options": {"calibration_images": 16}},
    "tome": {"options": {"r": 2}},
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


@pytest.mark.parametrize(("name", "at", "how"), [("dynamicvit", 60, "kill"), ("xpruner", 90, "exception")])
def test_an_interrupted_run_ends_as_a_whole_one(tmp_path, whole_runs, name, at, how):
    code, run = interrupted(tmp_path, name, f"{at} {how}")
    assert code == WAYS[how], (tmp_path / "first.log").read_text()
    assert differences(run, whole_runs(name)) == []


def points(name, count):
    """Moments of a run, spread over its hooks, and what happens there."""
    draw = random.Random(name)
    ways = list(WAYS)
    return [(draw.randrange(1, 125), ways[i % len(ways)]) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_whatever_happens_whenever(tmp_path, whole_runs, name):
    whole = whole_runs(name)
    for number, (at, how) in enumerate(points(name, 20)):
        code, run = interrupted(tmp_path / str(number), name, f"{at} {how}")
        assert WAYS[how] in (None, code), (at, how, code, (tmp_path / str(number) / "first.log").read_text())
        assert differences(run, whole) == [], (at, how)
