"""What a step of a LightningModule gave its ViT, and the modules round it, to work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from prunex.batches import Parts
from prunex.vit.anatomy import ViT, channels_of, find, head_classes


class StepWatch:
    """Looks on while one step runs, and notes which images entered the ViT and which the modules round it."""

    def __init__(self, module: LightningModule, path: str | None = None) -> None:
        self.path, self.vit = find(module, path)
        self.entered: list[Tensor] = []
        self.calls: dict[str, list[Tensor | None]] = {}  # by path; None for a call on more than one tensor
        self._undo: list[Callable[[], Any]] = []
        if getattr(module, "_compiler_ctx", None) is not None:
            return  # a compiled step knows no new hooks
        steps = self.path.split(".")
        for name in ("", *(".".join(steps[: i + 1]) for i in range(len(steps)))):
            self._hook(name, module.get_submodule(name))
        # Not the ViT's own call: forward_features and blocks that are called one by one come by here as well.
        handle = self.vit.patch_embed.register_forward_pre_hook(self._enters)
        self._undo.append(handle.remove)

    def outermost(self) -> tuple[str, Tensor] | None:
        """The outermost module round the ViT that was called once, on one tensor, with its path; or None."""
        for name, calls in self.calls.items():
            if len(calls) == 1 and calls[0] is not None:
                return name, calls[0]
        return None

    def close(self) -> None:
        """Look no longer; harmless when done already."""
        while self._undo:
            self._undo.pop()()

    def _enters(self, embed: nn.Module, args: Any) -> None:
        if self._undo and embed is self.vit.patch_embed:
            self.entered.append(args[0])

    def _hook(self, name: str, watched: nn.Module) -> None:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._undo and module is watched:  # no copy that was made meanwhile
                given = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
                self.calls.setdefault(name, []).append(given)

        self._undo.append(watched.register_forward_pre_hook(note, with_kwargs=True).remove)


def watched_part(step: StepWatch, batch: Parts, who: str) -> tuple[str | None, dict[str, Tensor], list[str]]:
    """What is collected of a step, through which module it is explained, and what there is to say about it.

    Returns the path of the outermost module that answers for the images that entered the ViT (None: the ViT alone); of
    these "images", "given" (what that module was called on), "batch" (the loader's), "labels" or "multi_hot", and
    "masks"; warnings.
    """
    kind, outermost, complaints = type(step.vit).__name__, step.outermost(), []
    through: str | None
    if len(step.entered) == 1 and outermost is not None and len(outermost[1]) == len(step.entered[0]):
        images, (through, given) = step.entered[0], outermost
    elif step.entered:
        images = given = step.entered[0]
        through = None
        if len(step.entered) > 1:
            complaints.append(
                f"{who}: a validation step runs the {kind} {len(step.entered)} times (views, crops): the images of "
                "the first time are watched, and its own output"
            )
    else:
        images = given = batch.need("images", who, "the validation batch")
        through = ""
        complaints.append(
            f"{who}: the validation step does not run the {kind} (or is compiled, or runs a copy): the images of "
            "the batch are watched"
        )
    complaints += [f"{who} leaves {name} out: {why}" for name, why in batch.unclear.items() if name != "images"]
    # What entered the ViT as it was given is held once.
    part = {"images": images}
    if given is not images:
        part["given"] = given
    if through and len(batch.get("images", ())) == len(images):
        part["batch"] = batch["images"]  # for a forward that was called as such, which no hook sees
    for name in ("labels", "multi_hot", "masks"):
        if name not in batch:
            continue
        rows = batch[name]
        if len(rows) == len(images) and (name != "masks" or rows.shape[1:] == images.shape[2:]):
            part[name] = rows
        else:
            complaints.append(f"{who} leaves {name} {list(rows.shape)} out: {list(images.shape)} entered the {kind}")
    return through, part, complaints


def input_kind(vit: ViT) -> tuple[Any, ...]:
    """What images a ViT takes and how many classes it has; images kept from before fit as long as it is the same."""
    embed: Any = vit.patch_embed
    size = None if getattr(vit, "dynamic_img_size", False) else tuple(embed.img_size)
    return size, tuple(embed.patch_size), channels_of(embed), head_classes(vit)
