"""ExplainableHead round a user's unmodified module: what is trained, added, saved, resumed, refused."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import prunex
from prunex import PrunexError
from prunex.callbacks import ExplainableHead, SlimExport, TokenPruning, load_from_checkpoint
from prunex.recipes import ImageClassifier
from tests.callbacks.modules import Plain, Seeded, csv_logger, data, loader, metrics, snapshot, trainer
from tests.heads.heads import HEADS, OPTIONS
from tests.vits import quick

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}

NAN = float("nan")
CONCEPTS = {"concepts": ["round", "long"], "spatial": ["ink"], "dropout": 0.0}


class Annotated(Dataset):
    """Images, labels, and a dict of concept labels, of which every second image has none."""

    def __init__(self, count=16):
        self.images, self.labels = data(count)
        self.concepts = torch.stack([self.labels % 2, 1 - self.labels % 2], 1).float()
        self.concepts[::2] = NAN
        self.spatial = (torch.arange(16)[None, :, None] + self.labels[:, None, None]) % 2 * 1.0
        self.spatial[:, ::3] = NAN

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i], {"concepts": self.concepts[i], "spatial_concepts": self.spatial[i]}


def annotated(count=16):
    return DataLoader(Annotated(count), 4)


def callback(name, **more):
    return ExplainableHead(name, {**OPTIONS[name], **more})


@pytest.mark.parametrize("name", HEADS)
def test_the_module_keeps_its_loss_and_the_heads_are_added(tmp_path, name):
    module = Plain(lr=0.02)
    run = trainer(tmp_path, callback(name), logger=csv_logger(tmp_path))
    before = snapshot(module)
    run.fit(module, loader(), loader())
    head = prunex.attached(module, head=True)
    assert head.method == name
    after = snapshot(module)
    moved = [n for n, p in after.items() if n in before and not p.equal(before[n])]
    assert any("blocks" in n for n in moved)
    classifier = [n for n in before if n.rsplit(".", 2)[-2] == "head"]
    assert len(classifier) == 2
    assert bool(set(classifier) & set(moved)) == head.head.uses_classifier
    written = metrics(tmp_path / "run" / "version_0")
    wanted = {"concept_transformer": {"prunex/loss_sparsity"}, "attributes": {"prunex/loss_diversity"}}.get(name, set())
    assert {n for n in written if n.startswith("prunex/loss_")} == wanted
    assert head.progress == 1
    assert not any(n in vars(module) for n in ("training_step", "load_state_dict"))


def test_a_step_is_the_task_loss_and_the_heads_by_hand(tmp_path):
    module, twin = Plain(lr=0.1), Plain(lr=0.1)
    torch.manual_seed(0)
    head = prunex.attach(twin, "concept_transformer", **CONCEPTS)
    torch.manual_seed(0)
    trainer(tmp_path, ExplainableHead("concept_transformer", CONCEPTS, lr_scale=1)).fit(module, annotated())
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for images, labels, more in annotated():
        loss = F.cross_entropy(twin(images), labels)
        parts = head.losses(labels, more["concepts"], more["spatial_concepts"])
        assert float(parts["explanation"]) > 0
        (loss + sum(parts.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours, theirs = snapshot(module), snapshot(twin)
    assert ours.keys() == theirs.keys()
    assert all(float((ours[n] - theirs[n]).abs().max()) < 1e-6 for n in ours)


class Stop(L.Callback):
    """Ends a training after two epochs."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.parametrize("name", HEADS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, name):
    def run(epochs, **more):
        torch.manual_seed(5)
        module = Seeded(lr=0.02, optimiser="adamw")
        callbacks = [callback(name), TokenPruning("evit", keep_ratio=0.6)]
        # Schedules must be of the whole training: half of it is stopped, not shorter.
        if epochs == 2:
            callbacks.append(Stop())
        t = trainer(tmp_path, *callbacks, max_epochs=4)
        t.fit(module, loader(), loader(), **more)
        return t, module

    _, whole = run(4)
    half, _ = run(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(4, ckpt_path=str(tmp_path / "half.ckpt"))
    a, b = snapshot(whole), snapshot(resumed)
    assert all(a[n].equal(b[n]) for n in a)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_opens_without_the_callback(tmp_path, name, weights_only):
    module = Plain()
    run = trainer(tmp_path, callback(name), TokenPruning("evit", keep_ratio=0.6))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only)
    again = load_from_checkpoint(Plain, str(tmp_path / "a.ckpt"))
    x = data()[0]
    assert prunex.attached(again, head=True).spec == prunex.attached(module, head=True).spec
    assert torch.equal(again(x), module.eval()(x))
    with pytest.raises(RuntimeError, match="load_from_checkpoint"):
        Plain.load_from_checkpoint(tmp_path / "a.ckpt")
    if not prunex.registry.lookup("head", name).options:
        return
    other = ExplainableHead(name, {**OPTIONS[name], **_another(name)})
    with pytest.raises(PrunexError, match="written with other options"):
        trainer(tmp_path, other, TokenPruning("evit", keep_ratio=0.6)).validate(
            Plain(), loader(), ckpt_path=str(tmp_path / "a.ckpt")
        )


