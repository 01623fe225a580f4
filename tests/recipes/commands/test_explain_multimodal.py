"""prunex explain of folders that transformers wrote: what is written is what prunex.multimodal.explain says."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import prunex.multimodal
from prunex import PrunexError
from prunex.recipes.commands import cli, multimodal_options
from tests.multimodal.folders import save_clip, save_detr, save_owlvit, save_vilt
from tests.multimodal.models import DECODER, MAKERS

transformers = pytest.importorskip("transformers")
METHODS = list(multimodal_options.METHODS)
NAMES = ["a.png", "b.jpg", "sub/c.png"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    makers = {"detr": save_detr, "clip": save_clip, "vilt": save_vilt, "owlvit": save_owlvit}
    return {name: make(root / name) for name, make in makers.items()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos, two of one size."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for name, size in zip(NAMES, [(60, 80), (60, 80), (70, 50)], strict=True):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize(size[::-1]).save(folder / name)
    return folder


def run(*arguments):
    return cli.run(["explain", *map(str, arguments), "--device", "cpu"])


def arrays(out):
    with np.load(out / "maps.npz", allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def table(out, name):
    with open(out / name, newline="") as file:
        return list(csv.DictReader(file))


def written(out):
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())


def directly(kind, folder, path, texts=(), **options):
    """What the public function says of one image, with what transformers itself makes of it."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = dict(processor(images=[Image.open(path).convert("RGB")], return_tensors="pt"))
    tokenizer = None
    if texts:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        inputs |= tokenizer(list(texts), return_tensors="pt", padding=True)
    model = getattr(transformers, kind).from_pretrained(folder)
    return prunex.multimodal.explain(model, inputs, processor=tokenizer, **options)


def test_every_detection_of_a_detr(folders, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folders["detr"], "--images", photos, "--out", out, "--threshold", 0.2) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)]
    assert written(out) == ["a.png", "b.png", "explained.csv", "maps.npz", "sub/c.png", "times.csv"]
    found, rows = arrays(out), table(out, "explained.csv")
    assert found["files"].tolist() == NAMES
    assert len(rows) == len(found["query"]) > 3
    assert [row["method"] for row in table(out, "times.csv")] == METHODS
    place = 0
    for image, name in enumerate(NAMES):
        size = Image.open(photos / name).size
        for method in METHODS:
            e = directly("DetrForObjectDetection", folders["detr"], photos / name, method=method, threshold=0.2)
            for k, query in enumerate(e.queries):
                row = place + k
                tall, wide = query.map.shape
                assert np.allclose(found[method][row, :tall, :wide], query.map, atol=1e-6)
                assert np.isnan(found[method][row]).sum() == found[method][row].size - tall * wide
                assert (found["image"][row], found["query"][row]) == (image, query.query)
                assert (rows[row]["file"], rows[row]["label"]) == (name, query.label)
                assert float(rows[row]["probability"]) == pytest.approx(query.probability, abs=1e-5)
                assert float(rows[row]["score"]) == pytest.approx(query.score, rel=1e-4)
                x, y, w, h = query.box.tolist()
                box = [(x - w / 2) * size[0], (y - h / 2) * size[1], (x + w / 2) * size[0], (y + h / 2) * size[1]]
                assert [float(rows[row][n]) for n in ("x1", "y1", "x2", "y2")] == pytest.approx(box, abs=0.1)
        place += len(e.queries)
    assert place == len(rows)
    # Another size, another grid: what the smaller ones lack is NaN.
    assert np.isnan(found["rollout"]).any()


