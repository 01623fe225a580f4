"""The one exception for a user's mistake, and the helper that offers near names."""

from collections.abc import Iterable
from difflib import get_close_matches

from prunex.clash import check_ours

check_ours()  # all of ours comes by here
LONGEST = 3000  # letters of a message: what came may be megabytes


class PrunexError(ValueError):
    """Something the user passed cannot be used.

    The message is one line and says what was received, what is allowed and what to do.

    >>> raise PrunexError("keep_ratio=1.5 is not allowed: give a number in (0, 1]")
    Traceback (most recent call last):
    ...
    prunex.errors.PrunexError: keep_ratio=1.5 is not allowed: give a number in (0, 1]
    """

    def __init__(self, message: str) -> None:
        # A data loader's worker hands its error over with the whole traceback as text: only the last message counts.
        text = str(message).rsplit("PrunexError: ", 1)[-1]
        # One line: messages are read in terminals, logs and progress bars.
        line = " ".join(text.split())
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]} ...")


class OutOfReach(PrunexError):
    """A budget that this method cannot meet on this model, while another may."""


class Unfollowed(PrunexError):
    """A module does more round its ViT than can be followed, while the ViT itself is known."""


class Unreached(PrunexError):
    """A method needs gradients, and the model lets none through."""


class NothingDetected(PrunexError):
    """No object query of a detector is above the threshold."""


def unknown(what: str, received: object, allowed: Iterable[str]) -> PrunexError:
    """A ``PrunexError``, to be raised by the caller, for a name that is not known: it offers the nearest and lists all.

    >>> print(unknown("pruner", "evitt", ["evit", "topk"]))
    unknown pruner 'evitt': did you mean 'evit'? Known: evit, topk
    >>> print(unknown("option", "Keep-Ratio", ["keep_ratio", "stages"]))
    unknown option 'Keep-Ratio': did you mean 'keep_ratio'? Known: keep_ratio, stages
    """
    names = sorted(allowed)
    # Most near names are right names in another spelling.
    plain = {name.lower().replace("-", "_"): name for name in names}
    came = str(received)[:80].lower().replace("-", "_")  # no name is longer, while a model's text fills pages
    near = [plain[name] for name in ([came] if came in plain else get_close_matches(came, plain, n=2, cutoff=0.5))]
    hint = f" did you mean {' or '.join(map(repr, near))}?" if near else ""
    return PrunexError(f"unknown {what} {received!r}:{hint} Known: {', '.join(names) or 'none'}")
