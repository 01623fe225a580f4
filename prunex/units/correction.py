"""Correction: the weights that are left make up for the units that were taken out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, window_partition
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import check_choice
from prunex.errors import PrunexError
from prunex.units.batches import undisturbed
from prunex.units.moments import Moments
from prunex.vit.mount import mounted
from prunex.vit.units import KINDS as BRANCHES
from prunex.vit.units import Branch, Kind, branches, last_layer, tokens_in
from prunex.vit.weights import OwnHook
from prunex.vit.widths import WidthSpec, places

Correct = Literal["bias", "refit"]
KINDS: tuple[Correct, Correct] = ("bias", "refit")
RIDGE = 1e-2  # of the mean square of a layer's inputs
_NOTED = "prunex_correction"  # the attribute of a model that says how it was corrected


class Cut(NamedTuple):
    """What becomes of a branch's units: which are left, and which are missed, bool [units] each."""

    branch: Branch
    kept: Tensor
    lost: Tensor


@dataclass(frozen=True)
class Mended:
    """What a correction did to one branch. Errors are of its output, mean squares over channels and tokens.

    Attributes:
        block: The block's number, counted among the blocks that the model had.
        kind: "heads" or "channels".
        units: How many units there were.
        lost: How many of them are missed.
        variance: Of the output, before anything was taken out.
        before: Error without a correction.
        after: Error with it, on the same images.
    """

    block: int
    kind: Kind
    units: int
    lost: int
    variance: float
    before: float
    after: float


@dataclass(frozen=True, repr=False)
class Correction(Brief):
    """How a model's weights made up for the units that were taken out: :func:`prunex.correction` gives it.

    Attributes:
        kind: "bias" or "refit".
        images: How many images were looked at.
        branches: What was done to each branch.

    >>> Correction("refit", 64, (Mended(0, "channels", 384, 192, 2.0, 1.0, 0.25),)).summary()
    'refit on 64 images: the error of 1 branch is 12.5 % of its variance, 50.0 % before'
    """

    kind: Correct
    images: int
    branches: tuple[Mended, ...]

    def summary(self) -> str:
        """One line: the mean of all branches' errors, as shares of the variances of what they give."""
        count = len(self.branches)
        before = sum(_share(m, "before") for m in self.branches) / max(1, count)
        after = sum(_share(m, "after") for m in self.branches) / max(1, count)
        what = "1 branch is" if count == 1 else f"{count} branches is on average"
        return (
            f"{self.kind} on {self.images} images: the error of {what} {after:.1%} of its variance, {before:.1%} before"
        ).replace("%", " %")

    def table(self) -> str:
        """One line a branch, as Markdown: errors as shares of the variance of what it gives."""
        rows = ["| block | units taken out | error without correction | with it |", "|---|---|---|---|"]
        for m in self.branches:
            shares = " | ".join(f"{100 * _share(m, name):.1f} %" for name in ("before", "after"))
            rows.append(f"| {m.block} | {m.lost} of {m.units} {m.kind} | {shares} |")
        return "\n".join(rows)

    def plain(self) -> dict[str, Any]:
        """In values that JSON holds."""
        return {"kind": self.kind, "images": self.images, "branches": [vars(m) for m in self.branches]}

    @classmethod
    def read(cls, values: Any) -> Correction:
        """From :meth:`plain`'s values; anything else is refused."""
        try:
            kind, images, listed = (values[name] for name in ("kind", "images", "branches"))
            made = tuple(Mended(**row) for row in listed)
            counts = [images, *(n for m in made for n in (m.block, m.units, m.lost))]
            errors = [x for m in made for x in (m.variance, m.before, m.after)]
            # By type: JSON's true is an int to isinstance.
            if any(type(n) is not int or n < 0 for n in counts) or any(type(x) not in (int, float) for x in errors):
                raise ValueError("what must be a number is none")
            if kind not in KINDS or any(m.kind not in BRANCHES for m in made):
                raise ValueError("a kind is unknown")
        except (KeyError, TypeError, ValueError) as error:
            raise PrunexError(f"this is no correction ({error}): give what Correction.plain wrote") from error
        return cls(kind, images, made)


def _share(mended: Mended, name: str) -> float:
    return getattr(mended, name) / mended.variance if mended.variance > 0 else 0.0


