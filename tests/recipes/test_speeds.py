"""What a table of speeds says of the machine that they were measured on."""

import pytest
import timm

from prunex.recipes import runs
from prunex.recipes.timing import Timing


@pytest.mark.parametrize(("rounds", "busy"), [([10.0, 10.4, 10.2, 30.0], False), ([10.0, 18.0, 31.0, 11.0], True)])
def test_a_busy_machine_is_told_of(monkeypatch, rounds, busy):
    # One slow round of four is nothing; where quartiles lie apart, no ratio is to be believed.
    monkeypatch.setattr(runs, "side_by_side", lambda calls, *_, **__: [Timing(n, rounds, rounds) for n, _ in calls])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    table = runs.compare({"dense": model, "again": model}, [], set())
    assert ("the machine was busy, so measure again: prunex bench" in table["machine"]) == busy
    assert [row["speed_ratio"] for row in table["rows"]] == [1, 1]
