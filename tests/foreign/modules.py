"""LightningModules as other people write them: ways to hold a ViT, ways to train it, and data as it comes."""

import copy

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader

CLASSES = 4


def vit(classes=CLASSES, **more):
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=classes, img_size=32, patch_size=8, embed_dim=48, depth=4, **more
    )


class Foreign(LightningModule):
    """The usual way. ``surround`` is all that lies round the ViT, so that a slow ViT can be put into it."""

    path = None  # of the ViT, where a callback must be told

    def __init__(self):
        super().__init__()
        self.tasks = []  # the task's loss of every step, without what prunex adds
        self.build()

    def build(self):
        self.model = vit()

    def backbone(self):
        return self.model

    def surround(self, run, x):
        return run(x)

    def forward(self, x):
        return self.surround(self.backbone(), x)

    def training_step(self, batch, index):
        return self.task(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self(batch[0])

    def task(self, logits, labels):
        loss = F.cross_entropy(logits, labels)
        self.tasks.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


# ---- ways to hold the ViT


class Normalises(Foreign):
    def surround(self, run, x):
        return run((x - 0.3) / 0.7)


class Resizes(Foreign):
    def build(self):
        self.model = vit()

    def surround(self, run, x):
        return run(F.avg_pool2d(F.interpolate(x, scale_factor=2), 2))


class HeadAfter(Foreign):
    def build(self):
        self.model, self.fc = vit(0), nn.Linear(48, CLASSES)

    def surround(self, run, x):
        return self.fc(run(x))


class Remaps(Foreign):
    """Ten outputs of the ViT, four classes of the task."""

    def build(self):
        self.model, self.fc = vit(10), nn.Linear(10, CLASSES)

    def surround(self, run, x):
        return self.fc(run(x))


class InDict(Foreign):
    def build(self):
        self.parts = nn.ModuleDict({"encoder": vit()})

    def backbone(self):
        return self.parts["encoder"]


class InSequential(Foreign):
    def build(self):
        self.net = nn.Sequential(nn.Identity(), vit(), nn.Identity())

    def backbone(self):
        return self.net[1]

    def forward(self, x):
        return self.net(x)


class Configured(Foreign):
    def build(self):
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = vit()


class Nested(Foreign):
    def build(self):
        self.inner = Foreign()

    def backbone(self):
        return self.inner.model

    def forward(self, x):
        return self.inner(x)


class TwoNames(Foreign):
    def build(self):
        self.model = vit()
        self.encoder = self.model


class Student(Foreign):
    path = "student"

    def build(self):
        self.student, self.teacher = vit(), vit().eval().requires_grad_(False)

    def backbone(self):
        return self.student

    def training_step(self, batch, index):
        with torch.no_grad():
            soft = self.teacher(batch[0]).softmax(-1)
        return self.task(self(batch[0]), batch[1]) + 0 * soft.sum()


class Features(Foreign):
    """Reads the class token of ``forward_features`` itself."""

    def build(self):
        self.model, self.fc = vit(0), nn.Linear(48, CLASSES)

    def forward(self, x):
        return self.fc(self.model.forward_features(x)[:, 0])

    def surround(self, run, x):
        return self.fc(run(x))


class Assigned(Foreign):
    def build(self):
        self.model = vit(1000)
        self.model.head = nn.Linear(48, CLASSES)


class FourChannels(Foreign):
    def build(self):
        self.model = vit(in_chans=4)

    def surround(self, run, x):
        return run(torch.cat([x, x[:, :1]], 1))


class Hooked(Foreign):
    """A forward hook on a whole block makes its output smaller."""

    scale = {2: 0.5}

    def build(self):
        self.model = vit()
        self.model.blocks[2].register_forward_hook(lambda module, args, out: out * 0.5)


class Checkpointed(Foreign):
    def build(self):
        self.model = vit()
        self.model.set_grad_checkpointing()


class Half(Foreign):
    """Sees its ViT as part of a frozen whole, but for the last block and what prunex brings."""

    def build(self):
        self.model = vit()
        self.model.patch_embed.requires_grad_(False)
        self.model.blocks[:3].requires_grad_(False)


# ---- ways to train


class DictLoss(Foreign):
    def training_step(self, batch, index):
        return {"loss": super().training_step(batch, index), "more": torch.zeros(3)}


class TwoViews(Foreign):
    def training_step(self, batch, index):
        x, y = batch
        return self.task((self(x) + self(x.flip(3))) / 2, y)


class PseudoLabels(Foreign):
    def training_step(self, batch, index):
        with torch.no_grad():
            before = self(batch[0]).softmax(-1)
        loss = self.task(self(batch[0]), batch[1])
        with torch.no_grad():
            self(batch[0])
        return loss + 0 * before.sum()


class LooksInEval(Foreign):
    def training_step(self, batch, index):
        loss = self.task(self(batch[0]), batch[1])
        self.eval()
        with torch.no_grad():
            self(batch[0][:2])
        self.train()
        return loss


class SkipsSteps(Foreign):
    def training_step(self, batch, index):
        return None if index % 2 else super().training_step(batch, index)


class ByHand(Foreign):
    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.task(self(batch[0]), batch[1]))
            optimizer.step()