def correction(model: nn.Module) -> Correction | None:
    """How a slim model was corrected (``prunex.slim(model, correct=...)``), as it says itself; None where it was not.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32)
    >>> widths, images = prunex.WidthSpec(channels={0: range(384)}), torch.randn(64, 3, 32, 32)
    >>> done = prunex.correction(prunex.slim(model, widths=widths, correct="refit", images=images))
    >>> [(m.block, m.kind, m.lost, m.after < m.before) for m in done.branches]
    [(0, 'channels', 384, True)]
    """
    noted: Correction | None = vars(model).get(_NOTED)
    return noted


def note(model: nn.Module, done: Correction) -> None:
    """Write down on a model how it was corrected."""
    model.__dict__[_NOTED] = done


def check_correct(correct: Any) -> Correct | None:
    """The kind of correction asked for: True is "refit", None and False are none.

    >>> check_correct(True), check_correct("bias"), check_correct(None)
    ('refit', 'bias', None)
    """
    if correct is None or isinstance(correct, bool):
        return "refit" if correct else None
    check_choice("correct", correct, KINDS)
    kind: Correct = correct
    return kind


def cuts_of(model: nn.Module, spec: WidthSpec) -> list[Cut]:
    """What a spec takes out of a model, branch by branch."""
    kept, cuts = places(model, spec), []
    for b in branches(model):
        left: Sequence[int] = getattr(kept, b.kind).get(b.block, range(b.units))
        open_ = torch.zeros(b.units, dtype=torch.bool)
        open_[list(left)] = True
        cuts.append(Cut(b, open_, ~open_))
    return cuts


def check_biases(model: nn.Module, listed: Iterable[Branch], correct: Correct) -> None:
    """Refuse, by name, layers that have no bias where a correction changes nothing else."""
    if correct != "bias":
        return
    for b in listed:
        layer = last_layer(model.get_submodule(b.path), b.kind)
        if getattr(layer, "bias", None) is None:
            name = next(name for name, m in model.named_modules() if m is layer)
            raise PrunexError(
                f"correct='bias': {name} has no bias to add the mean of what is taken out to; use correct='refit'"
            )


def make_up(
    model: Any,
    cuts: Sequence[Cut],
    batches: Iterable[Tensor],
    correct: Correct,
    expected: int | None = None,
    ridge: float = RIDGE,
) -> Correction:
    r"""Change what is left of some layers, in place, so that it gives what they gave before; one pass over images.

    With h the input of the layer behind the units (``proj`` or ``fc2``), W and b its weight and bias, K the units kept
    and R those lost, mu and C mean and covariance of h over all tokens of all images:

    * "bias" (VBP, ICCV 2025, arXiv 2507.12988): ``b' = b + W_R mu_R``. The mean of the output is kept exactly; the
      error left is ``trace(W_R C_RR W_R^T)``.
    * "refit" (as CORP, arXiv 2602.05243, is read here: from its abstract, **unverified**): h_R is predicted from h_K
      by least squares with an intercept and a ridge, ``B = (C_KK + lambda I)^-1 C_KR``, and what W_R makes of the
      prediction is added: ``W' = W_K + W_R B^T``, ``b' = b + W_R (mu_R - B^T mu_K)``. The error is the smallest that
      any W', b' have but for the ridge, whose limit is "bias"; lambda is ``ridge`` times the mean of C's diagonal.
    * "refit" of a layer without a bias (OSSCAR, ICML 2024, arXiv 2403.12983, on units chosen before): no intercept,
      E[h h^T] in the place of C.

    All statistics are of the model as it comes in: what an earlier block's units lost is not seen by a later block.
    Means are of all tokens. Where it is known that there will be more than ten thousand, and ten for each input kept,
    covariances are of every n-th of them, so that a refit costs less than the forwards. Mean errors stay exactly 0.

    The columns of units that are not kept become 0, so that the model computes the same with and without their gates.

    Args:
        model: A backbone whose gates, where it has any, let through the kept and the lost units. Of its mode, random
            states and traces nothing changes.
        cuts: Of its branches; those that lose nothing are left as they are, bit for bit.
        batches: Images [B, C, H, W] as they enter the model, on its device.
        correct: The kind.
        expected: About how many images there will be, where that is known.
        ridge: Of a refit, at least 0.

    Raises:
        PrunexError: For values that are not finite, or a layer that no image reached; nothing is changed then.
    """
    lossy = [cut for cut in cuts if bool(cut.lost.any())]
    layers: list[Any] = [last_layer(model.get_submodule(c.branch.path), c.branch.kind) for c in lossy]
    seen = [_moments(cut, layer, correct) for cut, layer in zip(lossy, layers, strict=True)]
    images = _look(model, lossy, layers, seen, batches, expected) if lossy else 0
    _check(model, layers, seen)
    # All are solved before any is written: a layer that cannot be fitted leaves the model as it came.
    changes = [
        moments.refit(layer.bias is not None, ridge) if correct == "refit" else None
        for layer, moments in zip(layers, seen, strict=True)
    ]
    rows = []
    for cut, layer, moments, change in zip(lossy, layers, seen, changes, strict=True):
        shift = moments.shift(change) if layer.bias is not None else None
        before, after = moments.error(None, None), moments.error(change, shift)
        b = cut.branch
        rows.append(Mended(b.block, b.kind, b.units, int(cut.lost.sum()), moments.variance, before, after))
        _write(layer, cut, change, shift)
    return Correction(correct, images, tuple(rows))


