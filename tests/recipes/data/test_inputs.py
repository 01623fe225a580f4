"""Images to be explained from lists, tables, tar files and saved datasets: the same as from a folder, or refused."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.recipes.commands import cli
from prunex.recipes.data.inputs import open_inputs
from tests.vits import tiny

NONE = Path("nowhere")
LABELS = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(folder / name)
    return folder


def tar_of(path, members):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pixels(inputs):
    return [np.asarray(inputs.read(n, None)).tolist() for n in range(len(inputs))]


def test_lists_tables_and_tar_files_hold_what_a_folder_holds(photos, tmp_path):
    whole = open_inputs(str(photos), NONE)
    assert whole.names == ["a.png", "b.png", "sub/c.png"]
    wanted = pixels(whole)
    (photos / "list.txt").write_text(f"a.png\n\n{photos / 'b.png'}\nsub/../sub/c.png\n")
    (photos / "table.csv").write_text("label,path,more\n2,a.png,x\nbee,b.png,\n 0 ,sub/c.png,y\n")
    (tmp_path / "elsewhere.csv").write_text(f"image\n{photos}/a.png\n{photos}/b.png\nphotos/sub/c.png\n")
    files = {name: (photos / name).read_bytes() for name in whole.names}
    tar_of(photos / "x-00.tar", {"a.png": files["a.png"], "a.cls": b"2", "b.png": files["b.png"], "b.cls": b"bee"})
    tar_of(photos / "x-01.tar", {"./sub/c.png": files["sub/c.png"], "./sub/c.cls": b"0\n", "c.json": b"{}"})
    found = {name: open_inputs(str(photos / name), NONE) for name in ("list.txt", "table.csv", "x-{00..01}.tar")}
    for inputs in found.values():
        assert pixels(inputs) == wanted
        assert len(set(inputs.stamps())) == 3
    assert found["list.txt"].names == found["table.csv"].names == whole.names
    assert found["list.txt"].stamps() == found["table.csv"].stamps() == whole.stamps()
    assert found["list.txt"].labels is None
    assert found["table.csv"].labels == found["x-{00..01}.tar"].labels == [2, "bee", 0]
    assert found["x-{00..01}.tar"].names == ["x-00/a.png", "x-00/b.png", "x-01/sub/c.png"]
    elsewhere = open_inputs(str(tmp_path / "elsewhere.csv"), NONE)
    assert pixels(elsewhere) == wanted
    assert elsewhere.names == ["photos/a.png", "photos/b.png", "photos/sub/c.png"]
    away = tmp_path / "away"
    away.mkdir()
    (away / "list.txt").write_text(str(photos / "a.png"))
    assert open_inputs(str(away / "list.txt"), NONE).names == [str(photos / "a.png").lstrip("/")]
    (away / "x-00.tar").write_bytes((photos / "x-00.tar").read_bytes())
    assert open_inputs(str(away), NONE).names == ["x-00/a.png", "x-00/b.png"]
    with pytest.raises(PrunexError, match="holds both images and tar files: give a folder of one kind"):
        open_inputs(str(photos), NONE)


def test_images_of_16_bits_in_a_tar_file(tmp_path):
    deep = np.full((4, 4), 1000, np.uint16)
    deep[0] = 4095
    Image.fromarray(deep).save(tmp_path / "deep.png")
    inputs = open_inputs(str(tar_of(tmp_path / "x.tar", {"deep.png": (tmp_path / "deep.png").read_bytes()})), NONE)
    assert inputs.choose_range([0], 1, None) == 4095
    alone = open_inputs(str(tmp_path / "deep.png"), NONE)
    assert np.array_equal(np.asarray(inputs.read(0, 4095)), np.asarray(alone.read(0, 4095)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", "\n\n", "names no image: give a path a line"),
        ("x.txt", "a.png\nsub/../a.png\n", "'a.png' is twice in .*x.txt: list each image once"),
        ("x.txt", b"\xff\xfe\xff", "x.txt is damaged"),
        ("x.csv", "name,label\na.png,1\n", "has the columns name, label: call that of the paths path"),
        ("x.csv", "path,label\na.png,1\nb.png,\n", "has rows without a value in its column label"),
        ("x.csv", "path,label\n,1\n", "has rows without a path in its column path"),
        ("x.csv", "path,label\na.png\n", "has 1 cells in line 2, and 2 columns"),
        ("x.csv", 'path\n"a.png', "x.csv is damaged"),
        ("x.tar", b"no tar file", "x.tar is damaged, or compressed, in which nothing can be found"),
        ("x.tar", {"a.txt": b""}, "no images in .*x.tar"),
        ("x.tar", {"../a.png": b""}, "holds '../a.png', which leads out of a folder"),
        ("x.tar", {"/a.png": b""}, "holds '/a.png', which leads out of a folder"),
        ("x.tar", {"a.png": b"", "./a.png": b""}, "'x/a.png' is twice in tar files"),
    ],
)
def test_what_cannot_be_read_is_named(photos, name, content, said):
    path = photos / "in" / name
    path.parent.mkdir()
    if isinstance(content, dict):
        tar_of(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PrunexError, match=said) as error:
        open_inputs(str(path), NONE)
    assert "\n" not in str(error.value)


def test_a_file_that_is_gone_or_cut_is_named(photos):
    (photos / "list.txt").write_text("a.png\ngone.png\n")
    with pytest.raises(PrunexError, match=r"cannot read image '.*gone\.png': No such file"):
        open_inputs(str(photos / "list.txt"), NONE).stamps()
    path = tar_of(photos / "x.tar", {"a.png": (photos / "a.png").read_bytes()})
    inputs = open_inputs(str(path), NONE)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(PrunexError, match=r"cannot read image '.*x\.tar:x/a\.png' \(the file ends before it does"):
        inputs.read(0, None)
    with pytest.raises(PrunexError, match=r"there is no file .*x-1\.tar"):
        open_inputs(str(photos / "x-{1..3}.tar"), NONE)


def test_what_is_not_installed_is_asked_for(photos, monkeypatch):
    for name, module in (("x.parquet", "pyarrow"), ("saved", "datasets")):
        monkeypatch.setitem(sys.modules, module, None)
        path = photos / name
        if path.suffix:
            path.write_bytes(b"")
        else:
            path.mkdir()
            (path / "dataset_info.json").write_text("{}")
        with pytest.raises(PrunexError, match=f"{module}, which is not installed: pip install {module}"):
            open_inputs(str(path), NONE)


def test_parquet(photos):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"more": [0.5, 0.1], "file_name": ["a.png", "sub/c.png"], "label": [3, 1]}
    parquet.write_table(pyarrow.table(table), photos / "x.parquet")
    inputs = open_inputs(str(photos / "x.parquet"), NONE)
    assert inputs.names == ["a.png", "sub/c.png"]
    assert inputs.labels == [3, 1]
    (photos / "x.parquet").write_bytes(b"no")
    with pytest.raises(PrunexError, match=r"x\.parquet is damaged"):
        open_inputs(str(photos / "x.parquet"), NONE)


def test_a_saved_dataset(photos, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = [str(photos / name) for name in ("a.png", "b.png", "sub/c.png")]
    rows = datasets.Dataset.from_dict({"image": paths, "label": [1, 0, 4]}).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    inputs = open_inputs(str(tmp_path / "saved"), NONE)
    assert pixels(inputs) == pixels(open_inputs(str(photos), NONE))
    assert list(inputs.labels) == [1, 0, 4]
    assert inputs.stamps() == open_inputs(str(tmp_path / "saved"), NONE).stamps()
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(PrunexError, match=r"has several splits: give one, .*splits/train"):
        open_inputs(str(tmp_path / "splits"), NONE)
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(PrunexError, match="has no column of images: it has text"):
        open_inputs(str(tmp_path / "words"), NONE)


def test_each_images_own_label_is_explained(photos, tmp_path):
    slim = prunex.save(tiny(), tmp_path / "slim", labels=LABELS)
    command = ["explain", str(slim), "--methods", "tokentm", "--device", "cpu", "--target", "label", "--images"]
    table = photos / "table.csv"
    table.write_text("path,label\na.png,eel\nb.png,0\nsub/c.png,2\n")
    assert cli.run([*command, str(table), "--out", str(tmp_path / "out")]) == 0
    maps = prunex.open_maps(tmp_path / "out")
    assert maps[:, "target"].tolist() == [4, 0, 2]
    alone = ["explain", str(slim), "--methods", "tokentm", "--device", "cpu", "--target", "4", "--images"]
    assert cli.run([*alone, str(photos / "a.png"), "--out", str(tmp_path / "alone")]) == 0
    assert np.array_equal(prunex.open_maps(tmp_path / "alone")["a.png", "tokentm"], maps["a.png", "tokentm"])
    # An image that is said to be something else is another.
    table.write_text("path,label\na.png,ant\nb.png,0\nsub/c.png,2\n")
    assert cli.run([*command, str(table), "--out", str(tmp_path / "out")]) == 0
    maps = prunex.open_maps(tmp_path / "out")
    assert {name: maps[name, "target"] for name in maps} == {"a.png": 0, "b.png": 0, "sub/c.png": 2}
    for text, said in (
        ("path,label\na.png,fox\n", "label 'fox' is no class of this model: give 0..4 or ant, bee, cat, dog, eel"),
        ("path,label\na.png,5\n", "label 5 is no class of this model"),
        ("path\na.png\n", "--target label: .*table.csv has no labels"),
    ):
        table.write_text(text)
        with pytest.raises(PrunexError, match=said):
            cli.run([*command, str(table), "--out", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()
