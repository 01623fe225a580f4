"""One function a kind of input: spoils a copy of something good and hands it to what a user would call."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file, save_file

import prunex
from prunex import PrunexError
from prunex.callbacks import load_from_checkpoint
from prunex.learned.diffmask import load_explainer as load_diffmask
from prunex.learned.vit_shapley import load_explainer as load_shapley
from prunex.recipes import ImageClassifier, ImageFolder, write_report
from prunex.recipes.commands import cli
from prunex.recipes.commands.explain import read_options
from prunex.recipes.commands.score_data import from_folder
from prunex.recipes.commands.sheets import sheet_names
from prunex.recipes.data.folder import object_pixels, read_image
from prunex.recipes.given import image_files
from prunex.recipes.runs import model_from_weights, open_model
from prunex.untrusted import read_picture
from prunex.vit.trace import Stage, TokenTrace
from tests.hostile.room import Canary, Room

DEEP = 50_000  # levels of brackets
NUMBERS = [-1, 0, 1, 2, 3, 7, 2**16, 2**31, 2**40, 10**18, 2**63, -(2**70), 0.5, -0.0, 1e-300, 1e308]
ODD = [float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "", "x", "auto", "../../up", "/etc/passwd", "os.system", "prunex.recipes.ImageClassifier", "a" * 5000, "\x00",
    "\ud800", "né\u202e", "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "javascript:alert(1)",
    "${oc.env:HOME}", "{{ 7*7 }}", "{% for x in y %}", "$\\frac{$", "__class__", "C:\\x", "2001-99-99", "0b_", "=1+1",
]  # fmt: skip


def nasty(rng: random.Random, depth: int = 0) -> Any:
    """A value that has no business where it is put."""
    roll = rng.random()
    if roll < 0.3:
        return rng.choice(NUMBERS)
    if roll < 0.55:
        return rng.choice(TEXTS)
    if roll < 0.7 or depth > 2:
        return rng.choice([None, True, False, *ODD])
    if roll < 0.85:
        return [nasty(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(TEXTS))[:20]: nasty(rng, depth + 1) for _ in range(rng.randrange(3))}


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything in a tree of lists and dicts."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [path, *(p for k in keys for p in places(tree[k], (*path, k)))]


def spoil_tree(rng: random.Random, tree: Any, under: tuple = (), times: int | None = None) -> Any:
    """A copy of a tree in which some things are replaced, added or missing."""
    tree = copy.deepcopy(tree)
    for _ in range(times or rng.choice([1, 1, 1, 2, 3])):
        paths = [p for p in places(tree) if p and p[: len(under)] == under]
        if not paths:
            return tree
        *way, last = rng.choice(paths)
        holder = tree
        for key in way:
            holder = holder[key]
        roll = rng.random()
        if roll < 0.6:
            holder[last] = nasty(rng)
        elif roll < 0.7:
            del holder[last]
        elif roll < 0.8 and isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
            holder[last] = holder[last] * rng.choice([-1, 2, 0.5, 1000, 10**9])
        elif roll < 0.9 and isinstance(holder, dict):
            holder[str(rng.choice(TEXTS))[:30]] = nasty(rng)
        elif isinstance(holder, list):
            holder.extend([holder[last]] * rng.choice([1, 2, 100]))
        else:
            holder[last] = [holder[last]]
    return tree


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut, flipped, doubled, or replaced."""
    roll, out = rng.random(), bytearray(data)
    if not out or roll < 0.05:
        return rng.choice([b"", b"\x00", b"\xff\xfe", b"PK\x03\x04", b"\x80\x04.", b"{", rng.randbytes(64)])
    at = rng.randrange(len(out)) if roll > 0.5 else rng.randrange(min(len(out), 200))  # headers matter most
    if roll < 0.2:
        return bytes(out[:at])
    if roll < 0.8:
        for _ in range(rng.choice([1, 1, 8])):
            out[min(len(out) - 1, at + rng.randrange(9))] ^= 1 << rng.randrange(8)
        return bytes(out)
    if roll < 0.9:
        return bytes(out[:at] + out[at + rng.randrange(1, 50) :])
    return bytes(out[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 50))) + out[at:])


