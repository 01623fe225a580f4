"""Hostile cases of every kind end in success or in one line; ``python -m tests.hostile.fuzz`` tries more."""

import pytest

from tests.hostile import fuzz
from tests.hostile.kinds import KINDS, one
from tests.hostile.room import Broken, Canary, Room

QUICK = {
    "traces": 200, "images": 100, "masks": 40, "slims": 40, "options": 12, "checkpoints": 20, "npz": 10, "commands": 16,
    "explainers": 8, "weights": 8, "reports": 5, "configs": 5,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_some_cases_of_each_kind(room, kind):
    ended = [one(kind, 2, number, room) for number in range(QUICK[kind])]
    assert len(ended) == QUICK[kind]  # none raised Broken
    if kind not in ("npz", "reports"):  # the report leaves out what it cannot read
        assert not all(ended)


@pytest.mark.slow
def test_ten_thousand_cases(capsys):
    assert fuzz.main(["--count", "10000", "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("PrunexError,   0 otherwise") == len(KINDS)


def test_what_ends_otherwise_is_told_and_can_be_tried_again(monkeypatch, capsys):
    def broken(rng, room):
        if rng.random() < 0.5:
            raise ZeroDivisionError("by chance")

    monkeypatch.setitem(KINDS, "traces", (broken, 1))
    assert fuzz.main(["--count", "6", "--only", "traces"]) == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError: by chance" in out
    number = out.split("--start ")[1].split()[0]
    assert fuzz.main(["--count", "1", "--only", "traces", "--start", number]) == 1


def test_the_judge_sees_code_that_ran_drafts_and_files_elsewhere(tmp_path):
    room = Room(tmp_path / "room")
    for case, says in (
        (lambda: (room.work / ".x.png.a1").write_text(""), "drafts were left"),
        (lambda: (room.root / "elsewhere").write_text(""), "outside"),
        (lambda: Canary(room.canary).__reduce__()[0](str(room.canary)), "code from data was run"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ):
        room.fresh()
        with pytest.raises(Broken, match=says):
            room.judge(case)
        (room.root / "elsewhere").unlink(missing_ok=True)