def test_each_image_has_the_text_it_is_most_like(folders, photos, tmp_path):
    out, texts = tmp_path / "out", ["A red cat", "a photo of the pagoda ?"]
    run(folders["clip"], "--images", photos, "--out", out, "--text", texts[0], "--text", texts[1], "--batch", 2)
    found, rows, words = arrays(out), table(out, "explained.csv"), table(out, "words.csv")
    for image, name in enumerate(NAMES):
        for method in METHODS:
            e = directly("CLIPModel", folders["clip"], photos / name, texts, method=method)
            assert np.allclose(found[method][image], e.image.view(4, 4), atol=1e-6)
            valid = e.text_valid[e.texts[0]].nonzero()[:, 0]
            assert np.allclose(found[f"{method}_text"][image][: len(valid)], e.text[0, valid], atol=1e-6)
            values = [float(row[method]) for row in words if row["file"] == name]
            assert values == pytest.approx(e.text[0, valid].tolist(), abs=1e-6)
        assert found["target"][image] == found["predicted"][image] == int(e.target)
        assert rows[image]["label"] == rows[image]["predicted"] == texts[int(e.target)]
    seen = [row["word"] for row in words if row["file"] == NAMES[0]]
    assert seen[0] == "<|startoftext|>"
    assert seen[-1] == "<|endoftext|>"
    assert "[PAD]" not in seen


def test_a_target_is_explained_in_the_predictions_place(folders, photos, tmp_path):
    texts = ["--text", "a red cat", "--text", "blue square", "--text", "the photo"]
    out = tmp_path / "out"
    for target in (0, 1, 2):
        run(folders["clip"], "--images", photos, "--out", out, *texts, "--target", target, "--methods", "rollout")
        found = arrays(out)
        assert found["target"].tolist() == [target] * 3
        assert set(found["label"]) == {texts[2 * target + 1]}
        assert len(set(found["predicted"])) == 1 or target == 0
    with pytest.raises(PrunexError, match="target=3 is not allowed: classes are 0..2"):
        run(folders["clip"], "--images", photos, "--out", tmp_path / "no", *texts, "--target", 3)
    assert not (tmp_path / "no").exists()


def test_an_answer_about_images_of_several_sizes(folders, photos, tmp_path):
    out, question = tmp_path / "out", "is the pagoda red ?"
    run(folders["vilt"], "--images", photos, "--out", out, "--text", question)
    found, words = arrays(out), table(out, "words.csv")
    for image, name in enumerate(NAMES):
        e = directly("ViltForQuestionAnswering", folders["vilt"], photos / name, [question])
        tall, wide = e.grid
        assert np.allclose(found["generic_attention"][image, :tall, :wide], e.image[0].view(e.grid), atol=1e-6)
        assert np.allclose(found["generic_attention_text"][image], e.text[0], atol=1e-6)
    read = [row["word"] for row in words[:8]]
    assert read == ["[CLS]", "is", "the", "pag", "oda", "red", "?", "[SEP]"]


def test_detections_of_texts(folders, photos, tmp_path):
    out, texts = tmp_path / "out", ["a red cat", "photo"]
    more = ["--text", texts[0], "--text", texts[1], "--threshold", 0, "--methods", "generic_attention,grad_cam"]
    run(folders["owlvit"], "--images", photos, "--out", out, *more)
    found = arrays(out)
    assert len(found["query"]) == 3 * 16
    assert set(found["label"]) <= set(texts)
    e = directly("OwlViTForObjectDetection", folders["owlvit"], photos / NAMES[2], texts, threshold=0.0)
    assert np.allclose(found["generic_attention"][32:], [q.map.numpy() for q in e.queries], atol=1e-5)
    assert found["probability"][32:] == pytest.approx([q.probability for q in e.queries], abs=1e-5)
    lengths = {row["query"] for row in table(out, "words.csv")}
    assert len(lengths) == 16


def test_the_batch_size_changes_nothing(folders, photos, tmp_path):
    found = []
    for size in (1, 2, 8):
        out = tmp_path / str(size)
        run(folders["detr"], "--images", photos, "--out", out, "--threshold", 0.2, "--batch", size)
        found.append(arrays(out))
    for other in found[1:]:
        for name in METHODS:
            assert np.allclose(found[0][name], other[name], atol=1e-6, equal_nan=True)