def spoil_json(rng: random.Random, path: Path, under: tuple = ()) -> None:
    """A JSON file with other values, or text that is hardly JSON."""
    roll, tree = rng.random(), json.loads(path.read_text())
    if roll < 0.7:
        path.write_text(json.dumps(spoil_tree(rng, tree, under)))
    elif roll < 0.85:
        path.write_bytes(spoil_bytes(rng, path.read_bytes()))
    else:
        text = json.dumps(tree)
        path.write_text(
            rng.choice(
                [
                    "[" * DEEP,
                    '{"a":' * DEEP + "1" + "}" * DEEP,
                    text.replace("{", '{"prunex": 1, ', 1),
                    text[:-1] + ', "prunex": ' + json.dumps(tree.get("prunex")) + "}",
                    text.replace("48", "1" * 5000),
                    text.replace("48", "1e999"),
                    text.replace("0.4", "NaN"),
                    "NaN",
                ]
            )
        )


def odd_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights some of which are missing, of another type or shape, or no numbers."""
    tensors = dict(tensors)
    for _ in range(rng.choice([1, 1, 3])):
        name = rng.choice(list(tensors))
        value = tensors[name]
        dtypes = [torch.int64, torch.bool, torch.float16, torch.float64, torch.bfloat16, torch.float8_e4m3fn,
                  torch.complex64, torch.uint8]  # fmt: skip
        change = rng.randrange(8)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[name] = value.to(rng.choice(dtypes))
        elif change == 2:
            tensors[name] = value.flatten()[: max(0, value.numel() - 1)].clone()
        elif change == 3:
            tensors[name] = torch.full_like(value, rng.choice([float("nan"), float("inf"), 6e4, 0.0]))
        elif change == 4:
            tensors[rng.choice(["../../up", "__class__", "prunex.x", "a" * 999, "head", ""])] = value.clone()
        elif change == 5:
            tensors[name] = value.unsqueeze(0).clone()
        elif change == 6:
            tensors = {k: v.to(rng.choice([torch.float16, torch.bfloat16, torch.float64])) for k, v in tensors.items()}
        else:
            tensors[name] = torch.zeros(rng.choice([(), (0,), (1, 1, 1, 1, 1)]))
        if not tensors:
            break
    return tensors


def sha(path: Path) -> str:
    """As a slim folder's config tells it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def signed(folder: Path) -> None:
    """Make the checksums right, as whoever forges a folder would."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        ours = config["prunex"]
        ours["sha256"] = sha(folder / "model.safetensors")
        ours["model_sha256"] = hashlib.sha256(json.dumps(ours["model"], sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(config))
    except (ValueError, KeyError, TypeError, RecursionError):
        return


def spoil_weights(rng: random.Random, path: Path) -> None:
    """A safetensors file with other bytes, a lying header, or other tensors."""
    roll, data = rng.random(), path.read_bytes()
    if roll < 0.3:
        path.write_bytes(spoil_bytes(rng, data))
    elif roll < 0.5:
        size = struct.unpack("<Q", data[:8])[0]
        header = spoil_tree(rng, json.loads(data[8 : 8 + size]))
        told = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", rng.choice([len(told), len(told), 2**62, 0])) + told + data[8 + size :])
    elif roll < 0.55:
        path.write_bytes(struct.pack("<Q", DEEP) + b'{"a":' * (DEEP // 5))
    else:
        tensors = odd_tensors(rng, load_file(path))
        save_file(tensors, path)


# --- the kinds


def slims(rng: random.Random, room: Room) -> None:
    """A slim folder with a spoilt description or spoilt weights."""
    folder = room.copy("slim")
    roll = rng.random()
    if roll < 0.55:
        parts = [(), ("prunex", "model"), ("prunex", "pruning"), ("prunex", "model", "args"), ("pretrained_cfg",)]
        spoil_json(rng, folder / "config.json", rng.choice(parts))
    else:
        spoil_weights(rng, folder / "model.safetensors")
    if rng.random() < 0.8:
        signed(folder)
    model = prunex.load(folder)
    if {p.dtype for p in model.parameters()} == {torch.float32}:
        with torch.no_grad():
            model(torch.zeros(1, 3, *model.patch_embed.img_size))
        prunex.cost(model)


def explainers(rng: random.Random, room: Room) -> None:
    """A trained explainer's folder, likewise."""
    kind, load = rng.choice([("vit_shapley", load_shapley), ("diffmask", load_diffmask)])
    folder = room.copy(kind)
    if rng.random() < 0.55:
        spoil_json(rng, folder / "config.json", rng.choice([(), ("prunex",), ("prunex", "gates"), ("prunex", "model")]))
    else:
        spoil_weights(rng, folder / "model.safetensors")
    load(folder)
    if rng.random() < 0.3:
        prunex.explain(kind, room.model, room.images, explainer=rng.choice([folder, str(folder / "model.safetensors")]))


