"""Files and their names: what is there, and files that are whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from prunex.errors import PrunexError

DRAFT = ".draft-"


def is_there(path: Path, what: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether a path exists (or what is asked of it); one that no file system takes does not."""
    try:
        return what(path)
    except (OSError, ValueError):  # a name that is too long, a zero byte
        return False


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in one, sorted, but for those that notebooks and macOS hide there."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def readable(text: str) -> str:
    r"""A name as pictures and pages can show it: bytes that are no text, as a file's name may hold, become ``\udcff``.

    >>> readable("ant"), len(readable("\udcff"))
    ('ant', 6)
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_whole(path: Path, content: bytes | Callable[[Path], object]) -> Path:
    """Write a file so that a reader, or whoever comes after a crash, sees all of it or what was there before.

    ``content`` are its bytes, or what writes them to the path it is given; missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file: a rename is one step, and works within one file system alone.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{DRAFT}{path.stem}-", suffix=path.suffix)
    os.close(handle)
    draft = Path(name)
    try:
        if callable(content):
            content(draft)
        else:
            draft.write_bytes(content)
        # The mask can only be read by setting it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(draft, 0o666 & ~mask)  # mkstemp makes files that only their owner may read
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return path


def write_or_refuse(path: Path, write: Callable[[Path], object]) -> Path:
    """As :func:`write_whole`, for a path that a user gave: what the system says is told in one line."""
    try:
        return write_whole(path, write)
    except OSError as error:
        raise PrunexError(f"cannot write to {path}: {error.strerror or error}; choose another folder") from error


def put_in_place(draft: Path, path: Path) -> None:
    """Give a whole file or folder its name, in the place of one that has it."""
    # No file system replaces a folder that is not empty by a rename.
    if path.is_dir():
        old = path.with_name(f"{DRAFT}old-{path.name}")
        path.rename(old)
        draft.rename(path)
        shutil.rmtree(old)
    else:
        os.replace(draft, path)


def remove_drafts(folder: Path) -> list[Path]:
    """Remove, from a folder and those in it, the drafts that a killed process left; give back what they were."""
    drafts = list(folder.rglob(f"{DRAFT}*")) if folder.is_dir() else []
    for path in drafts:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return drafts