class TwoOptimizers(ByHand):
    def configure_optimizers(self):
        early, late = (torch.optim.SGD(p, 1e-2) for p in self._halves())
        return [early, late]

    def _halves(self):
        late = list(self.backbone().head.parameters())
        return [p for p in self.parameters() if all(p is not q for q in late)], late

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        self.manual_backward(self.task(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Closures(Foreign):
    """LBFGS runs the training step several times a batch."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 1e-3, max_iter=2, max_eval=2)


class Mixes(Foreign):
    def training_step(self, batch, index):
        x, y = batch
        soft = F.one_hot(y, CLASSES).float()
        loss = F.cross_entropy(self(0.7 * x + 0.3 * x.flip(0)), 0.7 * soft + 0.3 * soft.flip(0))
        self.tasks.append(loss.detach())
        return loss


class ByKey(Foreign):
    """Batches are dicts, in which more numbers lie than the label, and before it."""

    def training_step(self, batch, index):
        return self.task(self(batch["image"]), batch["label"])

    def validation_step(self, batch, index):
        self(batch["image"])


class FloatsInStep(Foreign):
    """The module makes its inputs itself."""

    def training_step(self, batch, index):
        return self.task(self(batch[0] / 255), batch[1])

    def validation_step(self, batch, index):
        self(batch[0] / 255)


class ValidatesAverage(Foreign):
    """Validates a moving average that is no part of the module."""

    def validation_step(self, batch, index):
        if "average" not in self.__dict__:
            self.__dict__["average"] = copy.deepcopy(self.model).eval()
        self.__dict__["average"](batch[0])


class Named(Foreign):
    """Hyperparameters of its own, one of which is called as ours is."""

    def __init__(self, pruning=None):
        super().__init__()
        self.save_hyperparameters({"pruning": {"amount": 0.3}})


# ---- what cannot be right


class WalksBlocks(Foreign):
    def forward(self, x):
        v = self.model
        return v.head(v.norm(v.blocks(v._pos_embed(v.patch_embed(x))))[:, 0])


class RunsAnother(Foreign):
    path = "model"

    def build(self):
        self.model = vit()
        self.other = copy.deepcopy(self.model)

    def forward(self, x):
        return self.other(x)


class Hidden(Foreign):
    def build(self):
        self.things = [vit()]

    def backbone(self):
        return self.things[0]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.things[0].parameters(), 1e-3)


class Ambiguous(Student):
    path = None


class OwnForward(timm.models.VisionTransformer):
    def forward(self, x):
        return super().forward(x) * 2


class Subclassed(Foreign):
    def build(self):
        self.model = OwnForward(num_classes=CLASSES, img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)


class EarlyOptimizer(Foreign):
    def build(self):
        self.model = vit()
        self.made = torch.optim.AdamW(self.model.parameters(), 1e-3)

    def configure_optimizers(self):
        return self.made


class ByGroups(Foreign):
    def configure_optimizers(self):
        return torch.optim.AdamW([*self.model.blocks.parameters(), *self.model.head.parameters()], 1e-3)


class FreezesAll(Foreign):
    def on_fit_start(self):
        self.model.requires_grad_(False)
        self.model.head.requires_grad_(True)


class Probes(Foreign):
    """Linear probing: nothing of the ViT sees a gradient."""

    def build(self):
        self.model, self.fc = vit(0), nn.Linear(48, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            features = self.model(x)
        return self.fc(features)


class HeadOfItsOwn(Foreign):
    def build(self):
        self.model = vit(1000)
        self.model.head = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, CLASSES))


class OwnAverage(Foreign):
    """Follows the weights one by one, which ends where units are removed."""

    def on_fit_start(self):
        self.__dict__["average"] = copy.deepcopy(self.model)

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for a, p in zip(self.__dict__["average"].parameters(), self.model.parameters(), strict=True):
                a.lerp_(p, 0.1)


class Pools(Foreign):
    """Reads all tokens of ``forward_features``: masked ones too while training."""

    def build(self):
        self.model, self.fc = vit(0), nn.Linear(48, CLASSES)

    def forward(self, x):
        return self.fc(self.model.forward_features(x)[:, 1:].mean(1))


# ---- data


def pictures(count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator)


def pairs():
    return DataLoader([(x, i % CLASSES) for i, x in enumerate(pictures())], 8)


def dicts():
    rows = [{"view": i % 2, "image": x, "label": i % CLASSES} for i, x in enumerate(pictures())]
    return DataLoader(rows, 8)


def unnamed():
    return DataLoader([(x, i % 2, i % CLASSES) for i, x in enumerate(pictures())], 8)


def bytes_():
    return DataLoader([((x * 40 + 128).clamp(0, 255), i % CLASSES) for i, x in enumerate(pictures())], 8)


class Hooks(LightningDataModule):
    """Integers on the way, floats where the step begins."""

    def train_dataloader(self):
        rows = [((x * 40 + 128).clamp(0, 255).byte(), i % CLASSES) for i, x in enumerate(pictures())]
        return DataLoader(rows, 8)

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch, index):
        return batch[0].float() / 255 - 0.5, batch[1]


class Odd(Hooks):
    """Says of its normalisation what others' data modules say."""

    mean, std = torch.tensor(0.0), torch.tensor(255.0)
    class_names = property(lambda self: ["a", "b"])  # too few
