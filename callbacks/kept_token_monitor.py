"""KeptTokenMonitor: one picture an epoch of which patches the model keeps."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import prunex
from prunex.callbacks.described import names_of, warn_once
from prunex.callbacks.monitor import Monitor, log_share
from prunex.callbacks.run_folder import moment
from prunex.callbacks.token_pruning import decisions
from prunex.pictures import kept_mosaic, share_mosaic
from prunex.vit.aside import as_found
from prunex.vit.forward import record
from prunex.vit.readout import classifies, outputs
from prunex.vit.tape import Tape


class KeptTokenMonitor(Monitor):
    """Draw, after every validation epoch, what each stage keeps of a few fixed validation images.

    Writes ``maps/kept_tokens-epoch=NNN.png`` and, into ``maps/epoch=NNN.npz``, ``kept`` bool [S, M, gh, gw], ``share``
    float [M, gh, gw], ``predicted`` [M], ``images``, ``labels`` and ``masks``; sends the picture to TensorBoard, W&B,
    MLflow and Comet loggers. Where tokens were merged, ``kept`` are the patches alone in their token, and ``groups``
    int [S, M, gh, gw] says which token each patch is part of. Where batches hold object masks, logs
    ``prunex/object_kept``, the share of the patches that touch the object which are still there at the end.

    A method that pools (``hvt``) keeps no patch as itself: the picture then shows how large a part each patch has in
    the tokens, and ``kept`` and the logged share are left out.

    In ``trainer.validate`` files are called ``validate`` in place of the epoch. Arguments are those of all monitors:
    :class:`~prunex.callbacks.monitor.Monitor` tells them.
    """

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Run the images once and draw."""
        vit = self.vit(pl_module)
        pruning = prunex.attached(vit)
        if pruning is None:
            warn_once(trainer, "KeptTokenMonitor: nothing prunes this model, so nothing is drawn: add TokenPruning")
            return
        # One forward for everything: the trace says what was kept, the tape what was predicted.
        call, tape = self.answered(trainer, pl_module, batch), Tape()
        with as_found(call.vit, train=False), torch.no_grad():
            trace = record(call.vit, call.entered, tape).trace
        arrays = self.common(trainer, vit, batch, trace.grid)
        arrays["share"] = trace.share().float().cpu().numpy()
        all_patches = torch.ones(len(call.entered), *trace.grid)
        made = decisions(trace, pruning.pruner.stages)  # None: all patches are there yet
        if not trace.pooled:
            kept = [all_patches.bool() if i is None else trace.kept(i).cpu() for i in made]
            arrays["kept"] = torch.stack(kept).numpy()
        if trace.merges():
            # Before the first merge every patch is a group of its own.
            alone = torch.arange(all_patches[0].numel()).view(trace.grid).expand_as(all_patches)
            groups = [alone if i is None else trace.groups(i).cpu() for i in made]
            arrays["groups"] = torch.stack(groups).numpy()
        if tape.logits is not None and classifies(call.vit):  # without a classifier these are features
            arrays["predicted"] = tape.logits.argmax(1).cpu().numpy()
        if "masks" in arrays and not trace.pooled:
            share = object_kept(trace.kept().cpu(), torch.from_numpy(arrays["masks"]))
            log_share(pl_module, self.key("prunex/object_kept"), share)
        names = names_of(trainer, pl_module, outputs(call.vit))
        about = (arrays.get("labels"), arrays.get("predicted"), names, arrays.get("masks"))
        title = f"{pruning.method}, {moment(trainer)[1]}: "
        if trace.pooled:
            shares = [all_patches if i is None else trace.share(i).float().cpu() for i in made]
            title += "patches in tokens"
            picture = share_mosaic(arrays["images"], torch.stack(shares).numpy(), pruning.counts(), *about, title)
        else:
            title += "tokens left" if trace.merges() else "patches kept"
            picture = kept_mosaic(arrays["images"], arrays["kept"], *about, title=title, groups=arrays.get("groups"))
        self.write(trainer, "kept_tokens", picture, arrays)


def object_kept(kept: Tensor, masks: Tensor, least: float = 0.03) -> float:
    """Share of object patches that are kept (bool [B, gh, gw]), mean over the images that show an object, else NaN.

    Masks are bool [B, H, W]; a patch is the object's where ``least`` of it lies on the object.
    """
    area = torch.nn.functional.adaptive_avg_pool2d(masks.float()[:, None], (kept.shape[1], kept.shape[2]))[:, 0]
    # A patch that the object merely grazes is background to the eye.
    touched = (area > least).flatten(1)
    shares = (touched & kept.flatten(1)).sum(1) / touched.sum(1).clamp(min=1)
    return float(shares[touched.any(1)].mean())