def _another(name):
    return {
        "concept_transformer": {"heads": 4},
        "vit_net": {"depth": 3},
        "attributes": {"attributes": 3},
        "mean_patch": {},
    }[name]


@pytest.mark.parametrize("name", quick(HEADS, ["concept_transformer"]))
def test_exported_with_the_run(tmp_path, name):
    module = Plain()
    trainer(tmp_path, callback(name), TokenPruning("evit", keep_ratio=0.6), SlimExport(str(tmp_path))).fit(
        module, loader(), loader()
    )
    small = prunex.load(tmp_path / "slim")
    x = data()[0]
    assert prunex.attached(small, head=True).method == name
    assert float((small(x) - module.eval()(x)).abs().max()) < 1e-5


def test_what_is_right_is_measured(tmp_path):
    module = Plain(lr=0.02)
    run = trainer(tmp_path, ExplainableHead("concept_transformer", CONCEPTS), logger=csv_logger(tmp_path))
    run.fit(module, annotated(), annotated())
    shares = metrics(tmp_path / "run" / "version_0")["prunex/val_top_concept"]
    head, batches = prunex.attached(module, head=True), list(annotated())
    right = []
    for images, _, more in batches:
        top = head.read(images).attention["global"].mean((1, 2)).argmax(1)
        known = more["concepts"].sum(1) > 0
        right += more["concepts"].gather(1, top[:, None])[:, 0][known].tolist()
    assert shares[-1] == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_a_tree_tells_whether_it_decides(tmp_path):
    module = Plain(lr=0.02)
    run = trainer(tmp_path, ExplainableHead("vit_net", depth=2), logger=csv_logger(tmp_path))
    run.fit(module, loader(), loader())
    written = metrics(tmp_path / "run" / "version_0")
    head, (images, labels) = prunex.attached(module, head=True), data()
    shares = {}
    for part, names in zip(images.split(4), labels.split(4), strict=True):
        for name, share in head.controls(part, names).items():
            shares.setdefault(name, []).append(share)
    assert set(shares) == {"soft", "hard", "classifier", "tree", "shuffled"}
    for name, values in shares.items():
        assert written[f"prunex/val_tree_{name}"][-1] == pytest.approx(sum(values) / 4, abs=1e-6)
    branches = [node for node in head.tree() if node.kind == "branch"]
    assert all(len(node.nearest) == 3 for node in branches)


def test_without_labels_for_its_concepts_it_says_so_once(tmp_path):
    with pytest.warns(UserWarning, match="no concept labels in the first training batch") as told:
        trainer(tmp_path, ExplainableHead("concept_transformer", CONCEPTS)).fit(Plain(), loader())
    assert sum("no concept labels" in str(w.message) for w in told) == 1


