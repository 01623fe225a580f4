"""Every callback that takes part in a training, by name, with a module and batches that serve all of them."""

from functools import partial

import torch
from torch.utils.data import DataLoader

from prunex.callbacks import (
    ExplainableHead,
    FaithfulnessMonitor,
    HeadMonitor,
    KeptTokenMonitor,
    MaskPruning,
    RelevancyGuidance,
    RelevancyMonitor,
    SlimExport,
    TokenPruning,
    UnitMonitor,
)
from tests.callbacks.modules import Plain, data


class Module(Plain):
    """A step that does nothing beside the model and its loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch["image"], batch["label"]), batch_idx)

    def on_before_optimizer_step(self, optimizer):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=True)


def batches(labels=None):
    """Six batches of four images, with all that any callback may ask for."""
    images, classes = data(24)
    g = torch.Generator().manual_seed(0)
    rows = []
    for image, label in zip(images, classes if labels is None else labels, strict=True):
        concepts = torch.randint(2, (2,), generator=g).float()
        spatial = torch.randint(2, (16, 1), generator=g).float()
        rows.append({"image": image, "label": label, "concepts": concepts, "spatial_concepts": spatial})
    return DataLoader(rows, 4)


def tokens(method, **options):
    more = {name: options.pop(name) for name in ("keep_ratio", "budget") if name in options}
    return partial(TokenPruning, method, options=options or None, **more)


# By name; each makes its callbacks anew for a folder.
CASES = {
    "topk": lambda folder: [tokens("topk")()],
    "evit": lambda folder: [tokens("evit")()],
    "dynamicvit": lambda folder: [tokens("dynamicvit", teacher=True)()],
    "ia_red2": lambda folder: [tokens("ia_red2")()],
    "hvt": lambda folder: [tokens("hvt")()],
    "patch_slimming": lambda folder: [tokens("patch_slimming", keep=[list(range(0, 16, 2))] * 3)()],
    "tome": lambda folder: [tokens("tome", r=3)()],
    "ppt": lambda folder: [tokens("ppt", r=3)()],
    "diffrate": lambda folder: [tokens("diffrate", budget=0.8)()],
    "evit, adaptive": lambda folder: [tokens("evit", count="adaptive")()],
    "held backbone": lambda folder: [TokenPruning("dynamicvit", freeze_backbone=0.5, backbone_lr_scale=0.1)],
    "xpruner": lambda folder: [MaskPruning("xpruner", masks=0.4, thresholds=0.4), UnitMonitor()],
    "taylor": lambda folder: [MaskPruning("taylor", start=0.2)],
    "relevance": lambda folder: [MaskPruning("relevance", start=0.2)],
    "tokens and units": lambda folder: [tokens("evit", budget=0.8)(), MaskPruning("xpruner", budget=0.6)],
    "guided tokens": lambda folder: [TokenPruning("dynamicvit"), RelevancyGuidance("tokentm")],
    "guided by relevance rules": lambda folder: [
        TokenPruning("evit"),
        RelevancyGuidance("lrp", options={"rule": "zplus"}),
    ],
    "guided tokens, cache": lambda folder: [TokenPruning("evit"), RelevancyGuidance("generic_attention", cache=64)],
    "guided units": lambda folder: [MaskPruning("xpruner", masks=0.6, thresholds=0.2), RelevancyGuidance()],
    "vit_net": lambda folder: [ExplainableHead("vit_net", depth=2), HeadMonitor(2)],
    "concept_transformer": lambda folder: [
        ExplainableHead("concept_transformer", concepts=["loop", "bar"], spatial=["ink"]),
        HeadMonitor(2),
    ],
    "attributes": lambda folder: [tokens("evit")(), ExplainableHead("attributes", attributes=4), HeadMonitor(2)],
    "mean_patch": lambda folder: [ExplainableHead("mean_patch")],
    "monitors": lambda folder: [
        TokenPruning("evit"),
        KeptTokenMonitor(2),
        RelevancyMonitor(["rollout"], images=2),
        FaithfulnessMonitor(["rollout"], images=2),
        SlimExport(str(folder / "out"), formats=[]),
    ],
}
