"""What users give, as far as it can be judged without torch: paths, names of weights and models, ranges of pixels."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunex.errors import PrunexError
from prunex.files import is_there
from prunex.hub import HUB, read_name

# Whatever is imported here, --help waits for.
SHIPPED = files("prunex.recipes") / "weights"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
TABLES = (".txt", ".csv", ".parquet")  # files that name images
MOST_SHARDS = 100_000
FULL_RANGE = 2**16 - 1


def shipped_weights() -> list[str]:
    """Names of the weights that come with the package.

    >>> "digits" in shipped_weights()
    True
    """
    return sorted(f.name.removesuffix(".safetensors") for f in SHIPPED.iterdir() if f.name.endswith(".safetensors"))


def check_weights(weights: str) -> Path | None:
    """The file that weights lie in; None where they are shipped under that name."""
    path = Path(weights).expanduser()
    if is_there(path, Path.is_file):
        return path
    if weights in shipped_weights():
        return None
    raise PrunexError(
        f"weights={weights!r} is neither a file nor shipped: give the path of a safetensors file or one of "
        f"{', '.join(shipped_weights()) or 'none'}"
    )


def check_folder(run: str | Path) -> Path:
    """A run's folder; PrunexError where it is none."""
    if not is_there(Path(run), Path.is_dir):
        raise PrunexError(f"{run} is no folder: give a run folder, such as runs/digits-dynamicvit/version_0")
    return Path(run)


def on_hub(where: str) -> str | None:
    """What a model on the Hugging Face Hub is called without its owner; None for what is no ``hf-hub:owner/name``.

    >>> on_hub("hf-hub:me/deit-small-evit@v1"), on_hub("runs/digits-evit/version_0")
    ('deit-small-evit', None)
    """
    return read_name(where.removeprefix(HUB))[0].partition("/")[2] if where.startswith(HUB) else None


def check_run(where: str) -> None:
    """Refuse what is neither a folder nor a model on the Hub by name."""
    if on_hub(where) is None:
        check_folder(where)


def check_model(
    where: str, weights: str | None = None, image_size: int | None = None, pretrained: bool = False
) -> None:
    """Refuse what is no path, model on the Hub or timm model with weights, and a timm model's options beside others."""
    named = on_hub(where) is not None
    if named or is_there(Path(where)):
        for flag, given in (("--weights", weights), ("--img-size", image_size), ("--pretrained", pretrained or None)):
            if given is not None:
                what = "a model on the Hub" if named else "a path"
                raise PrunexError(f"{flag} goes with a timm model name, and {where} is {what}: leave it out")
    elif weights is not None:
        check_weights(weights)
    # What follows a dot in timm's names is a tag of weights.
    elif not pretrained and _is_timms(where.split(".")[0]):
        raise PrunexError(
            f"{where} is a timm model name without weights: give --weights FILE.safetensors (nothing is downloaded "
            "unless --pretrained asks for it)"
        )
    elif not pretrained:
        raise PrunexError(
            f"{where} is neither a path nor a timm model name: give a run folder, such as "
            "runs/digits-dynamicvit/version_0, a slim folder, a checkpoint, hf-hub:owner/name, or a timm model name "
            "with --weights FILE"
        )


def check_checkpoint_path(path: str) -> None:
    """Refuse an address and a file that is not there; an interpolation, ``last`` and the like are Lightning's."""
    if "://" in path:
        raise PrunexError(
            f"--ckpt_path {path} is an address, and what is downloaded could run code: download it, and give the file"
        )
    # These are for Lightning to find, or depend on what else the config says.
    resolved_later = path in ("", "null", "last", "best", "hpc", "registry") or path.startswith(("registry:", "${"))
    if not resolved_later and not is_there(Path(path), Path.is_file):
        raise PrunexError(f"--ckpt_path {path[:200]}: there is no such file; give a checkpoint, or last")


def _is_timms(name: str) -> bool:
    timm = find_spec("timm")
    # By its text: importing timm takes seconds.
    if timm is None or timm.origin is None or not name.isidentifier():
        return False
    sources = (Path(timm.origin).parent / "models").glob("*.py")
    texts = (source.read_text(encoding="utf-8") for source in sources)
    return any(f"def {name}(" in text or f"'{name}'" in text for text in texts)


def check_range(value: Any, name: str = "value_range") -> int | None:
    """The largest value of pixels of 16 bits, as a user gave it: a whole number in [255, 65535], or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 255 <= value <= FULL_RANGE):
        raise PrunexError(
            f"{name}={value!r} is not allowed: give the largest value that pixels can have, such as 4095 for 12 bits"
        )
    return value


def is_dataset(path: Path) -> bool:
    """Whether Hugging Face's datasets wrote a folder, or one of several splits."""
    return is_there(path / "dataset_info.json", Path.is_file) or is_there(path / "dataset_dict.json", Path.is_file)


def tar_files(given: str) -> list[Path]:
    """The tar files that are meant: one, all of a folder that holds some, or as in ``shards-{000..011}.tar``.

    >>> [path.name for path in expand("a-{08..10}.tar")]
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    path = Path(given)
    if is_there(path, Path.is_dir):
        return sorted(each for each in path.glob("*.tar") if each.is_file())
    if path.suffix.lower() != ".tar":
        return []
    files = expand(given)
    for file in files:
        if not is_there(file, Path.is_file):
            raise PrunexError(f"--images {given}: there is no file {file}")
    return files


def expand(given: str) -> list[Path]:
    """Paths with numbers from one to another in the place of ``{000..011}``."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", given)
    if braces is None:
        return [Path(given)]
    first, last = braces.groups()
    # Before the names are made, which would fill the memory.
    if int(last) - int(first) >= MOST_SHARDS:
        raise PrunexError(f"--images {given} names more than {MOST_SHARDS:,} files")
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [path for n in numbers for path in expand(f"{given[: braces.start()]}{n}{given[braces.end() :]}")]


def image_files(path: Path, besides: Path | None = None) -> list[Path]:
    """The images of a folder and its subfolders, sorted, or one image; what lies in ``besides`` does not count."""
    if is_there(path, Path.is_file):
        return [path]
    return [path / name for name in image_names(path, besides)]


def image_names(folder: Path, besides: Path | None = None, least: int = 1) -> list[str]:
    """What :func:`image_files` gives, as paths below the folder: of a million images in seconds."""
    left_out = None if besides is None or besides.resolve() == folder.resolve() else os.path.realpath(besides)
    names: list[str] = []
    waiting = [""] if is_there(folder, Path.is_dir) else []
    while waiting:
        below = waiting.pop()
        # Only folders are resolved, once each, and what is a link.
        real = "" if left_out is None else os.path.realpath(folder / below)
        with os.scandir(folder / below) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if left_out is None or os.path.join(real, entry.name) != left_out:
                        waiting.append(f"{below}{entry.name}/")
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_ENDINGS and entry.is_file():
                    outside = left_out is None or not entry.is_symlink()
                    if outside or not _lies_in(os.path.realpath(entry), str(left_out)):
                        names.append(below + entry.name)
    if len(names) < least:
        raise PrunexError(f"no images in {folder}: give a folder that holds {', '.join(IMAGE_ENDINGS)} files")
    # In the order of paths, which compare part by part: "a/b.png" before "a.png".
    return sorted(names, key=lambda name: name.replace("/", "\0"))


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