def weights(rng: random.Random, room: Room) -> None:
    """A safetensors file of a timm model, its metadata too."""
    path = room.copy("weights.safetensors")
    if rng.random() < 0.5:
        args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
        told = json.dumps(spoil_tree(rng, args)) if rng.random() < 0.8 else "[" * DEEP
        if rng.random() < 0.2:
            told = json.dumps(args | {"checkpoint_path": str(room.work / "evil.ckpt")})
            (room.work / "evil.ckpt").write_bytes(pickle.dumps(Canary(room.canary)))
        save_file(load_file(path), path, metadata={"architecture": "vit_tiny_patch16_224", "model_args": told})
    else:
        spoil_weights(rng, path)
    size = rng.choice([None, None, 32, 7, 64])
    model_from_weights("vit_tiny_patch16_224", str(path), size)


def npz_bytes(rng: random.Random, path: Path, canary: Path) -> bytes:
    """A spoilt npz file: other arrays, pickles, headers that promise terabytes, bombs."""
    with np.load(path) as file:
        arrays = dict(file)
    roll, buffer = rng.random(), io.BytesIO()
    if roll < 0.25:
        return spoil_bytes(rng, path.read_bytes())
    if roll < 0.75:
        for _ in range(rng.choice([1, 2])):
            name = rng.choice(list(arrays))
            value = arrays[name]
            choices: list[Callable[[], Any]] = [
                lambda v=value: np.ones(v.shape, rng.choice(["f2", "i1", "u8", "?", "c8", "U4"])),
                lambda v=value: np.atleast_1d(v)[:1],
                lambda v=value: np.atleast_1d(v)[..., :0],
                lambda v=value: v[None],
                lambda v=value: np.full(v.shape, rng.choice([np.nan, np.inf, -1e300])),
                lambda v=value: np.full(v.shape, rng.choice([2**62, -5, 10**6])),
                lambda v=value: v.reshape(-1),
                lambda v=value: np.zeros((2, 1, rng.choice([1, 3000]), 3), np.uint8),
                lambda v=value: np.array("text"),
                lambda v=value: v.reshape(*v.shape[:-1], -1, 1) if v.ndim else v,
            ]
            arrays[name] = rng.choice(choices)()
            if rng.random() < 0.2:
                arrays.pop(name)
            if rng.random() < 0.2:
                arrays[f"relevance/{rng.choice(TEXTS)[:40]}".replace("\ud800", "?").replace("\x00", "0")] = value
        np.savez(buffer, **arrays)
        return buffer.getvalue()
    if roll < 0.82:
        np.savez(buffer, **arrays, evil=np.array([Canary(canary)], dtype=object))
        return buffer.getvalue()
    descr = rng.choice(["|u1", "<f8", "|O", "<U99", [("a", "<f8")]])
    shape = rng.choice([(10**13,), (10**6, 10**6, 10**6, 3), (2**63,), (-1, 4), (True,), "x"])
    header = repr({"descr": descr, "fortran_order": False, "shape": shape})
    if roll < 0.88:
        header = rng.choice(["(" * 5000, "{" * 90, "", "__import__('os')", header.replace("'", '"'), "{'descr': x}"])
    with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        text = header.encode().ljust(118) + b"\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 65536) + text + b"\x00" * rng.choice([0, 10])
        for name in rng.choice([("images.npy",), ("../../up.npy", "images.npy"), ("images", "images.npy"), ("a/",)]):
            file.writestr(name, content)
    return buffer.getvalue()


def npz(rng: random.Random, room: Room) -> None:
    """The maps of a run folder, as the report reads them."""
    run = room.copy("run") / "version_0"
    for name in ("metrics.csv", "units.csv", "score/scores.csv"):  # charts take time, and are reports' business
        (run / name).unlink()
    for path in rng.sample(sorted((run / "maps").glob("*.npz")), rng.choice([1, 2])):
        path.write_bytes(npz_bytes(rng, path, room.canary))
    write_report(run)