def test_options_reach_the_methods(folders, photos, tmp_path):
    out, more = tmp_path / "out", ["--methods", "generic_attention,rollout", "--threshold", 0.2]
    image = photos / NAMES[0]
    run(folders["detr"], "--images", image, "--out", out, *more, "--option", "generic_attention.normalise=false")
    changed = arrays(out)
    e = directly("DetrForObjectDetection", folders["detr"], image, threshold=0.2, normalise=False)
    assert np.allclose(changed["generic_attention"][0], next(iter(e.queries)).map, atol=1e-6)
    run(folders["detr"], "--images", image, "--out", out, *more)
    assert not np.allclose(changed["generic_attention"], arrays(out)["generic_attention"])


def test_where_nothing_is_detected_it_says_so(folders, photos, tmp_path, capsys):
    out = tmp_path / "out"
    run(folders["detr"], "--images", photos, "--out", out, "--threshold", 1)
    assert capsys.readouterr().out.splitlines() == ["no object above --threshold 1 in 3 of 3 images", str(out)]
    assert written(out) == ["a.png", "b.png", "explained.csv", "maps.npz", "sub/c.png", "times.csv"]
    assert table(out, "explained.csv") == []
    assert arrays(out)["box"].shape == (0, 4)


def test_sheets_are_drawn_on_what_the_model_sees(folders, tmp_path):
    photo = tmp_path / "red.png"
    Image.new("RGB", (80, 60), (200, 30, 60)).save(photo)
    run(folders["detr"], "--images", photo, "--out", tmp_path / "out", "--threshold", 0, "--methods", "rollout")
    sheet = np.asarray(Image.open(tmp_path / "out" / "red.png")).reshape(-1, 3).astype(int)
    # In its own colours, not stretched.
    assert (abs(sheet - (200, 30, 60)).max(1) <= 2).sum() > 5000


