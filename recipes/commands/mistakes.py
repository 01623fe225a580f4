"""Whatever went wrong as one line, where it is the user's to put right; known by names, so that nothing is imported."""

from __future__ import annotations

import errno

from prunex.errors import PrunexError

DEBUG = "PRUNEX_DEBUG"  # the environment variable with which mistakes have their tracebacks


def as_mistake(error: BaseException) -> PrunexError | None:
    """The one line behind an error; None where it is a fault of the program's."""
    mistake = find_mistake(error) or parse_mistake(error) or _file_mistake(error)
    if mistake is None and type(error).__name__ == "MisconfigurationException":
        # Lightning's, about how it is used, such as data without a loader for this command.
        mistake = PrunexError(str(error)[:400])
    return mistake


def find_mistake(error: BaseException | None) -> PrunexError | None:
    """The user's mistake behind an error; jsonargparse raises its own over whatever a constructor raised."""
    # jsonargparse hides what a constructor raised behind its own errors.
    while error is not None and not isinstance(error, PrunexError):
        error = error.__cause__ or error.__context__
    return error


def parse_mistake(error: BaseException) -> PrunexError | None:
    """What jsonargparse says is wrong with an option; None for any other error."""
    if type(error).__name__ not in ("ArgumentError", "ParserError"):
        return None
    # Its text lists every type that was tried; what a reader can use is the reason and the value.
    lines = [line.strip(" -\t") for line in str(error).splitlines()]
    noise = ("Subtypes:", "Errors:", "Given value", "Expected a <class 'None")
    reasons = [line for line in lines if line and not line.startswith(noise)]
    given = [line for line in lines if line.startswith("Given value:")]
    return PrunexError("; ".join([*reasons[:4], *given[-1:]])[:400] + "; see prunex fit --help")


def _file_mistake(error: BaseException) -> PrunexError | None:
    """What the file system refused, naming the file."""
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
    # Without a file nobody could tell what to do about it.
    if error.filename is None and not full:
        return None
    advice = "; make room or choose another folder, then go on with the same command and --ckpt_path last"
    return PrunexError(f"{str(error.filename or 'a file')[:200]}: {error.strerror}{advice if full else ''}")
