"""RelevancyMonitor: one picture an epoch of what the prediction rests on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from prunex.callbacks.described import names_of
from prunex.callbacks.monitor import ExplainingMonitor, log_share
from prunex.callbacks.run_folder import moment
from prunex.metrics import energy_inside
from prunex.pictures import relevancy_mosaic
from prunex.targets import Function, MultiLabel
from prunex.vit.readout import classifies, outputs


class RelevancyMonitor(ExplainingMonitor):
    """Explain, after every validation epoch, the predictions on a few fixed validation images.

    Writes ``maps/relevancy-epoch=NNN.png`` and, into ``maps/epoch=NNN.npz``, ``relevance/<method>`` float [M, gh, gw]
    and, where a class is explained, ``target/<method>`` [M]; sends the picture to every logger that takes images. On
    a pruned model it logs ``prunex/relevancy_kept/<method>``, the share of (positive) relevancy on patches that are
    still there at the end. The map is the pruned model's own, so that share says how much rests on tokens that left
    early, not whether the choice was right; chance is the keep ratio. With object masks it logs
    ``prunex/relevancy_on_object/<method>``.

    Args:
        methods: Names of explainers.
        images: As all monitors', see :class:`~prunex.callbacks.monitor.Monitor`; so are those left out here.
        options: Of the explainers, by method: ``{"rollout": {"discard_ratio": 0.9}}``.
        target: What is explained in place of the predicted class: a class, "contrast:3,5", "margin", "entropy",
            "regression:0", several "labels:1,4" with a map each, an object of :mod:`prunex.targets` or a function of
            the model's output. Maps and numbers then go by ``<method>:<target>``.

    Raises:
        PrunexError: For an unknown explainer, option or target, at once; for one that the model has not, before
            training.
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
        target: str | int | Function | MultiLabel | None = None,
    ) -> None:
        super().__init__(methods, options, images, every_n_epochs, model, mean, std, target=target)

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Explain and draw."""
        call = self.answered(trainer, pl_module, batch)
        arrays: dict[str, np.ndarray] = {}
        kept: Tensor | None = None
        names: list[str] = []
        for _, name, e in self.explained(call.vit, call.entered):
            names.append(name)
            arrays = arrays or self.common(trainer, call.vit, batch, (e.maps.shape[1], e.maps.shape[2]))
            arrays[f"relevance/{name}"] = e.maps.float().cpu().numpy()
            target = e.target if e.class_specific else torch.full_like(e.target, -1)  # -1: of no class
            if e.function is None:
                arrays[f"target/{name}"] = target.cpu().numpy()
            if classifies(call.vit) and e.function is None:  # without a classifier these are features
                arrays["predicted"] = e.logits.argmax(1).cpu().numpy()
            if e.trace.stages and not e.trace.pooled:
                kept = e.trace.kept()
                share = share_inside(e.maps.clamp(min=0), kept)
                log_share(pl_module, self.key(f"prunex/relevancy_kept/{name}"), share)
            # Masks are finer than patches, so the map is taken to their size and not they to its.
            if "masks" in batch:
                share = share_inside(e.upsample().clamp(min=0).cpu(), batch["masks"])
                log_share(pl_module, self.key(f"prunex/relevancy_on_object/{name}"), share)
        picture = relevancy_mosaic(
            arrays["images"],
            {n: arrays[f"relevance/{n}"] for n in names},
            None if kept is None else np.asarray(kept.cpu()),
            {n: arrays[f"target/{n}"] for n in names if f"target/{n}" in arrays},
            arrays.get("labels"),
            arrays.get("predicted"),
            names_of(trainer, pl_module, outputs(call.vit)),
            arrays.get("masks"),
            title=f"{moment(trainer)[1]}: what the prediction rests on",
        )
        self.write(trainer, "relevancy", picture, arrays)


def share_inside(mass: Tensor, region: Tensor) -> float:
    """Share of each map's mass [B, h, w] inside a region [B, h, w], mean over images with both, in 0..1; else NaN."""
    return float(energy_inside(mass, region).nanmean())