@pytest.mark.parametrize(
    ("folder", "arguments", "says"),
    [
        ("clip", [], "a CLIPModel compares images with texts: give --text"),
        ("vilt", [], "answers one question about each image: give --text once"),
        ("vilt", ["--text", "a", "--text", "b"], "answers one question about each image: give --text once"),
        ("vilt", ["--text", " "], "--text is empty"),
        ("vilt", ["--text", "cat " * 60], "--text is 62 tokens long, and the model reads 40 at most"),
        ("detr", ["--text", "a cat"], "a DetrForObjectDetection reads no text: leave it out"),
        ("clip", ["--text", "a", "--threshold", "0.5"], "--threshold goes with detectors, and .* holds a CLIPModel"),
        ("detr", ["--threshold", "1.5"], r"--threshold 1.5 is not allowed: give a probability in \[0, 1\]"),
        ("detr", ["--threshold", "nan"], "--threshold nan is not allowed"),
        ("detr", ["--methods", "tokentm"], "unknown explainer of models of text and image 'tokentm'.*Known: gen"),
        ("detr", ["--methods", "roll-out"], "did you mean 'rollout'"),
        ("detr", ["--methods", ","], "names no explainer"),
        ("detr", ["--option", "rollout.literal=true"], "unknown option of rollout .*'literal'"),
        ("detr", ["--option", "generic_attention.threshold=1"], "unknown option of generic_attention .*'threshold'"),
        ("detr", ["--methods", "rollout", "--option", "generic_attention.literal=1"], "not among the methods"),
        ("detr", ["--option", "generic_attention.literal=maybe"], "literal='maybe' is not allowed: give True or False"),
        ("detr", ["--weights", "x"], "--weights goes with a timm ViT"),
        ("detr", ["--img-size", "96"], "--img-size goes with a timm ViT"),
        ("detr", ["--mean", "0.5"], "--mean goes with a timm ViT"),
        ("detr", ["--batch", "0"], "--batch 0 is not allowed"),
        ("detr", ["--target", "99"], "target=99 is not allowed: classes are 0..4"),
    ],
)
def test_mistakes_leave_nothing_behind(folders, photos, tmp_path, folder, arguments, says):
    with pytest.raises(PrunexError, match=says):
        run(folders[folder], "--images", photos, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_what_a_folder_lacks_is_named(folders, photos, tmp_path):
    def without(kind, *names):
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folders[kind], folder)
        for name in names:
            (folder / name).unlink()
        return folder

    cases = [
        (without("detr", "preprocessor_config.json"), [], "holds no image processor"),
        (without("detr", "model.safetensors"), [], "holds no weights in safetensors"),
        (without("owlvit", "tokenizer.json", "tokenizer_config.json"), ["--text", "a"], "holds no tokenizer"),
    ]
    pickled = without("detr", "model.safetensors")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    cases.append((pickled, [], "holds no weights in safetensors .*nothing is downloaded or unpickled"))
    damaged = without("detr")
    (damaged / "model.safetensors").write_bytes(b"nonsense")
    cases.append((damaged, [], "cannot open a DetrForObjectDetection"))
    for folder, more, says in cases:
        with pytest.raises(PrunexError, match=says):
            run(folder, "--images", photos, "--out", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_weights_that_would_be_random_are_refused(folders, photos, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    shutil.copytree(folders["detr"], folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "class_labels_classifier" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PrunexError, match=f"weights lack 1 of the model's, such as {re.escape(lost)}"):
        run(folder, "--images", photos, "--out", tmp_path / "out")


def test_code_in_a_folder_is_not_run(folders, photos, tmp_path):
    folder, proof = tmp_path / "code", tmp_path / "proof"
    shutil.copytree(folders["detr"], folder)
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    for name, auto in (("config.json", "AutoConfig"), ("preprocessor_config.json", "AutoImageProcessor")):
        read = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(read | {"auto_map": {auto: "evil.Evil"}}))
    run(folder, "--images", photos, "--out", tmp_path / "out", "--methods", "rollout", "--threshold", 0)
    assert not proof.exists()


def test_models_that_need_more_than_images_are_named(photos, tmp_path):
    model = MAKERS["lxmert"]()[0]
    model.save_pretrained(tmp_path / "lxmert")
    with pytest.raises(PrunexError, match="holds a LxmertForQuestionAnswering of transformers.*DetrForObjectDetection"):
        run(tmp_path / "lxmert", "--images", photos)


def test_text_and_threshold_go_with_these_folders_alone(photos, tmp_path):
    for more in (["--text", "a"], ["--threshold", "0.5"]):
        with pytest.raises(PrunexError, match=f"{more[0]} goes with a folder of transformers"):
            run("vit_tiny_patch16_224", "--pretrained", "--images", photos, *more)


def test_names_of_the_light_half_are_those_of_the_heavy_one():
    assert multimodal_options.METHODS == prunex.multimodal.explaining.METHODS
    assert set(multimodal_options.RULES) == set(prunex.multimodal.explaining._RULES)
    assert set(multimodal_options.KINDS) <= set(prunex.multimodal.models())


def test_a_backbone_that_is_only_named_is_not_looked_up(folders, tmp_path, monkeypatch):
    import socket

    from prunex.recipes.commands.multimodal_model import opened_model

    backbone = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=[1, 2, 3, 4])
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(**DECODER, backbone_config=backbone))
    model.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    del new["backbone_config"]
    named = {"use_timm_backbone": True, "use_pretrained_backbone": True, "backbone": "resnet18"}
    named["backbone_kwargs"] = {"in_chans": 3, "out_indices": [1, 2, 3, 4]}
    (tmp_path / "config.json").write_text(json.dumps(new | named))

    def refused(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    folder = multimodal_options.folder_at(str(tmp_path))
    weights = opened_model(folder).state_dict()
    assert all(np.array_equal(weights[name], value) for name, value in model.state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps(new | named | {"use_timm_backbone": False}))
    with pytest.raises(PrunexError, match="no more than its name, 'resnet18', which would be looked up in the network"):
        opened_model(folder)
