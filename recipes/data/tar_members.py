"""Images in tar files: where each lies, so that it can be read without the others."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from prunex.errors import PrunexError
from prunex.recipes.given import IMAGE_ENDINGS

_LABEL_BYTES = 2**12  # of a class's name


def read_members(path: Path) -> Iterator[tuple[str, int, int, int | str | None]]:
    """Images in an uncompressed tar file: name, offset and size, and what ``.cls`` says beside it, or None."""
    images, labels = [], {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                stem, ending = os.path.splitext(member.name)
                if not member.isfile():
                    continue
                if member.issparse():
                    raise ValueError(f"{member.name[:100]} has holes")
                if ending.lower() in IMAGE_ENDINGS:
                    images.append((member.name, member.offset_data, member.size))
                elif ending == ".cls" and member.size <= _LABEL_BYTES:
                    text = archive.extractfile(member).read().decode("utf-8").strip()  # type: ignore[union-attr]
                    labels[stem] = int(text) if text.isdecimal() else text
                # tarfile remembers all that it has seen.
                archive.members = []  # type: ignore[attr-defined]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise PrunexError(f"{path} is damaged, or compressed, in which nothing can be found: {error}") from error
    for name, offset, size in images:
        # What is written for an image goes by its name.
        if name.startswith("/") or ".." in name.split("/"):
            raise PrunexError(f"{path} holds '{name[:100]}', which leads out of a folder: take it out")
        yield name.removeprefix("./"), offset, size, labels.get(os.path.splitext(name)[0])
