"""What a step of a LightningModule gave its ViT, and the modules round it, to work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from prunex.vit.anatomy import ViT, find, head_classes


class StepWatch:
    """Looks on while one step runs, and notes which images entered the ViT and which the modules round it.

    Args:
        module: The LightningModule.
        path: Dotted path of the ViT in it, when it holds several.
    """

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


def input_kind(vit: ViT) -> tuple[Any, ...]:
    """What images a ViT takes and how many classes it has; images kept from before fit as long as it is the same."""
    embed: Any = vit.patch_embed
    size = None if getattr(vit, "dynamic_img_size", False) else tuple(embed.img_size)
    return size, tuple(embed.patch_size), embed.proj.in_channels, head_classes(vit)
