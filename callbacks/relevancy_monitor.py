"""RelevancyMonitor: one picture an epoch of what the prediction rests on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import prunex
from prunex.callbacks.described import names_of
from prunex.callbacks.monitor import Monitor, explainers_of, log_share, moment, try_explainers
from prunex.metrics import energy_inside
from prunex.pictures import relevancy_mosaic
from prunex.vit.readout import classifies, outputs
from prunex.vit.surroundings import answering


class RelevancyMonitor(Monitor):
    """Explain, after every validation epoch, the predictions on a few fixed validation images.

    Writes ``maps/relevancy-epoch=NNN.png`` and, into ``maps/epoch=NNN.npz``, ``relevance/<method>`` float [M, gh, gw]
    and ``target/<method>`` [M]; sends the picture to every logger that takes images. On a pruned model it logs
    ``prunex/relevancy_kept/<method>``, the share of (positive) relevancy on patches that are still there at the end.
    The map is the pruned model's own, so that share says how much rests on tokens that left early, not whether the
    choice was right; chance is the keep ratio. With object masks it logs ``prunex/relevancy_on_object/<method>``.

    Args:
        methods: Names of explainers.
        images: How many validation images to watch.
        every_n_epochs: Watch every so many epochs.
        model: Dotted path of the ViT in the module, when it holds several.
        options: Options of the explainers, by name and by method: ``{"rollout": {"discard_ratio": 0.9}}``.
        mean: What the images are normalised by, see :class:`Monitor`.
        std: Likewise.

    Raises:
        PrunexError: For an unknown explainer or option, at once.
    """

    def __init__(
        self,
        methods: list[str] | None = None,
        images: int = 8,
        every_n_epochs: int = 1,
        model: str | None = None,
        options: dict[str, dict[str, Any]] | None = None,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
    ) -> None:
        super().__init__(images, every_n_epochs, model, mean, std)
        self.methods, self.options = explainers_of(methods, options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn before training whether the model can be explained by these methods.

        Raises:
            PrunexError: When a method refuses the ViT or its options.
        """
        if trainer.is_global_zero:
            try_explainers(answering(pl_module, self.vit(pl_module)), self.methods, self.options)

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Explain and draw."""
        call = self.answered(trainer, pl_module, batch)
        arrays: dict[str, np.ndarray] = {}
        kept: Tensor | None = None
        for name in self.methods:
            e = prunex.explain(name, call.vit, call.entered, **self.options.get(name, {}))
            arrays = arrays or self.common(trainer, call.vit, batch, (e.maps.shape[1], e.maps.shape[2]))
            arrays[f"relevance/{name}"] = e.maps.float().cpu().numpy()
            target = e.target if e.class_specific else torch.full_like(e.target, -1)  # -1: of no class
            arrays[f"target/{name}"] = target.cpu().numpy()
            if classifies(call.vit):  # without a classifier these are features
                arrays["predicted"] = e.logits.argmax(1).cpu().numpy()
            mass = e.maps.clamp(min=0)
            if e.trace.stages and not e.trace.pooled:
                kept = e.trace.kept()
                log_share(pl_module, self.key(f"prunex/relevancy_kept/{name}"), share_inside(mass, kept))
            if "masks" in batch:
                pixels = e.upsample().clamp(min=0).cpu()
                share = share_inside(pixels, batch["masks"])
                log_share(pl_module, self.key(f"prunex/relevancy_on_object/{name}"), share)
        names = names_of(trainer, pl_module, outputs(call.vit))
        picture = relevancy_mosaic(
            arrays["images"],
            {n: arrays[f"relevance/{n}"] for n in self.methods},
            None if kept is None else np.asarray(kept.cpu()),
            {n: arrays[f"target/{n}"] for n in self.methods},
            arrays.get("labels"),
            arrays.get("predicted"),
            names,
            arrays.get("masks"),
            title=f"{moment(trainer)[1]}: what the prediction rests on",
        )
        self.write(trainer, "relevancy", arrays, picture)


def share_inside(mass: Tensor, region: Tensor) -> float:
    """Share of each map's mass inside a region, mean over images with any mass and any region.

    Args:
        mass: float [B, h, w], not negative.
        region: bool [B, h, w].

    Returns:
        0..1; NaN when no image has both.
    """
    return float(energy_inside(mass, region).nanmean())
