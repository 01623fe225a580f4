"""Calibration and guidance: images as they enter the ViT, labels as classes of what the whole module gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunex
from prunex import PrunexError
from prunex.callbacks import MaskPruning, RelevancyGuidance, TokenPruning
from prunex.guidance import Guidance
from tests.callbacks.modules import Plain, data, loader, trainer
from tests.vits import images, tiny

LABELS = torch.tensor([2, 0, 1])


class Behind(Plain):
    """Normalises before its ViT, and makes three classes of its five."""

    def __init__(self):
        super().__init__()
        self.behind = nn.Linear(5, 3)

    def forward(self, x):
        return self.behind(super().forward((x - 0.5) / 0.25))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1] % 3)


def folded(module):
    """The same function as one ViT: three classes in its own head."""
    vit = copy.deepcopy(module.vit)
    with torch.no_grad():
        head = nn.Linear(48, 3)
        head.weight.copy_(module.behind.weight @ vit.head.weight)
        head.bias.copy_(module.behind.weight @ vit.head.bias + module.behind.bias)
    vit.reset_classifier(3)
    vit.head = head
    return vit.double()


@pytest.mark.parametrize("pruner", [None, "evit"])
@pytest.mark.parametrize("method", ["taylor", "magnitude"])
def test_units_are_scored_by_the_modules_own_loss(method, pruner):
    module = Behind().double()
    whole = folded(module)
    for model in (module.vit, whole):
        if pruner:
            prunex.attach(model, pruner, keep_ratio=0.7, stages=(1, 2))
    x = images().double()
    found = prunex.attach(module, method, budget=0.6).calibrate([(x, LABELS)], module)
    assert found == prunex.attach(whole, method, budget=0.6).calibrate([((x - 0.5) / 0.25, LABELS)])
    assert module.training


def test_scores_are_those_of_the_whole_function():
    module = Behind().double()
    whole, x = folded(module), images().double()
    prunex.attach(whole, "taylor", budget=0.6)
    wanted = prunex.attached(whole, units=True).pruner.scores(whole, [((x - 0.5) / 0.25, LABELS)])
    pruning, seen = prunex.attach(module, "taylor", budget=0.6), []
    scores = pruning.pruner.scores
    pruning.pruner.scores = lambda *args: seen.append(scores(*args)) or seen[-1]
    pruning.calibrate([(x, LABELS)], module)
    for key, value in wanted.items():
        assert torch.allclose(seen[0][key], value)


def test_labels_must_be_classes_of_the_module():
    module = Behind()
    pruning = prunex.attach(module, "taylor", budget=0.6)
    with pytest.raises(PrunexError, match=r"labels run from 3 to 4: this model has classes 0\.\.2"):
        pruning.calibrate([(images(), torch.tensor([3, 4, 4]))], module)


def test_mask_pruning_calibrates_on_the_whole_module(tmp_path):
    module = Behind()
    batches = [(x, y % 3) for x, y in loader(8)]
    other = copy.deepcopy(module)
    wanted = prunex.attach(other, "taylor", budget=0.6).calibrate(batches, other)
    pruning = MaskPruning("taylor", budget=0.6, images=8)
    trainer(tmp_path, pruning).fit(module, torch.utils.data.DataLoader(Modulo(8), 4))
    assert pruning.pruning.widths == wanted


class Modulo(torch.utils.data.Dataset):
    """Images with labels 0..2."""

    def __init__(self, count):
        self.x, self.y = data(count)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i] % 3


@pytest.mark.parametrize(
    ("callbacks", "says"),
    [
        ([MaskPruning("xpruner", budget=0.7)], "xpruner goes by the VisionTransformer's own 5 classes, and Behind"),
        (
            [TokenPruning("evit"), RelevancyGuidance("rollout")],
            "RelevancyGuidance goes by the VisionTransformer's own 5 classes",
        ),
    ],
)
def test_who_compares_the_vits_own_logits_with_labels(tmp_path, callbacks, says):
    run = trainer(tmp_path, *callbacks)
    with pytest.raises(PrunexError, match=says):
        run.fit(Behind(), loader(8))
    assert run.global_step == 0


def test_a_module_whose_output_is_its_vits_is_guided(tmp_path):
    run = trainer(tmp_path, TokenPruning("evit"), RelevancyGuidance("rollout"))
    run.fit(Plain(), loader(8))
    assert run.global_step == 2


def test_guidance_of_a_module_by_hand():
    module = Behind()
    prunex.attach(module, "evit", stages=(1,))
    with pytest.raises(PrunexError, match="guidance goes by"):
        Guidance(module, "rollout")


def test_the_dense_judge_grows_with_the_model():
    model = tiny().train()
    pruning = prunex.attach(model, "topk", stages=(1, 2))
    guide = Guidance(model, "rollout")
    pruning.also(guide)
    for size in (32, 48):
        model.set_input_size(img_size=size)
        model(torch.randn(2, 3, size, size))
        assert torch.isfinite(pruning.losses(torch.tensor([0, 1]))["guidance"])
    dense = tiny()
    dense.set_input_size(img_size=48)
    assert torch.allclose(guide.teacher.pos_embed, dense.pos_embed)
    model.reset_classifier(7)
    model.train()(torch.randn(2, 3, 48, 48))
    with pytest.raises(PrunexError, match="the model has 7 classes, and the dense judge of guidance 5"):
        pruning.losses(torch.tensor([0, 1]))