def _check(model: nn.Module, layers: Sequence[nn.Module], seen: Sequence[Moments]) -> None:
    """Refuse what nothing can be fitted to, and tell of fits to fewer tokens than there are coefficients."""
    names = {id(m): name for name, m in model.named_modules()}
    named = [(names[id(layer)], moments) for layer, moments in zip(layers, seen, strict=True)]
    for name, moments in named:
        moments.check(name)
    scarce = [(name, moments) for name, moments in named if moments.scarce]
    if scarce:
        name, least = scarce[0]
        warnings.warn(
            f"{len(scarce)} layers are refitted by fewer tokens than they have inputs left, such as {name} "
            f"({least.rows} for {len(least.kept)}), which fits these images and no others: give ten tokens an input",
            stacklevel=6,
        )


def _moments(cut: Cut, layer: Any, correct: Correct) -> Moments:
    kept, lost = (units.repeat_interleave(cut.branch.width).nonzero().flatten() for units in (cut.kept, cut.lost))
    return Moments(layer.weight.detach(), kept, lost, covariance=correct == "refit")


def _look(
    model: Any,
    cuts: Sequence[Cut],
    layers: Sequence[nn.Module],
    seen: Sequence[Moments],
    batches: Iterable[Tensor],
    expected: int | None,
) -> int:
    """Run the model on images, and let each layer's inputs and outputs be added up; how many images there were."""
    hooks = []
    for cut, layer, moments in zip(cuts, layers, seen, strict=True):
        real = _real(model, cut.branch)
        hooks.append(layer.register_forward_hook(OwnHook(_add, moments, real)))
    tokens: Any = mounted(model)
    # Of images that keep other numbers of tokens, one alone has no empty slots.
    apart = tokens is not None and tokens.pruner.count == "adaptive"
    count = 0
    try:
        with undisturbed(model, graph=False):
            for images in batches:
                for some in images.split(1) if apart else [images]:
                    if count == 0:
                        # Which rows covariances are taken from is settled by the first that come.
                        for moments in seen:
                            moments.ahead = max(1.0, (expected or 0) / len(some))
                    model(some)
                    count += len(some)
    finally:
        for hook in hooks:
            hook.remove()
    return count


def _add(moments: Moments, real: Tensor | None, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    x, y = args[0], output
    # Swin stacks its windows image by image, and every image is padded alike.
    if real is not None:
        windows = real.repeat(len(x) // len(real), 1)
        x, y = x[windows], y[windows]
    moments.add(x.flatten(0, -2), y.flatten(0, -2))


def _real(model: Any, branch: Branch) -> Tensor | None:
    """Which slots of a Swin's windows hold a token of the image, bool [windows, slots]; None where all do."""
    if branch.kind == "channels" or not isinstance(model, SwinTransformer):
        return None
    block: Any = model.get_submodule(branch.path)
    padded, real, slots = tokens_in(model, block)
    if padded == real:
        return None
    (h, w), (wh, ww) = block.input_resolution, block.window_size
    # timm pads the grid to whole windows, below and to the right.
    grid = F.pad(torch.ones(1, h, w, 1), (0, 0, 0, -w % ww, 0, -h % wh))
    windows = window_partition(grid, block.window_size).reshape(-1, slots) > 0
    return windows.to(next(model.parameters()).device)


@torch.no_grad()
def _write(layer: Any, cut: Cut, change: Tensor | None, shift: Tensor | None) -> None:
    """Add to the kept columns and to the bias, in float64; the others become 0."""
    weight = layer.weight
    columns = cut.kept.repeat_interleave(cut.branch.width).to(weight.device)
    wide = weight.double() * columns
    if change is not None:
        wide[:, columns] += change.to(wide.device)
    weight.copy_(wide)
    if shift is not None:
        layer.bias.copy_(layer.bias.double() + shift.to(wide.device))
