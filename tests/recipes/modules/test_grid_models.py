"""Segmentation and detection on full grids: losses, scores, what is read of a pruned ViT, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torchvision.ops import box_iou

import prunex
from prunex import PrunexError
from prunex.callbacks import SafeCheckpointIO, TokenPruning, load_from_checkpoint
from prunex.recipes import DetectionModel, DigitScenes, SegmentationModel
from prunex.recipes.modules import detection
from prunex.recipes.modules.detection import assigned, centreness
from prunex.recipes.runs import evaluate

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
MODELS = {"segmentation": (SegmentationModel, 11), "detection": (DetectionModel, 10)}
PRUNERS = {"evit": {}, "topk": {}, "dynamicvit": {"teacher": False}, "tome": {"r": 3}}


def small(task, classes=None, **arguments):
    make, outputs = MODELS[task]
    options = {"model_args": dict(SMALL), "from_scratch": True} | arguments
    return make("vit_tiny_patch16_224", classes or outputs, **options)


def scenes(task, **arguments):
    return DigitScenes(**({"batch_size": 8, "train_size": 24, "val_size": 16, "task": task} | arguments))


def first_batch(task, **arguments):
    return next(iter(scenes(task, **arguments).val_dataloader()))


def pruned(module, pruner, keep_ratio=0.5):
    rate = {} if pruner == "tome" else {"keep_ratio": keep_ratio, "stages": [1, 2]}
    return prunex.attach(module.model, pruner, **rate, **PRUNERS[pruner])


def trainer(folder, **arguments):
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
        "plugins": [SafeCheckpointIO()], "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(**(defaults | arguments))


def same(a, b, **how):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **how)
    else:
        torch.testing.assert_close(a, b, **how)


@pytest.mark.parametrize("task", MODELS)
def test_it_learns_a_few_scenes(task):
    torch.manual_seed(0)
    module, batch = small(task, model_args=SMALL | {"patch_size": 8}), first_batch(task)
    pruned(module, "evit", 0.7)
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = sum(module.loss(module(batch[0]), batch).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        meter, chance = module.eval().meter(), small(task).eval()
        module.update(meter, module(batch[0]), batch)
        blind = chance.meter()
        chance.update(blind, chance(batch[0]), batch)
    assert module.read(meter) > chance.read(blind) + 0.03


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("task", MODELS)
def test_masked_equals_removed_and_a_batch_its_images(task, pruner):
    module = small(task, blocks=[0, 2], fill=0.0).eval()
    pruning, images = pruned(module, pruner), first_batch(task)[0][:3]
    with torch.no_grad():
        answer = module(images)
        for i in range(3):
            alone = module(images[i : i + 1])
            each = {k: v[i : i + 1] for k, v in answer.items()} if task == "detection" else answer[i : i + 1]
            same(alone, each, rtol=1e-4, atol=1e-4)
        if pruner != "tome":  # merged tokens have no slots to be masked in
            pruning.masked = True
            same(module(images), answer, rtol=1e-4, atol=1e-4)
        pruning.detach()
        assert not torch.allclose(module.grid(images)[:, 32:], answer_grid(module, images, pruner), atol=1e-3)


def answer_grid(module, images, pruner):
    pruned(module, pruner)
    return module.grid(images)[:, 32:]


@pytest.mark.parametrize("task", MODELS)
def test_without_anything_dropped_it_is_the_dense_model(task):
    module, images = small(task).eval(), first_batch(task)[0]
    with torch.no_grad():
        dense = module(images)
        prunex.attach(module.model, "topk", keep_ratio=1.0, stages=[1])
        same(module(images), dense, rtol=1e-4, atol=1e-4)


def test_dropped_patches_hold_the_fill_and_others_their_token():
    images = first_batch("segmentation")[0]
    torch.manual_seed(0)
    module = small("segmentation", blocks=[0, 2]).eval()
    pruning = pruned(module, "topk")
    with torch.no_grad():
        left = module.grid(images)
        kept = pruning.trace.kept()[:, None]
        module.fill = 0.25
        filled = module.grid(images)
    early, late = slice(0, 32), slice(32, 64)
    assert (~kept).any()
    # Nothing has left before the first stage, so the early grid holds no fill.
    torch.testing.assert_close(filled[:, early], left[:, early])
    torch.testing.assert_close(filled[:, late], torch.where(kept, left[:, late], 0.25))


def test_members_of_a_fused_token_hold_it():
    module, images = small("segmentation").eval(), first_batch("segmentation")[0]
    pruning = pruned(module, "evit")
    with torch.no_grad():
        grid = module.grid(images)
    groups = pruning.trace.groups()
    shared = 0
    for image in range(len(images)):
        # Each stage fuses into a token of its own.
        for group in groups[image][~pruning.trace.kept()[image]].unique():
            members = grid[image][:, groups[image] == group]
            torch.testing.assert_close(members, members[:, :1].expand_as(members))
            shared += members.shape[1] > 1
    assert shared >= len(images)


def test_gradients_reach_the_vit_the_decoder_and_what_a_pruner_learns():
    module, batch = small("segmentation"), first_batch("segmentation")
    pruning = pruned(module, "dynamicvit")
    loss = sum(module.loss(module(batch[0]), batch).values()) + sum(pruning.losses().values())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in pruning.pruner.parameters())
    assert module.decoder.weight.grad.any()
    assert module.model.blocks[0].attn.qkv.weight.grad.any()


def test_mean_iou_is_that_of_the_definition_over_all_pixels():
    torch.manual_seed(0)
    module, (images, maps, _) = small("segmentation", 4).eval(), first_batch("segmentation")
    maps = maps.clamp(max=3).clone()
    maps[:, :20] = 255
    meter, answers = module.meter(), torch.randn(8, 4, 64, 64)
    for part in (slice(0, 5), slice(5, 8)):
        module.update(meter, answers[part], (images[part], maps[part]))
    seen, said = maps[maps != 255], answers.argmax(1)[maps != 255]
    each = [((seen == c) & (said == c)).sum() / ((seen == c) | (said == c)).sum() for c in range(4)]
    assert module.read(meter) == pytest.approx(sum(map(float, each)) / 4, abs=1e-6)
    # What is not looked at has no part in the loss either.
    loss = module.loss(answers, (images, maps))["loss"]
    rows = answers.permute(0, 2, 3, 1)[maps != 255]
    torch.testing.assert_close(loss, F.cross_entropy(rows, seen))
    assert module.loss(answers, (images, torch.full_like(maps, 255)))["loss"] == 0


def test_cells_are_assigned_as_a_slow_walk_says():
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(6, 2, generator=generator) * 40, torch.rand(6, 2, generator=generator) * 24 + 4
    boxes = torch.cat([corner, corner + size], 1)
    y, x = torch.meshgrid(torch.arange(8) * 8.0 + 4, torch.arange(6) * 8.0 + 4, indexing="ij")
    which, theirs = assigned(boxes, torch.stack([x, y]), torch.tensor([8.0, 8.0]))
    for row in range(8):
        for column in range(6):
            px, py = 8.0 * column + 4, 8.0 * row + 4
            fitting = []
            for number, (left, top, right, bottom) in enumerate(boxes.tolist()):
                near = abs(px - (left + right) / 2) < 12 and abs(py - (top + bottom) / 2) < 12
                if left < px < right and top < py < bottom and near:
                    fitting.append(((right - left) * (bottom - top), number))
            expected = min(fitting)[1] if fitting else -1
            assert which[row, column] == expected
            if fitting:
                assert theirs[row, column].equal(boxes[expected])
    assert (which >= 0).any()
    assert (assigned(torch.zeros(0, 4), torch.stack([x, y]), torch.tensor([8.0, 8.0]))[0] == -1).all()


def test_centreness_is_one_in_the_middle_and_nought_at_an_edge():
    box = torch.tensor([[2.0, 4.0, 10.0, 20.0]]).expand(3, 4)
    points = torch.tensor([[6.0, 12.0], [2.0, 12.0], [4.0, 8.0]])
    expected = torch.tensor([1.0, 0.0, math.sqrt(2 / 6 * 4 / 12)])
    torch.testing.assert_close(centreness(box, points), expected)


def test_answers_that_are_right_are_found_again_with_full_score():
    module, batch = small("detection", model_args=SMALL | {"patch_size": 8}).eval(), first_batch("detection")
    middles, cell = module._cells(batch[0])
    output = {"classes": torch.full((8, 10, 8, 8), -12.0), "boxes": torch.zeros(8, 4, 8, 8)}
    output["centres"] = torch.full((8, 8, 8), 8.0)
    for image, target in enumerate(batch[1]):
        which, boxes = assigned(target["boxes"], middles, cell)
        output["boxes"][image] = boxes.permute(2, 0, 1)
        for row, column in (which >= 0).nonzero().tolist():
            output["classes"][image, target["labels"][which[row, column]], row, column] = 8.0
    answers = module.detections(output, (64, 64))
    for answer, target in zip(answers, batch[1], strict=True):
        assert sorted(answer["labels"].tolist()) == target["labels"].tolist()
        overlaps = box_iou(answer["boxes"], target["boxes"])
        assert (overlaps.amax(1) > 0.999).all()
    meter = module.meter()
    module.update(meter, output, batch)
    assert module.read(meter) == pytest.approx(1.0)
    losses = module.loss(output, batch)
    assert losses["class"] < 0.01
    assert losses["box"] < 1e-4


def test_boxes_never_turn_over_and_stay_in_the_image():
    module, images = small("detection").eval(), 20 * torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        module.head.weight.mul_(50)
        boxes = module(images)["boxes"]
        answers = module.predict_step((images, None), 0)
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    for answer in answers:
        assert ((answer["boxes"] >= 0) & (answer["boxes"] <= 64)).all()
        assert (answer["scores"].diff() <= 0).all()
        assert len(answer["boxes"]) <= detection.MOST


def test_scenes_without_objects_have_a_finite_loss():
    module = small("detection")
    images, targets, _ = first_batch("detection")
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)} for _ in targets]
    total = sum(module.loss(module(images), (images, empty)).values())
    assert total.isfinite()
    total.backward()


@pytest.mark.parametrize("pruner", ["evit", "dynamicvit"])
@pytest.mark.parametrize("task", MODELS)
def test_it_trains_logs_and_comes_back_from_its_checkpoint(tmp_path, task, pruner):
    module = small(task)
    callback = TokenPruning(pruner, keep_ratio=0.5, stages=[1], options=PRUNERS[pruner])
    run = trainer(tmp_path, callbacks=[callback])
    run.fit(module, scenes(task))
    assert {"train_loss", "val_loss", f"val_{module.score}"} <= set(run.callback_metrics)
    data = scenes(task, val_size=20)
    logged = run.validate(module, data, verbose=False)[0]
    measured = evaluate(module, data.val_dataloader())
    assert logged[f"val_{module.score}"] == pytest.approx(measured[module.score], abs=1e-6)
    assert 0 < measured["kept_digit_cover"] < 1
    assert f"test_{module.score}" in run.test(module, data, verbose=False)[0]
    run.save_checkpoint(tmp_path / "run.ckpt")
    images = first_batch(task)[0]
    with torch.no_grad():
        wanted = module.eval()(images)
        alone = type(module).load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, map_location="cpu")
        same(alone.eval()(images), wanted)
        same(load_from_checkpoint(type(module), str(tmp_path / "run.ckpt")).eval()(images), wanted)


def test_a_slim_vit_takes_the_place_of_the_trained_one():
    module, images = small("segmentation", blocks=[0, 2]), first_batch("segmentation")[0]
    pruned(module, "dynamicvit")
    with torch.no_grad():
        wanted = module.eval()(images)
        module.model = prunex.slim(module)
        torch.testing.assert_close(module(images), wanted)


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0 is not allowed"),
        ({"blocks": 9}, "indices=9 is not allowed"),
        ({"blocks": []}, r"indices=\[\] is not allowed"),
        ({"fill": float("nan")}, "fill=nan is not allowed"),
        ({"warmup": 2.0}, "warmup=2.0 is not allowed"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is not allowed"),
        ({"architecture": "resnet18", "model_args": None}, "no supported ViT"),
    ],
)
def test_options_that_cannot_be_are_refused(task, options, message):
    arguments = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": dict(SMALL)} | options
    with pytest.raises(PrunexError, match=message) as caught:
        MODELS[task][0](**arguments)
    assert "\n" not in str(caught.value)


def test_options_of_each_that_cannot_be_are_refused():
    with pytest.raises(PrunexError, match="upscale=0 is not allowed"):
        small("segmentation", upscale=0)
    with pytest.raises(PrunexError, match=r"overlap=1.5 is not allowed"):
        small("detection", overlap=1.5)


def test_without_pycocotools_detection_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(detection, "find_spec", lambda name: None)
    with pytest.raises(PrunexError, match="pip install pycocotools"):
        small("detection")


IMAGES = torch.zeros(2, 3, 64, 64)
BOX = {"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize(
    ("task", "batch", "message"),
    [
        ("segmentation", IMAGES, "a batch is a Tensor: give .images, targets"),
        ("segmentation", (IMAGES,), "a batch is 1 parts"),
        ("segmentation", (IMAGES, torch.zeros(2).long()), r"int64 \[2\]: give whole numbers \[2, 64, 64\]"),
        ("segmentation", (IMAGES, torch.zeros(2, 64, 64)), r"float32 \[2, 64, 64\]: give whole numbers"),
        ("segmentation", (IMAGES, torch.full((2, 64, 64), 11)), "run from 11 to 11, the model has 11"),
        ("segmentation", (IMAGES, torch.full((2, 64, 64), -1)), "run from -1 to -1"),
        ("detection", (IMAGES, torch.zeros(2)), "the targets are a Tensor: give a list of 2 dicts"),
        ("detection", (IMAGES, [BOX]), "the targets are 1 of them: give a list of 2 dicts"),
        ("detection", (IMAGES, [BOX, {"boxes": BOX["boxes"]}]), "no boxes .n, 4. with labels"),
        ("detection", (IMAGES, [BOX, BOX | {"labels": torch.tensor([10])}]), "run from 10 to 10, the model has 10"),
        ("detection", (IMAGES, [BOX, BOX | {"boxes": torch.tensor([[8.0, 0.0, 8.0, 8.0]])}]), "no area"),
    ],
)
def test_batches_of_another_kind_are_refused(task, batch, message):
    module = small(task)
    with pytest.raises(PrunexError, match=message) as caught:
        module._evaluate("val", batch)
    assert "\n" not in str(caught.value)