def reports(rng: random.Random, room: Room) -> None:
    """Tables and texts of a run folder, as the report reads them."""
    run = room.copy("run") / "version_0"
    (run / "maps" / "epoch=000.npz").unlink()
    heavy = ("metrics.csv", "score/scores.csv")
    names = ["summary.json", "bench.json", "slim/config.json", "units.csv", "config.yaml", *heavy]
    spoilt = rng.sample(names, rng.choice([1, 2]))
    for name in heavy:
        if name not in spoilt:
            (run / name).unlink()
    for name in spoilt:
        path = run / name
        if name.endswith(".json"):
            spoil_json(rng, path)
        elif rng.random() < 0.3:
            path.write_bytes(spoil_bytes(rng, path.read_bytes()))
        else:
            cells = [line.split(",") for line in path.read_text().splitlines()]
            for _ in range(rng.choice([1, 3])):
                line = rng.choice(cells)
                line[rng.randrange(len(line))] = str(nasty(rng)).replace("\n", " ")
            text = "\n".join(",".join(line) for line in cells)
            path.write_bytes(text.encode(errors=rng.choice(["surrogatepass", "replace"])))
    write_report(run)


def picture_bytes(rng: random.Random, mask: bool = False) -> bytes:
    """An image file of some mode and format, mostly spoilt."""
    mode = rng.choice(["RGB", "L", "LA", "RGBA", "CMYK", "I;16", "P", "1", "F", "I", "YCbCr"])
    form = {"CMYK": "JPEG", "YCbCr": "JPEG", "F": "TIFF", "I": "TIFF", "I;16": "TIFF"}.get(mode)
    form = form or rng.choice(["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG"])
    size = rng.choice([(40, 40), (48, 40), (1, 1), (3, 700)]) if not mask else (48, 40)
    image, buffer = Image.new(mode, size, 1), io.BytesIO()
    options: dict[str, Any] = {}
    if mode == "P":
        image.putpalette([rng.randrange(256) for _ in range(768)])
        options = {"transparency": rng.choice([0, bytes(range(256))])} if form in ("PNG", "GIF") else {}
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 3, 6, 8, 0, 9, 65535])
        options["exif"] = spoil_bytes(rng, exif.tobytes()) if rng.random() < 0.3 else exif.tobytes()
    if form in ("GIF", "WEBP", "TIFF") and rng.random() < 0.4:
        options |= {"save_all": True, "append_images": [image.copy(), image.copy()]}
    try:
        image.save(buffer, form, **options)
    except (OSError, ValueError, TypeError, struct.error, KeyError, SyntaxError):  # broken EXIF in TIFF
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
    data, roll = buffer.getvalue(), rng.random()
    if roll < 0.4:
        return spoil_bytes(rng, data)
    if roll < 0.5:  # headers that promise 100,000 x 100,000 pixels, PostScript, and what is no image
        side = struct.pack(">II", 100_000, 100_000)
        return rng.choice([
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + side + b"\x08\x02\x00\x00\x00\x00\x00\x00\x00",
            b"P6 100000 100000 255\n", b"P5\n-5 7\n255\n", b"BM" + b"\xff" * 60,
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n", b"<svg xmlns='x'/>", b"", b"\x00" * 50,
            b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x00" * 20, b"II*\x00" + b"\xff" * 40,
        ])  # fmt: skip
    return data


NAMES = ["x.png", "x.jpg", "x.JPEG", "né .webp", "a'b\".png", "<img src=x>.png", "x..png", "-x.png", "x" * 200 + ".png",
         "$x$.png", "{{7}}.png", "x\n.png", "x.tif", "x.bmp", os.fsdecode(b"\xff.png")]  # fmt: skip


