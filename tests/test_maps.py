"""prunex.open_maps: rows of any shards by number, name and slice, and folders that are no such thing."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import prunex
from prunex import PrunexError, maps
from prunex.maps import write_about, write_listing, write_shard


@pytest.fixture
def folder(tmp_path):
    """Ten images of two methods, in three shards of two processes; the seventh has no map yet."""
    where = tmp_path / "out" / "maps"
    write_listing(where, [f"{n}.png" for n in range(10)], ["stamp"] * 10)
    write_about(where, {"methods": ["rollout", "tokentm"], "prunex": "0"})
    for rows in ([0, 1, 4, 5], [2, 3, 7], [8, 9]):
        write_shard(where, arrays_of(rows), {"rollout": (0.5, 2.0, len(rows))})
    return tmp_path / "out"


def arrays_of(rows):
    rows = np.array(rows)
    rollout = rows[:, None, None] + np.zeros((len(rows), 2, 3), np.float32)
    return {"index": rows, "rollout": rollout.astype(np.float32), "tokentm": -rollout, "predicted": rows * 10}


DONE = [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_rows_by_number_name_slice_and_list(folder):
    opened = prunex.open_maps(folder)
    assert opened.names == [f"{n}.png" for n in DONE]
    assert len(opened) == 9
    assert opened.methods == ["rollout", "tokentm"]
    assert opened.columns == {"rollout": (2, 3), "tokentm": (2, 3), "predicted": ()}
    assert opened[:, "predicted"].tolist() == [10 * n for n in DONE]
    assert opened[-1]["predicted"] == 90
    assert opened["7.png", "rollout"].tolist() == [[7.0] * 3] * 2
    assert set(opened["7.png"]) == {"rollout", "tokentm", "predicted"}
    assert opened[1:7:2, "predicted"].tolist() == [10, 30, 50]
    assert opened[[8, 0, 0], ["predicted", "tokentm"]]["predicted"].tolist() == [90, 0, 0]
    assert opened[["3.png", "8.png"], "tokentm"][:, 0, 0].tolist() == [-3.0, -8.0]
    assert opened[np.array([2]), "predicted"].tolist() == [20]
    assert opened[0:0, "rollout"].shape == (0, 2, 3)
    assert "7.png" in opened
    assert "6.png" not in opened
    assert list(prunex.open_maps(folder / "maps")) == opened.names


def test_all_of_it_a_part_at_a_time(folder):
    opened = prunex.open_maps(folder)
    names, values = [], []
    for some, arrays in opened.batches(4, ["predicted"]):
        assert len(some) <= 4
        names += some
        values += arrays["predicted"].tolist()
    assert (names, values) == (opened.names, [10 * n for n in DONE])


def test_only_what_is_asked_for_is_read(folder, monkeypatch):
    opened = prunex.open_maps(folder)
    read, made = [], maps.safe_open

    class Watched:
        def __init__(self, *args):
            self.file, self.name = made(*args), args[0]

        def get_slice(self, name):
            part = self.file.get_slice(name)
            return type("Slice", (), {"__getitem__": lambda _, key: read.append((name, key)) or part[key]})()

    monkeypatch.setattr(maps, "safe_open", Watched)
    opened._open.clear()
    assert opened[4, "rollout"][0, 0] == 4
    assert read == [("rollout", slice(2, 3))]


def test_an_image_that_changed_has_the_rows_it_was_given_last(folder):
    where = folder / "maps"
    write_listing(where, [*(f"{n}.png" for n in range(10)), "3.png"], ["stamp"] * 10 + ["new"])
    assert prunex.open_maps(folder).names == [f"{n}.png" for n in DONE if n != 3]
    write_shard(where, arrays_of([10]), {})
    opened = prunex.open_maps(folder)
    assert opened["3.png", "predicted"] == 100
    assert opened.names == [f"{n}.png" for n in DONE if n != 3] + ["3.png"]


def test_shards_may_be_joined_while_they_are_read(folder):
    opened, where = prunex.open_maps(folder), folder / "maps"
    opened._open.clear()
    paths = sorted(where.glob("*.safetensors"))
    parts = [load_file(path) for path in paths]
    for path in paths:
        path.unlink()
    write_shard(where, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, {})
    assert opened[:, "predicted"].tolist() == [10 * n for n in DONE]


def test_drafts_are_no_shards(folder):
    (folder / "maps" / ".draft-000000006-abc.safetensors").write_bytes(b"half")
    assert len(prunex.open_maps(folder)) == 9


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (9, "there is no image 9: there are 9, from 0"),
        (-10, "there is no image -10"),
        ("6.png", "unknown image in .*6.png"),
        (None, "None names no image: give a number, a name, a slice"),
        (True, "True names no image"),
        (1.5, "1.5 names no image"),
        ((0, "rolout"), "unknown array in .* 'rolout': did you mean 'rollout'"),
    ],
)
def test_what_is_not_there(folder, key, said):
    with pytest.raises(PrunexError, match=said):
        prunex.open_maps(folder)[key]


def test_folders_that_are_no_such_thing(folder, tmp_path):
    with pytest.raises(PrunexError, match="holds no maps of many images: give a folder that prunex explain --out"):
        prunex.open_maps(tmp_path)
    np.savez(tmp_path / "maps.npz", a=1)
    with pytest.raises(PrunexError, match="its maps.npz is read by numpy.load"):
        prunex.open_maps(tmp_path)
    about = folder / "maps" / "about.json"
    whole = json.loads(about.read_text())
    for changed, said in (
        ({**whole, "format": 99}, "has format 99 of prunex 0, and this version reads 1"),
        ({"methods": []}, "was not written by prunex explain"),
    ):
        about.write_text(json.dumps(changed))
        with pytest.raises(PrunexError, match=said):
            prunex.open_maps(folder)
    about.write_text("{")
    with pytest.raises(PrunexError, match=r"about\.json is damaged"):
        prunex.open_maps(folder)


def test_damaged_files_are_named(folder):
    where = folder / "maps"
    path = sorted(where.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    rows = arrays_of([0, 1])
    for content, said in (
        (whole[: len(whole) // 2], "is damaged: .*; remove it, and the same prunex explain makes what it held again"),
        ({**rows, "index": np.array([0, 99])}, "its rows are of no image in images.jsonl"),
        ({**rows, "rollout": rows["rollout"][:, :1]}, "other files hold"),
        ({**rows, "rollout": rows["rollout"][:1]}, "rollout has .* numbers for 2 images"),
        ({"rollout": rows["rollout"]}, "is damaged"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        with pytest.raises(PrunexError, match=said) as error:
            prunex.open_maps(folder)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    (where / "images.jsonl").write_text('{"name": "0.png", "stamp": ""}\n{"na')
    with pytest.raises(PrunexError, match=r"images\.jsonl is damaged: .*; start over with --again"):
        prunex.open_maps(folder)