def test_refused_before_time_is_spent(tmp_path):
    with pytest.raises(PrunexError, match="unknown head 'vitnet': did you mean 'vit_net'"):
        ExplainableHead("vitnet")
    with pytest.raises(PrunexError, match="unknown head 'evit': it is of kind 'pruner'"):
        ExplainableHead("evit")
    with pytest.raises(PrunexError, match="unknown option of vit_net 'deep'"):
        ExplainableHead("vit_net", deep=3)
    with pytest.raises(PrunexError, match="lr_scale=-1 is not allowed"):
        ExplainableHead("vit_net", lr_scale=-1)
    module = Plain()
    with pytest.raises(PrunexError, match="2 ExplainableHead callbacks in one Trainer: keep one"):
        trainer(tmp_path, ExplainableHead("vit_net"), ExplainableHead("attributes")).fit(module, loader())
    assert prunex.attached(module, head=True) is None
    prunex.attach(module, "vit_net", depth=2)
    with pytest.raises(PrunexError, match="has vit_net attached already with depth=2, not 3: detach it first"):
        trainer(tmp_path, ExplainableHead("vit_net", depth=3)).fit(module, loader())

    class ByHand(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(PrunexError, match=r"optimises by hand: add sum\(prunex.attached\(self, head=True\)"):
        trainer(tmp_path, ExplainableHead("vit_net")).fit(ByHand(), loader())

    several = ImageClassifier("vit_tiny_patch16_224", 5, SMALL, task="multi_label", from_scratch=True)
    with pytest.raises(PrunexError, match="vit_net shares one probability among the classes, .*task='multi_label'"):
        trainer(tmp_path, ExplainableHead("vit_net")).fit(several, loader())

    class Elsewhere(Plain):
        def configure_optimizers(self):
            own = [p for n, p in self.named_parameters() if "prunex" not in n]
            return torch.optim.SGD(own, 0.1)

    with pytest.raises(PrunexError, match=r"no optimiser steps .*attached\(self, head=True\).head"):
        trainer(tmp_path, ExplainableHead("vit_net", depth=2)).fit(Elsewhere(), loader())


def test_wrong_labels_end_the_run_in_one_line(tmp_path):
    options = {**CONCEPTS, "concepts": ["a", "b", "c"]}
    with pytest.raises(PrunexError, match=r"global concept labels have shape \[4, 2\]: give \[4, 3\]"):
        trainer(tmp_path, ExplainableHead("concept_transformer", options)).fit(Plain(), annotated())


def test_a_batch_of_concepts_is_no_batch_of_anything_else():
    images, labels, more = next(iter(annotated()))
    fields = prunex.batches.parts((images, labels, more))
    assert set(fields) == {"images", "labels", "concepts", "spatial_concepts"}
    assert not fields.unclear
    assert not fields.unfit


class Two(L.LightningModule):
    """Two views of a batch a step."""

    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.inner(batch[0]), batch[1])
        return loss + F.cross_entropy(self.inner(batch[0].flip(3)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02)


def test_two_views_are_compared(tmp_path):
    run = trainer(tmp_path, ExplainableHead("attributes", attributes=4, warmup=0.0), logger=csv_logger(tmp_path))
    run.fit(Two(), loader())
    written = metrics(tmp_path / "run" / "version_0")
    assert {"prunex/loss_consistency", "prunex/loss_discriminability", "prunex/loss_diversity"} <= set(written)
    assert all(value > 0 for value in written["prunex/loss_consistency"])


def test_the_head_takes_whole_steps_where_the_backbone_takes_none(tmp_path):
    module = Plain(lr=0.02)
    before = snapshot(module)
    frozen = TokenPruning("evit", keep_ratio=0.6, backbone_lr_scale=0.0)
    head = callback("concept_transformer")
    trainer(tmp_path, head, frozen, limit_train_batches=1).fit(module, loader())
    start = [p.clone() for p in head.pruning.head.parameters()]
    trainer(tmp_path, head, frozen, limit_train_batches=2).fit(module, loader())
    after = snapshot(module)
    assert all(after[n].equal(p) for n, p in before.items())
    assert all(not p.equal(s) for p, s in zip(head.pruning.head.parameters(), start, strict=True) if p.grad is not None)


class Normalises(Plain):
    """Prepares images before its ViT."""

    def forward(self, x):
        return super().forward((x - 0.5) / 0.25)


def test_patches_near_prototypes_are_of_what_enters_the_vit_and_outlive_the_run(tmp_path):
    module = Normalises(lr=0.02)
    run = trainer(tmp_path, callback("vit_net"))
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    nearest = prunex.attached(module, head=True).head.nearest
    entered = (data()[0] - 0.5) / 0.25
    for patches in nearest.values():
        for patch in patches:
            row, column = (8 * p for p in patch.cell)
            assert patch.pixels.equal(entered[int(patch.id), :, row : row + 8, column : column + 8])
    fresh = Normalises()
    trainer(tmp_path, callback("vit_net")).validate(fresh, loader(), ckpt_path=str(tmp_path / "a.ckpt"))
    again = prunex.attached(fresh, head=True).head.nearest
    assert {b: [(n.value, n.id, n.cell) for n in ns] for b, ns in again.items()} == {
        b: [(n.value, n.id, n.cell) for n in ns] for b, ns in nearest.items()
    }
    assert not module.vit.patch_embed._forward_pre_hooks