def put(rng: random.Random, folder: Path, secret: Path) -> Path:
    """Something in a folder that is called like an image."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rng.choice(NAMES)
    roll = rng.random()
    if path.exists():
        return path
    if roll < 0.04:
        path.mkdir()
    elif roll < 0.08:
        path.symlink_to(rng.choice([secret, Path("/etc/passwd"), Path("/dev/zero"), folder, Path("nowhere")]))
    elif roll < 0.1:
        os.mkfifo(path)
    else:
        path.write_bytes(picture_bytes(rng))
    return path


def images(rng: random.Random, room: Room) -> None:
    """Image files one by one, and in an image folder."""
    folder = room.work / "own"
    path = put(rng, folder, room.good / "run" / "version_0" / "config.yaml")
    if rng.random() < 0.7:
        for file in image_files(folder):
            assert sheet_names([file], folder)[0].count("..") <= file.name.count("..")
            read_image(file).resize((8, 8))
        read_picture(path, object_pixels)
        return
    root = room.copy("photos")
    put(rng, root / rng.choice(["train", "val"]) / "ant", room.good / "slim" / "config.json")
    data = ImageFolder(root, image_size=16, batch_size=2, masks=None, verify=rng.random() < 0.7)
    data.setup("fit")
    for batch in (*data.train_dataloader(), *data.val_dataloader()):
        assert batch[0].shape[1:] == (3, 16, 16)


def masks(rng: random.Random, room: Room) -> None:
    """Masks beside images, as training and scoring read them."""
    root = room.copy("photos")
    path = root / "masks" / rng.choice(["val", "val", "train"]) / "ant" / "a.png"
    path.unlink()
    roll = rng.random()
    if roll < 0.8:
        path.write_bytes(picture_bytes(rng, mask=True))
    elif roll < 0.9:
        path.mkdir()
    if rng.random() < 0.5:
        data = ImageFolder(root, image_size=16, batch_size=2, verify=rng.random() < 0.7)
        data.setup(rng.choice(["fit", "validate"]))
        assert all(m.dtype == torch.bool for _, _, m in data.val_dataloader())
        return
    found = from_folder(root, None, room.model, rng.choice([1, 5]))[:]
    assert found.masks is None or found.masks.dtype == torch.bool


def traces(rng: random.Random, room: Room) -> None:
    """A trace of stages that need not fit, checked and read in every way."""
    batch, grid, prefix = rng.choice([1, 2]), (2, 3), rng.choice([0, 1])
    trace, tokens = TokenTrace(grid, prefix, batch, torch.device("cpu")), 6
    for block in range(rng.randrange(4)):
        n_out = rng.choice([tokens, max(1, tokens - 2), 0, 1, tokens + 1])
        shape = (batch, tokens) if rng.random() < 0.8 else (batch, tokens, 2)
        if rng.random() < 0.5:  # a good one: the first n_out stay
            group = torch.arange(tokens).expand(batch, -1).clone()
            group = torch.where(group < n_out, group, -1)
            weight: Any = (group >= 0).float()
        else:
            low, high = rng.choice([(-1, max(1, n_out)), (-3, 9), (0, 1)])
            group = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(rng.randrange(999)))
            weight = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(999)))
        spoil = rng.randrange(12)
        group = group.float() if spoil == 0 else group[:, :-1] if spoil == 1 else group
        weight = {2: weight * float("nan"), 3: None, 4: weight.double(), 5: weight[:1, :1]}.get(spoil, weight)
        score = rng.choice([None, None, "x", torch.zeros(batch, tokens)])
        told = n_out if rng.random() < 0.95 else rng.choice([None, "3", -2, 2.5, True])
        trace.stages.append(Stage(block, group, weight, told, rng.random() < 0.2, score, merged=rng.random() < 0.2))
        tokens = n_out
    trace.check()
    for stage in range(-len(trace.stages), len(trace.stages)):
        assert trace.kept(stage).shape == trace.share(stage).shape == trace.groups(stage).shape == (batch, *grid)
        trace.left(stage), trace.tokens(stage), trace.composition(stage)
    trace.depth(), trace.keep_ratios(), trace.detach()
    if not trace.stages or trace.stages[-1].n_out:
        trace.scatter(torch.zeros(batch, trace.stages[-1].n_out if trace.stages else 6, 4))


def checkpoint_bytes(rng: random.Random, path: Path, canary: Path) -> bytes:
    """A checkpoint with other contents, spoilt bytes, or pickles of what runs code."""
    roll, buffer = rng.random(), io.BytesIO()
    if roll < 0.15:
        return spoil_bytes(rng, path.read_bytes())
    if roll < 0.3:
        evil = Canary(canary)
        held = rng.choice([evil, {"state_dict": {}, "hyper_parameters": evil}, {"prunex": evil}, [evil]])
        if rng.random() < 0.5:
            return pickle.dumps(held)
        torch.save(held, buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
        return buffer.getvalue()
    if roll < 0.4:
        torch.save(rng.choice([[], {}, 3, "x", torch.zeros(2), {"state_dict": 3}, {"state_dict": {}}]), buffer)
        return buffer.getvalue()
    held = torch.load(path, weights_only=True)
    under = rng.choice([(), ("prunex",), ("prunex", "pruning"), ("hyper_parameters",), ("hyper_parameters",)])
    if rng.random() < 0.2:
        held["state_dict"] = odd_tensors(rng, held["state_dict"])
    else:
        state = held.pop("state_dict")
        held = spoil_tree(rng, held, under) | {"state_dict": state}
    if rng.random() < 0.3 and isinstance(held.get("hyper_parameters"), dict):
        held["hyper_parameters"] |= rng.choice([
            {"_instantiator": "os.mkdir", "_class_path": "os.mkdir"}, {"_class_path": "tests.hostile.evil.Evil"},
            {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "tests.hostile.evil.Evil"},
            {"model_args": {"checkpoint_path": "evil.ckpt"}}, {"weights": "../../x"},
        ])  # fmt: skip
    torch.save(held, buffer)
    return buffer.getvalue()


def checkpoints(rng: random.Random, room: Room) -> None:
    """Checkpoints, as users and the command line open them."""
    source = room.good / rng.choice(["dense.ckpt", "pruned.ckpt"])
    (room.work / "evil.ckpt").write_bytes(pickle.dumps(Canary(room.canary)))
    data = checkpoint_bytes(rng, source, room.canary)
    if rng.random() < 0.6:
        path = room.work / "x.ckpt"
        path.write_bytes(data)
        load_from_checkpoint(ImageClassifier, str(path))
        return
    run = room.work / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text((room.good / "run" / "version_0" / "config.yaml").read_text())
    (run / "checkpoints" / "x.ckpt").write_bytes(data)
    open_model(rng.choice([run, run / "checkpoints" / "x.ckpt"]))


def options(rng: random.Random, room: Room) -> None:
    """Options of methods as the command line takes them, and what the methods make of them."""
    text = rng.choice([
        f"rollout.discard_ratio={nasty(rng)}", f"rollout.head_fusion={nasty(rng)}", f"{nasty(rng)}={nasty(rng)}",
        f"grad_cam.kind={nasty(rng)}", f"grad_cam.layer={nasty(rng)}", f"tokentm.{nasty(rng)}={nasty(rng)}",
        "rollout.start_layer=!!python/object/apply:os.mkdir [" + str(room.canary) + "]",
        "rollout.start_layer=" + "[" * rng.choice([10, 3000]), "rollout.start_layer=&a [*a, *a]",
        f"lrp.rule={nasty(rng)}", f"integrated_gradients.baseline={nasty(rng)}", f"generic_attention.full={nasty(rng)}",
    ])  # fmt: skip
    for method, chosen in read_options([text]).items():
        prunex.explain(method, room.model, room.images, **chosen)


def config_text(rng: random.Random, room: Room) -> str:
    """A run's config, spoilt."""
    name = rng.choice(["digits/evit.yaml", "digits/dense.yaml", "imagefolder/topk.yaml", "digits/xpruner.yaml"])
    text = cli.packaged_configs()[name].read_text()
    roll = rng.random()
    if roll < 0.15:
        return spoil_bytes(rng, text.encode()).decode(errors="replace")
    tree = spoil_tree(rng, yaml.safe_load(text))
    if roll < 0.25:
        return rng.choice([
            "[" * 3000, "a: &a [x]\nb: &b [*a, *a]\n", "- 1\n- 2", "model: 3", "x" * 9999,
            "model: !!python/name:os.system", f"model: !!python/object/apply:os.mkdir [{room.canary}]", "\t\tx: 1",
            "model: ${oc.env:NOT_THERE}", "{}: 1",
            "model: ${model}", "trainer: {max_epochs: 2001-99-99}", "trainer: ${oc.decode:'['}", "seed_everything: 0b_",
        ])  # fmt: skip
    return yaml.safe_dump(tree, allow_unicode=True) if isinstance(tree, dict) else str(tree)


