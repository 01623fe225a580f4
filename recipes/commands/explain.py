"""``prunex explain``: maps, contact sheets and times of any explainers for one's own images."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

import prunex
from prunex.errors import PrunexError, unknown
from prunex.files import write_whole
from prunex.pictures import contact_sheet, save_npz, save_png, under_grid
from prunex.pictures.arrays import Picture
from prunex.pictures.mosaic import class_name
from prunex.recipes.commands.arguments import Parser
from prunex.recipes.data.images import choose_range, read_image
from prunex.recipes.runs import add_normalisation, add_range, open_model_or_name, renormalise, run_of
from prunex.registry import lookup
from prunex.untrusted import is_there, read_json, readable
from prunex.vit.anatomy import find, read
from prunex.vit.recording import choose_target
from prunex.vit.surroundings import ASKING

MANY = 1000  # forwards an image from which a method's cost is announced
PATIENCE = 20  # maps.npz grows with every batch: between two writings lie so many times what one took


def explain(arguments: Sequence[str]) -> int:
    """``prunex explain RUN --images DIR``: a contact sheet an image, maps.npz and times.csv."""
    args = _parse(arguments)
    explainers = Explainers(args.methods, own_explainer(Path(args.run), args.methods, read_options(args.option)))
    root, out = Path(args.images), Path(args.out or Path("explained", name_of_model(args.run)))
    files = image_files(root, besides=out if args.out else Path("explained"))
    check_out(out, root, files)
    vit = find(open_model_or_name(args.run, args.weights, args.img_size, args.pretrained))[1]
    renormalise(vit, args.mean, args.std)
    try:
        vit.to(torch.device(args.device)).float()  # images are float32; weights may be of several types
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
        raise PrunexError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    _check_target(vit, args.target)
    prepare = preparation(vit)
    # All of them now: a broken one at the end would cost the whole run.
    value_range = choose_range(tqdm(files, desc="reading", unit="image", leave=False, delay=1), args.range)
    output = _Output(out, files, root, list(getattr(vit, "label_names", None) or []) or None)
    try:
        with tqdm(total=len(files) * len(explainers.names), desc="explaining", unit="map") as bar:
            for batch in batches(len(files), args.batch):
                opened = [read_image(files[i], value_range) for i in batch]
                pictures, images = map(list, zip(*map(prepare, opened), strict=True))
                found = explainers(vit, torch.stack(images), args.target, bar, left=len(files) - batch.start)
                output.add(pictures, found, explainers.times())
                if batch.start == 0 and batch.stop < len(files):
                    for line in explainers.announcements(len(files) - batch.stop):
                        bar.write(line)
        output.finish()
    except PrunexError:
        with suppress(PrunexError):
            output.finish()
        raise
    except KeyboardInterrupt:
        output.finish()
        print(f"\nprunex: interrupted: maps of {output.done} of {len(files)} images are in {out}", file=sys.stderr)
        return 130
    print(out)
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    parser = Parser(
        "prunex explain",
        description="Explain a model's predictions on your own images: a contact sheet an image, maps.npz, times.csv.",
    )
    parser.add_argument("run", help="run folder, slim folder, checkpoint, or a timm model name (with --weights)")
    parser.add_argument("--images", required=True, help="folder of images (or one image)")
    parser.add_argument(
        "--methods", default="all", help="names with commas between, or all that the model can take (default)"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="an option of a method, such as rollout.head_fusion=max; may be repeated",
    )
    parser.add_argument("--target", type=int, default=None, help="class index; default the predicted class")
    parser.add_argument("--out", help="folder to write to; default explained/NAME-OF-THE-MODEL")
    parser.add_argument("--batch", type=int, default=8, help="images explained at once; default 8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", help="safetensors file for a timm model name")
    source.add_argument("--pretrained", action="store_true", help="download timm's weights for a timm model name")
    parser.add_argument("--img-size", type=int, help="side of the images in pixels, for a timm model name")
    add_normalisation(parser)
    add_range(parser)
    args = parser.parse_args(arguments)
    for flag, value in (("--batch", args.batch), ("--img-size", args.img_size)):
        if value is not None and value < 1:
            raise PrunexError(f"{flag} {value} is not allowed: give a whole number of at least 1")
    return args


class Explainers:
    """Several explainers on one model, batch by batch, and what each of them took.

    With ``"all"``, every registered method is tried on the first batch, and those that refuse the model are left out;
    a method that is named, or has options, must work.

    Args:
        methods: ``"all"``, names with commas between, or a list of names.
        options: Options by method.

    Attributes:
        names: The methods in use.
        skipped: Why each of the others was left out.

    Raises:
        PrunexError: For unknown names, or options of a method that is not in use.
    """

    def __init__(self, methods: str | Sequence[str] = "all", options: Mapping[str, Mapping[str, Any]] | None = None):
        self.options = dict(options or {})
        given = [name.strip() for name in (methods.split(",") if isinstance(methods, str) else methods)]
        every = [m.name for m in prunex.methods("explainer")] if "all" in given else []
        named = [name for name in given if name and name != "all"]
        self.names = list(dict.fromkeys([*every, *named]))
        self._required = set(named) | (set(self.options) if every else set())
        if not self.names:
            raise PrunexError(f"methods={methods!r} names no explainer: give all, or names with commas between")
        for name in self.names:
            lookup("explainer", name)
        for name in self.options:
            if name not in self.names:
                raise PrunexError(f"an option was given for {name}, which is not among the methods {self.names}")
        self.skipped: dict[str, str] = {}
        self.images = 0
        self._seconds = dict.fromkeys(self.names, 0.0)
        self._forwards = dict.fromkeys(self.names, 0)

    def __call__(
        self, model: nn.Module, images: Tensor, target: int | Tensor | None = None, bar: Any = None, left: int = 0
    ) -> dict[str, prunex.Explanation]:
        """Explain a batch with every method in use.

        Args:
            model: A supported ViT.
            images: float [B, C, H, W], normalised.
            target: As in `prunex.explain`.
            bar: A tqdm bar that counts maps.
            left: Images that are not explained yet, these included; for the bar.

        Returns:
            One explanation a method.

        Raises:
            PrunexError: When a method that must work does not, or none is left.
        """
        bar = tqdm(disable=True) if bar is None else bar
        found = {}
        for name in list(self.names):
            bar.set_postfix_str(name)
            start = perf_counter()
            try:
                with _forwards(find(model)[1]) as forwards:
                    e = prunex.explain(name, model, images, target, **self.options.get(name, {}))
            except PrunexError as error:
                if name in self._required or self.images:
                    raise PrunexError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
                self.names.remove(name)
                self.skipped[name] = str(error)
                bar.total = max(0, (bar.total or 0) - left)
                bar.write(f"skipped {name}: {error}")
                continue
            e.maps = e.maps.float().cpu()  # waits for the device, so that its time counts
            found[name] = e
            self._seconds[name] += perf_counter() - start
            self._forwards[name] += sum(forwards)
            bar.update(len(images))
        if not found:
            raise PrunexError(f"no explainer can take this model; the last one said: {[*self.skipped.values()][-1]}")
        check_outputs(next(iter(found.values())).logits)
        self.images += len(images)
        return found

    def seconds(self, name: str) -> float:
        """Mean seconds an image."""
        return self._seconds[name] / max(1, self.images)

    def forwards(self, name: str) -> float:
        """Mean number of times that one image (or a changed copy of it) went through the model's last block."""
        return self._forwards[name] / max(1, self.images)

    def announcements(self, images: int) -> list[str]:
        """One line for each method that is expensive, with the time that so many images need."""
        return [
            f"{name} takes {self.forwards(name):,.0f} forwards an image: about "
            f"{self.seconds(name) * images / 60:.1f} minutes for the other {images}"
            for name in self.names
            if self.forwards(name) > MANY
        ]

    def times(self) -> str:
        """The methods' mean times as CSV."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["method", "seconds_per_image", "forwards_per_image", "images", "needs"])
        for name in self.names:
            needs = lookup("explainer", name).needs
            table.writerow([name, f"{self.seconds(name):.4g}", f"{self.forwards(name):g}", self.images, needs])
        return text.getvalue()


@contextmanager
def _forwards(vit: Any) -> Iterator[list[int]]:
    """Collect the batch sizes of all that goes through the last block for an explanation."""
    sizes: list[int] = []

    def count(module: nn.Module, inputs: Any) -> None:
        if not ASKING.get():
            sizes.append(len(inputs[0]))

    handle = vit.blocks[-1].norm1.register_forward_pre_hook(count)
    try:
        yield sizes
    finally:
        handle.remove()


class _Output:
    """What is written: a sheet an image, and now and then the maps and times of all images so far."""

    def __init__(self, out: Path, files: Sequence[Path], root: Path, class_names: Sequence[str] | None) -> None:
        self.out = out
        self.files = [name_of(file, root) for file in files]
        self.sheets = sheet_names(files, root)
        self.class_names = class_names
        self.done = 0
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._times = ""  # of what maps.npz does not hold yet
        self._written, self._took = -math.inf, 0.0  # when maps.npz was written last, and how long that took

    def add(self, pictures: Sequence[Picture], found: Mapping[str, prunex.Explanation], times: str) -> None:
        """Write the sheets of the next images; maps.npz and times.csv anew, unless that would take most of the time.

        Raises:
            PrunexError: When the folder cannot be written to.
        """
        e = next(iter(found.values()))
        target = e.target.cpu().numpy()
        predicted = np.where(target < 0, -1, e.logits.argmax(1).cpu().numpy())  # features have no class
        kept = {"kept": e.trace.kept().cpu().numpy()} if e.trace.stages and not e.trace.pooled else {}
        maps = {name: each.maps.numpy() for name, each in found.items()}
        shares = e.logits.float().softmax(1).cpu().numpy()
        first, self.done = self.done, self.done + len(pictures)
        self._parts.append({"predicted": predicted, "target": target, **maps, **kept})
        self._times = times
        if perf_counter() - self._written > PATIENCE * self._took:
            self.finish()
        for place, picture in enumerate(pictures):
            one = slice(place, place + 1)
            sheet = contact_sheet(
                under_grid(picture[None], e.covered),
                {name: values[one] for name, values in maps.items()},
                [name for name, each in found.items() if each.signed],
                kept["kept"][one] if kept else None,
                heading=[
                    readable(self.files[first + place]),
                    _told(int(predicted[place]), int(target[place]), shares[place], self.class_names, found),
                ],
            )
            with self._writing():
                save_png(self.out / self.sheets[first + place], sheet)

    def finish(self) -> None:
        """Write the maps and times that are not on disk yet.

        Raises:
            PrunexError: When the folder cannot be written to.
        """
        if not self._times:
            return
        began = perf_counter()
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        with self._writing():
            save_npz(self.out / "maps.npz", {"files": np.array(self.files[: self.done]), **whole}, compressed=False)
            write_whole(self.out / "times.csv", self._times.encode())
        self._written, self._took, self._times = perf_counter(), perf_counter() - began, ""

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PrunexError(f"cannot write to {self.out}: {error.strerror or error}; choose another --out") from error


def _told(
    predicted: int,
    target: int,
    shares: NDArray[np.float32],
    class_names: Sequence[str] | None,
    found: Mapping[str, prunex.Explanation],
) -> str:
    """Which class was predicted and which explained, in words, and which methods know none."""
    if target < 0:
        return "no classifier: what the features rest on"

    def named(number: int) -> str:
        share = "below 1%" if shares[number] < 0.005 else f"{shares[number]:.0%}"
        return f"{class_name(number, class_names)} ({share})"

    classless = [name for name, e in found.items() if not e.class_specific]
    if len(classless) == len(found):
        return f"predicted: {named(predicted)} · maps of no class"
    end = f" · of no class: {', '.join(classless)}" if classless else ""
    if target == predicted:
        return f"predicted and explained: {named(predicted)}{end}"
    return f"predicted: {named(predicted)} · explained: {named(target)}{end}"


def read_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by method from ``METHOD.NAME=VALUE``, values as YAML reads them.

    Raises:
        PrunexError: For another form, an unknown method or option (near names are offered), or a value YAML refuses.

    >>> read_options(["rollout.head_fusion=max", "rollout.discard_ratio=0.9"])
    {'rollout': {'head_fusion': 'max', 'discard_ratio': 0.9}}
    """
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        method, dot, name = key.strip().partition(".")
        if not equals or not dot or not name:
            raise PrunexError(
                f"--option {text[:100]!r} is not allowed: give METHOD.NAME=VALUE, as in rollout.head_fusion=max"
            )
        known = lookup("explainer", method).options
        if name not in known:
            raise unknown(f"option of {method}", name, known)
        try:
            read_as = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2001-99-99 is a ValueError
            raise PrunexError(
                f"--option {text[:100]!r}: {value[:100]!r} is no YAML value; put text into quotes"
            ) from error
        if isinstance(read_as, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", read_as):
            read_as = float(read_as)  # YAML 1.1 reads 1e-3, without a dot, as text
        options.setdefault(method, {})[name] = read_as
    return options


def own_explainer(where: Path, methods: str, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options, with the explainer that a run has trained where its method is asked for and no other is named.

    Args:
        where: A run folder, or a path in one.
        methods: As for :class:`Explainers`.
        options: By method; changed in place.
    """
    run = run_of(where)
    config = None if run is None else run / "explainer" / "config.json"
    if config is not None and config.is_file():
        kind = str((read_json(config).get("prunex") or {}).get("kind"))
        names = [name.strip() for name in methods.split(",")]
        if kind in names or ("all" in names and kind in [m.name for m in prunex.methods("explainer")]):
            options.setdefault(kind, {}).setdefault("explainer", str(config.parent))
    return options


def image_files(path: Path, besides: Path | None = None) -> list[Path]:
    """The images of a folder and its subfolders, sorted, or one image.

    Args:
        path: A folder or a file.
        besides: A folder whose files do not count: what an earlier call wrote.

    Raises:
        PrunexError: When there are none.
    """
    if is_there(path, Path.is_file):
        return [path]
    inside = path.rglob("*") if is_there(path, Path.is_dir) else ()
    files = sorted(p for p in inside if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
    if besides is not None and besides.resolve() != path.resolve():
        files = [p for p in files if not p.resolve().is_relative_to(besides.resolve())]
    if not files:
        raise PrunexError(f"no images in {path}: give a folder that holds {', '.join(IMG_EXTENSIONS)} files")
    return files


def check_out(out: Path, root: Path, files: Sequence[Path]) -> None:
    """Refuse a folder in which sheets would replace images, or anything that no earlier call wrote.

    Args:
        out: Where sheets go.
        root: The folder of the images, or one image.
        files: The images.

    Raises:
        PrunexError: By the file that would be lost, or where nothing can be written.
    """
    if out.resolve() == root.resolve():
        raise PrunexError(f"--out {out} is the folder of the images, among which sheets would lie: give another")
    ours = (out / "maps.npz").exists()
    images = {file.resolve() for file in files}
    for name in sheet_names(files, root):
        sheet = out / name
        if sheet.resolve() in images or (sheet.exists() and not ours):
            raise PrunexError(f"{sheet} is there already and no sheet of an earlier prunex explain: give another --out")
    there = next(p for p in (out, *out.resolve().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PrunexError(f"cannot write to {out}: {there} is no folder that may be written to; choose another --out")


def name_of_model(where: str) -> str:
    """What a model's own folder is called: by its run, its path or its timm name.

    >>> name_of_model("runs/digits-evit/version_0"), name_of_model("out/slim"), name_of_model("deit_tiny_patch16_224")
    ('digits-evit-version_0', 'out-slim', 'deit_tiny_patch16_224')
    >>> name_of_model("runs/digits-evit/version_0/checkpoints/epoch=1.ckpt")
    'digits-evit-version_0-epoch=1'
    """
    parts = Path(where).with_suffix("") if where.endswith(".ckpt") else Path(where)
    kept = [part for part in parts.parts if part not in ("/", "..", ".", "checkpoints")]
    return "-".join(kept[-3 if where.endswith(".ckpt") else -2 :]) or Path(where).resolve().name


def name_of(file: Path, root: Path) -> str:
    """An image's name below the folder that was given."""
    return file.name if file == root else file.relative_to(root).as_posix()


def sheet_names(files: Sequence[Path], root: Path) -> list[str]:
    """Where each image's sheet goes below the output folder; images that differ in their ending alone keep it.

    >>> sheet_names([Path("d/a.jpg"), Path("d/b.jpg"), Path("d/b.png")], Path("d"))
    ['a.png', 'b.jpg.png', 'b.png.png']
    """
    names = [Path(name_of(file, root)) for file in files]
    bare = [name.with_suffix("") for name in names]
    return [
        f"{(name if bare.count(short) > 1 else short).as_posix()}.png" for name, short in zip(names, bare, strict=True)
    ]


def batches(count: int, size: int) -> Iterator[range]:
    """The first image alone, since it shows what each method takes, then batches.

    >>> list(batches(6, 3))
    [range(0, 1), range(1, 4), range(4, 6)]
    """
    yield range(min(1, count))
    for start in range(1, count, size):
        yield range(start, min(start + size, count))


def preparation(vit: nn.Module) -> Callable[[Image.Image], tuple[Picture, Tensor]]:
    """How an image becomes a model's input: cropped to its shape at the centre, resized, normalised.

    Args:
        vit: A supported ViT of one or three channels; one of one channel sees the image's grey.

    Returns:
        A function from an RGB image to what the model sees, as uint8 [H, W, 3] and as float [C, H, W].

    Raises:
        PrunexError: For a model of another number of channels.
    """
    a = read(vit)
    if a.channels not in (1, 3):
        raise PrunexError(f"this model takes {a.channels} channels: only grey and RGB images can be read from files")
    known = getattr(vit, "pretrained_cfg", None) or {}
    mean, std = (list(known.get(key) or (0.5,) * a.channels)[: a.channels] for key in ("mean", "std"))
    height, width = a.image
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    def prepare(image: Image.Image) -> tuple[Picture, Tensor]:
        shown = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        if a.channels == 1:
            shown = shown.convert("L").convert("RGB")
        picture = np.array(shown)
        return picture, normalise(torch.from_numpy(picture).permute(2, 0, 1)[: a.channels])

    return prepare


def check_outputs(logits: Tensor) -> None:
    """Refuse a model that says nothing, before it is explained or scored.

    Raises:
        PrunexError: When an image's outputs are not finite.
    """
    if not logits.isfinite().all():
        raise PrunexError(
            "the model's outputs are NaN or infinite: its weights hold such values, or grow too large; take those of "
            "an earlier epoch"
        )


def _check_target(vit: nn.Module, target: int | None) -> None:
    """Refuse a class that the model does not have before every method does."""
    if target is None:
        return
    classes = read(vit).classes
    if classes == 0:
        raise PrunexError(f"--target {target}: this model has no classifier; leave --target out")
    choose_target(torch.zeros(1, classes), target)
