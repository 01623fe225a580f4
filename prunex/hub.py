"""Names on the Hugging Face Hub, what is downloaded by them, and what is told when that fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prunex.errors import PrunexError

HUB = "hf-hub:"  # as timm calls it
# No name that could lead out of the cache: neither may begin with a dot or a slash, and no ".." is in a revision.
_NAME = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
_REVISION = re.compile(r"\w(?!.*\.\.)[\w./-]{0,199}")


def downloaded(address: str, files: Sequence[str]) -> Path:
    """The folder in huggingface_hub's cache with these files, and no others, of ``hf-hub:owner/name@revision``."""
    from huggingface_hub import snapshot_download

    repository, revision = read_name(address.removeprefix(HUB))
    # By name alone: nothing else of a repository is fetched, and so nothing of it can be run.
    with in_one_line(f"cannot download {address}"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))


def read_name(name: str) -> tuple[str, str | None]:
    """Repository and revision of ``owner/name@revision``.

    >>> read_name("me/deit-small-evit"), read_name("me/deit-small-evit@v1")
    (('me/deit-small-evit', None), ('me/deit-small-evit', 'v1'))
    """
    repository, at, revision = name.partition("@")
    if not _NAME.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
        raise PrunexError(f"name={name!r} is not allowed: give owner/name, such as me/deit-small-evit")
    return repository, revision or None


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Whatever the Hub, its library or the network say, as one line."""
    try:
        yield
    except Exception as error:  # of httpx, of huggingface_hub, and of the operating system, by version
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PrunexError(f"{what}: {type(error).__name__}: {reason}") from error