class _NoTraining:
    """Inside it, ``fit`` and its like stop where training would start."""

    NAMES = ("fit", "validate", "test", "predict")

    def __enter__(self) -> None:
        self.kept = {name: getattr(Trainer, name) for name in self.NAMES}
        for name in self.NAMES:  # the command line reads their options from their signatures
            setattr(Trainer, name, wraps(self.kept[name])(lambda *args, **kwargs: None))

    def __exit__(self, *_: Any) -> None:
        for name, kept in self.kept.items():
            setattr(Trainer, name, kept)


def configs(rng: random.Random, room: Room) -> None:
    """A spoilt config given to ``prunex fit``, up to where training would start."""
    path = room.work / "config.yaml"
    path.write_bytes(config_text(rng, room).encode(errors="replace"))
    with _NoTraining():
        room.command(["fit", "--config", str(path)])


def commands(rng: random.Random, room: Room) -> None:
    """Command lines: unknown options, wrong values, missing files, garbage."""
    slim, photos, run_folder = room.good / "slim", room.good / "photos" / "val", room.copy("run") / "version_0"
    garbage = room.work / "garbage.bin"
    garbage.write_bytes(rng.randbytes(300))
    where = [str(slim), str(run_folder), "nowhere", "", "a" * 5000, str(garbage), "\x00",
             "vit_tiny_patch16_224", "né\ud800", "~nobody/x", "/dev/null", "/proc/self/mem", "../.."]  # fmt: skip
    out = rng.choice(["out", "o" * 300, "", "\x00", "né", "out/deeper", str(garbage), "/proc/out", "$(touch x)"])
    values = [*map(str, NUMBERS), *TEXTS, str(garbage), "1,2", "cuda:9", "cpu:7"]
    command = rng.choice(
        ["explain", "explain", "score", "bench", "export", "report", "methods", "fit", "validate", "x"]
    )
    run, value = rng.choice(where), rng.choice(values)
    if command == "explain":
        line = [run if rng.random() < 0.5 else str(slim), "--images", str(photos), "--methods", "rollout",
                "--device", "cpu"]  # fmt: skip
        extra = [["--methods", value], ["--target", value], ["--batch", value], ["--device", value], ["--out", out],
                 ["--images", value], ["--option", value], ["--weights", value],
                 ["--img-size", value], [value]]  # fmt: skip
    elif command == "score":
        line = [run if rng.random() < 0.5 else str(slim), "--data", str(photos), "--methods", "rollout", "--images",
                "1", "--metrics", "deletion", "--device", "cpu"]  # fmt: skip
        extra = [["--methods", value], ["--metrics", value], ["--images", value], ["--data", value],
                 ["--device", value], ["--masks", value], ["--models", value], ["--removal", value],
                 ["--option", value], ["--out", out]]  # fmt: skip
    elif command == "bench":
        line = [rng.choice([w for w in where if "version_0" not in w])]
        extra = [
            ["--batches", value],
            ["--threads", value],
            ["--seconds", value],
            ["--device", value],
            ["--limit", value],
        ]
    elif command == "export":
        line = [rng.choice([w for w in where if w != str(slim) and "version_0" not in w])]
        extra = [["--format", value], ["--out", out], ["--kept"], [value]]
    elif command in ("fit", "validate"):
        line = ["--config", rng.choice(["digits/dense", "digits/dense.yaml", value, run])]
        extra = [[f"--{rng.choice(['trainer', 'model', 'data'])}.{rng.choice(TEXTS)[:20]}", value],
                 ["--trainer.max_epochs", value], ["--trainer.devices", value], ["--data.batch_size", value],
                 ["--model.architecture", value], ["--ckpt_path", rng.choice([str(garbage), value])], [value],
                 ["--model", value], ["--data", value], ["--seed_everything", value]]  # fmt: skip
    else:
        line, extra = ([run] if command == "report" and "version_0" not in run else [value]), [[value]]
    line += [part for some in rng.sample(extra, rng.choice([0, 1, 1, min(2, len(extra))])) for part in some]
    with _NoTraining():
        room.command([command, *line])


KINDS: dict[str, tuple[Callable[[random.Random, Room], None], int]] = {  # with their shares of all cases
    "slims": (slims, 8), "explainers": (explainers, 4), "weights": (weights, 3), "npz": (npz, 4),
    "reports": (reports, 2), "images": (images, 10), "masks": (masks, 6), "traces": (traces, 8),
    "checkpoints": (checkpoints, 5), "options": (options, 2), "commands": (commands, 2), "configs": (configs, 1),
}  # fmt: skip


def one(kind: str, seed: int, number: int, room: Room) -> bool:
    """Try one case; whether it succeeded.

    Raises:
        Broken: Where it ended otherwise than in success or one line.
    """
    room.fresh()
    return room.judge(lambda: KINDS[kind][0](random.Random(f"{kind}-{seed}-{number}"), room))


__all__ = ["KINDS", "PrunexError", "one"]
