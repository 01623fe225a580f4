"""HeadMonitor: one picture an epoch of what a head that explains itself says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import prunex
from prunex.attributes import Pair
from prunex.callbacks.alone import add_up
from prunex.callbacks.described import names_of, shown_channels
from prunex.callbacks.monitor import Monitor
from prunex.callbacks.run_folder import moment
from prunex.errors import PrunexError
from prunex.heads.concept_transformer import ConceptTransformer
from prunex.pictures import attribute_rows, concept_contributions, from_tensor, prototype_tree
from prunex.pictures.arrays import Floats


class HeadMonitor(Monitor):
    """Draw, after every validation epoch, what :class:`ExplainableHead`'s head says of a few fixed validation images.

    Writes ``maps/head-epoch=NNN.png``, sends it to every logger that takes images, and puts into
    ``maps/epoch=NNN.npz`` what it was drawn from, for the predicted class ``target/<head>`` [M]:

    - ``concept_transformer``: a table of what concepts add to classes where all attention is on them, and the strongest
      concepts of each image, with a map of what spatial ones add. ``head/concepts`` names [C], ``head/effects`` float
      [C, classes], ``head/contributions`` float [M, C, classes], ``head/concept_maps`` and ``head/attention`` float
      [M, C_s, gh, gw].
    - ``vit_net``: the tree, with the training patches nearest each prototype and the share of images that go each way,
      of the whole validation where its steps ran the head (as ``validation_step`` usually does), else of the watched
      images; the picture says which. ``head/path`` int [M, depth], ``head/leaf`` [M], ``head/passed`` int [nodes]
      (images by node, in pre-order), ``head/leaves`` float [leaves, classes] (mean distribution of the images that end
      there, NaN without any), ``head/patches`` uint8 [branches, 3, h, w, 3] and ``head/nearest`` float [branches, 3],
      their similarity, NaN for none.
    - ``attributes``: where each is in each image and what it adds. ``head/contributions``, ``head/attention``
      float [M, K, gh, gw].
    - ``mean_patch``: as ``concept_transformer``, of its two parts: timm's classifier and the mean patch.

    Evidence that has a place is there as any explainer's: ``relevance/<head>`` float [M, gh, gw], on the original
    patches whatever is pruned. Arguments are those of all monitors: :class:`~prunex.callbacks.monitor.Monitor`.

    Raises:
        PrunexError: In training for a model without a head that explains itself.
    """

    _before: Any = None  # what the head had read when a batch began
    _ended: Tensor | None = None  # by leaf [leaves, 1 + classes]: images of this validation, and their distributions

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model without a head before time is spent."""
        self._head(pl_module)

    def _head(self, pl_module: LightningModule) -> prunex.Head:
        head = prunex.attached(pl_module, self.model, head=True)
        if head is None:
            raise PrunexError(
                "HeadMonitor watches a head that explains itself, and this model has timm's own: add ExplainableHead "
                "to the callbacks"
            )
        return head

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note what the head read last: only what it reads then is this batch's."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if batch_idx == 0 and dataloader_idx == 0:
            self._ended = None
        self._before = self._head(pl_module).last

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count in which leaves of a tree the images end."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        head, before, self._before = self._head(pl_module), self._before, None
        reading: Any = head.last
        if head.method == "vit_net" and dataloader_idx == 0 and reading is not None and reading is not before:
            rows = torch.arange(len(reading.leaf), device=reading.leaf.device)
            ended = _ended(head, reading.leaf, reading.leaves[rows, reading.leaf])
            self._ended = ended if self._ended is None else self._ended + ended

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up what all processes counted, and watch."""
        head = self._head(pl_module)
        if trainer.world_size > 1 and head.method == "vit_net":
            mine = _ended(head) if self._ended is None else self._ended
            # Zeros of a process whose steps ran no head lie on the CPU, and NCCL sums on GPUs alone.
            self._ended = mine.to(trainer.strategy.root_device)
            add_up(trainer, self._ended)
        super().on_validation_epoch_end(trainer, pl_module)

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Ask the head for its evidence, and draw it."""
        head, vit = self._head(pl_module), self.vit(pl_module)
        call = self.answered(trainer, pl_module, batch)
        evidence: Any = head.evidence(call.entered)
        arrays = self.common(trainer, vit, batch, evidence.trace.grid)
        target = evidence.target.cpu().numpy()
        arrays[f"target/{head.method}"] = target
        if call.vit is vit:  # else the module makes other classes of the head's
            arrays["predicted"] = target
        if head.head.reads_patches:
            arrays[f"relevance/{head.method}"] = _plain(evidence.maps)
        about = (target, arrays.get("labels"), names_of(trainer, pl_module, evidence.logits.shape[1]))
        title = f"{head.method}, {moment(trainer)[1]}: "
        if head.method == "vit_net":
            picture = self._tree(trainer, pl_module, evidence, arrays, about[2], title + "which way images go")
        else:
            contributions = arrays["head/contributions"] = _plain(evidence.contributions)
            attention = arrays["head/attention"] = _plain(evidence.attention)
            if head.method == "attributes":
                title += "where they are, and what they add"
                picture = attribute_rows(arrays["images"], attention, contributions, *about, title)
            else:
                arrays["head/concepts"] = np.asarray(evidence.names)
                arrays["head/concept_maps"] = _plain(evidence.spatial)
                maps = arrays["head/concept_maps"].sum(1) if evidence.spatial.shape[1] else None
                title += "what its parts add" if head.method == "mean_patch" else "what concepts add to the scores"
                effects, module = None, head.head
                if isinstance(module, ConceptTransformer):
                    effects = arrays["head/effects"] = _plain(module.effects().detach())
                shown = (arrays["images"], contributions, evidence.names, target, maps)
                picture = concept_contributions(*shown, *about[1:], title, effects=effects)
        self.write(trainer, "head", picture, arrays)

    def _tree(
        self,
        trainer: Trainer,
        module: LightningModule,
        evidence: Any,
        arrays: dict[str, np.ndarray],
        names: list[str] | None,
        title: str,
    ) -> np.ndarray:
        """The tree's picture; what it was drawn from is added to the arrays."""
        head = self._head(module)
        sums, counted = self._ended, "validation images"
        if sums is None or not sums.any():
            sums, counted = _ended(head, evidence.leaf, evidence.distribution), "watched images"
        ended: Floats = sums.cpu().double().numpy()
        nodes = head.tree()
        passed = np.zeros(len(nodes), np.int64)
        for node in reversed(nodes):  # children come after their parent
            ends = not node.children
            passed[node.number] = ended[node.index, 0] if ends else passed[list(node.children)].sum()
        with np.errstate(invalid="ignore"):
            leaves = (ended[:, 1:] / ended[:, :1]).astype(np.float32)  # NaN where no image ends
        near = [node.nearest for node in nodes if node.children]
        patches = [_patches(self.normalisation(trainer, module), patches) for patches in near]
        # Each prototype has patches of its own number near it, and an array one number of columns.
        most = max(map(len, near))
        values = np.full((len(near), most), np.nan, np.float32)
        for row, held in zip(values, near, strict=True):
            row[: len(held)] = [patch.value for patch in held]
        arrays |= {"head/path": evidence.path.cpu().numpy(), "head/leaf": evidence.leaf.cpu().numpy()}
        arrays |= {"head/passed": passed, "head/leaves": leaves, "head/nearest": values}
        if most:
            # Likewise one array holds patches of one size.
            shape = np.min([p.shape[1:] for p in patches if len(p)], 0)
            patches = [p[:, : shape[0], : shape[1]] for p in patches]
            every = arrays["head/patches"] = np.zeros((len(near), most, *shape), np.uint8)
            for rows, pixels in zip(every, patches, strict=True):
                rows[: len(pixels)] = pixels
        return np.asarray(prototype_tree(passed, leaves, patches, names, title, counted))


def _ended(head: prunex.Head, leaf: Tensor | None = None, distribution: Tensor | None = None) -> Tensor:
    """By leaf, how many images [B] end there, and the sum of their distributions [B, classes]; stays on the device."""
    tree: Any = head.head
    device = None if leaf is None else leaf.device
    sums = torch.zeros(2**tree.depth, 1 + tree.classes, device=device)
    if leaf is not None and distribution is not None:
        rows = torch.cat([torch.ones_like(distribution[:, :1]), distribution], 1)
        sums = sums.index_add(0, leaf, rows.float())
    return sums


def _patches(normalisation: Pair, nearest: list[Any]) -> np.ndarray:
    """Training patches as they look, uint8 [n, h, w, 3]."""
    if not nearest:
        return np.zeros((0, 1, 1, 3), np.uint8)
    return from_tensor(*shown_channels(torch.stack([patch.pixels.float() for patch in nearest]), *normalisation))


def _plain(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
