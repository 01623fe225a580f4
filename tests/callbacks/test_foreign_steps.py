"""Steps that do not go through what was attached: refused where weights are trained without it, else told once."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import prunex
from prunex import PrunexError
from prunex.callbacks import MaskPruning, SlimExport, TokenPruning
from tests.callbacks.modules import Plain, data, loader, trainer
from tests.vits import tiny


class Walks(Plain):
    """Goes through the blocks itself, as modules that take features on the way do."""

    def forward(self, x):
        v = self.vit
        return v.head(v.norm(v.blocks(v.norm_pre(v._pos_embed(v.patch_embed(x)))))[:, 0])


class Traced(Plain):
    """Runs a traced copy, which shares the weights."""

    def __init__(self):
        super().__init__()
        self.__dict__["graph"] = torch.jit.trace(self.vit, data(2)[0], check_trace=False)

    def forward(self, x):
        return self.graph(x)


class Functional(Plain):
    """Runs another object with these weights."""

    def __init__(self):
        super().__init__()
        self.__dict__["skeleton"] = tiny().train()

    def forward(self, x):
        own = {n: p for n, p in self.vit.named_parameters() if not n.startswith("prunex")}
        return torch.func.functional_call(self.skeleton, own, (x,))


class Compiled(Plain):
    """Runs a copy of the forward that was compiled when nothing was attached, on the same weights."""

    def __init__(self):
        super().__init__()
        dense = type(self.vit).forward_features
        self.__dict__["graph"] = torch.compile(lambda x: self.vit.head(dense(self.vit, x)[:, 0]), backend="eager")

    def forward(self, x):
        return self.graph(x)


class Copied(Plain):
    """Trains a copy that was made before anything was attached."""

    def __init__(self):
        super().__init__()
        self.__dict__["twin"] = copy.deepcopy(self.vit).train()

    def forward(self, x):
        return self.twin(x)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), *self.twin.parameters()], 0.1)


class Cached(Plain):
    """Trains its head alone on features that were computed before; for so many epochs."""

    def __init__(self, epochs=100):
        super().__init__()
        self.epochs = epochs

    def forward(self, x):
        if self.trainer.training and self.current_epoch < self.epochs:
            return self.vit.head(x.flatten(1)[:, :48])
        return self.vit(x)


@pytest.mark.parametrize("module", [Walks, Traced, Functional, Compiled])
@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_weights_trained_by_another_way_are_refused_before_they_move(tmp_path, module, method):
    module = module()
    before = {n: p.detach().clone() for n, p in module.vit.named_parameters()}
    with pytest.raises(PrunexError, match="trains the VisionTransformer without the forward that"):
        trainer(tmp_path, TokenPruning(method)).fit(module, loader())
    assert all(torch.equal(p, module.vit.get_parameter(n)) for n, p in before.items())


@pytest.mark.parametrize("module", [Copied, Cached])
def test_a_vit_that_takes_no_part_is_told_of_and_not_exported(tmp_path, module):
    run = trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[]))
    told = pytest.warns(UserWarning, match="first training step did not run the VisionTransformer that evit prunes")
    with told, pytest.raises(PrunexError, match="no training step ran"):
        run.fit(module(), loader())
    assert not (tmp_path / "slim").exists()
    assert not any("keep_ratio" in name for name in run.callback_metrics)


def test_a_copy_in_validation_too_means_no_multiply_adds(tmp_path):
    run = trainer(tmp_path, TokenPruning("evit", keep_ratio=0.5))
    with pytest.warns(UserWarning, match="validation did not run the VisionTransformer that evit prunes") as told:
        run.fit(Copied(), loader(), loader(8))
    assert len([w for w in told if "did not run" in str(w.message)]) == 2
    assert not any(name.startswith("prunex/") for name in run.callback_metrics)


def test_a_vit_whose_turn_comes_later_is_exported(tmp_path):
    run = trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[]), max_epochs=2)
    with pytest.warns(UserWarning, match="first training step did not run"):
        run.fit(Cached(epochs=1), loader(), loader(8))
    assert prunex.load(tmp_path / "slim") is not None
    assert run.callback_metrics["prunex/keep_ratio_stage1"] < 1


class ByHand(Walks):
    """Optimises by hand, another network first."""

    def __init__(self, walks=True):
        super().__init__()
        self.other, self.automatic_optimization, self.walks = nn.Linear(4, 1), False, walks

    def training_step(self, batch, index):
        one, two = self.optimizers()
        one.zero_grad()
        self.manual_backward(self.other(torch.ones(2, 4)).sum())
        one.step()
        two.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]) if self.walks else self.vit(batch[0]), batch[1]))
        two.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.other, self.vit)]


def test_by_hand_the_whole_batch_counts(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*did not run.*")
        trainer(tmp_path, TokenPruning("evit")).fit(ByHand(walks=False), loader())
    with pytest.raises(PrunexError, match="without the forward that evit prunes"):
        trainer(tmp_path, TokenPruning("evit")).fit(ByHand(), loader())


@pytest.mark.parametrize("method", ["taylor", "magnitude"])
def test_units_of_a_graph_are_not_gated(tmp_path, method):
    with pytest.raises(PrunexError, match=f"without the forward that {method} prunes"):
        trainer(tmp_path, MaskPruning(method, budget=0.7, remove=False)).fit(Traced(), loader())
    # whoever goes through the blocks goes through their gates
    trainer(tmp_path, MaskPruning(method, budget=0.7, remove=False)).fit(Walks(), loader())


def test_units_of_a_copy(tmp_path):
    for remove in (True, False):
        run = trainer(tmp_path, MaskPruning("magnitude", budget=0.7, remove=remove))
        with pytest.warns(UserWarning, match="first training step did not run"):
            run.fit(Copied(), loader())


def test_no_gradient_for_what_shall_learn(tmp_path):
    class Probe(Plain):
        def forward(self, x):
            with torch.no_grad():
                features = self.vit.forward_features(x)
            return self.vit.head(features[:, 0])

    with pytest.warns(UserWarning, match="no gradient reached the parameters of dynamicvit"):
        trainer(tmp_path, TokenPruning("dynamicvit", options={"teacher": False})).fit(Probe(), loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no gradient.*")
        trainer(tmp_path, TokenPruning("evit")).fit(Probe(), loader())  # it learns nothing of its own


# ----------------------------------------------------------------------------------------------------- stale traces


class Average(Plain):
    """Validates a copy that is made at the first validation."""

    def validation_step(self, batch, index):
        self.__dict__.setdefault("ema", copy.deepcopy(self.vit).eval())
        prunex.attached(self.ema).detach() if prunex.attached(self.ema) else None
        self.ema(batch[0])


class Skips(Plain):
    def validation_step(self, batch, index):
        return None


class Second(Plain):
    """Runs the model on the second loader alone."""

    def validation_step(self, batch, index, dataloader_idx=0):
        if dataloader_idx == 1:
            self(batch[0])


def two_loaders():
    return [loader(8), loader(8, seed=9)]


@pytest.mark.parametrize(
    ("module", "batches", "told"), [(Average, loader, True), (Skips, loader, True), (Second, two_loaders, False)]
)
def test_a_training_trace_is_no_validation(tmp_path, module, batches, told):
    run = trainer(tmp_path, TokenPruning("topk", options={"count": "adaptive", "threshold": 0.6}))
    module = module()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.fit(module, loader(), batches())
    assert any("validation did not run" in str(w.message) for w in seen) == told
    assert not any("val_keep_ratio" in name for name in run.callback_metrics)
    assert prunex.attached(module).options["expected"] is None
    assert 0 < float(run.callback_metrics["prunex/keep_ratio_stage1"]) < 1


def test_steps_without_the_model_count_nothing(tmp_path):
    class Every(Plain):
        """Runs its ViT on every other batch; on the others there is a loss without it."""

        def forward(self, x):
            return self.vit(x) if self.runs_now else self.vit.head(x.flatten(1)[:, :48])

        def training_step(self, batch, index):
            self.runs_now = index % 2 == 0
            return super().training_step(batch, index)

    batches = DataLoader([(x, y) for x, y in zip(*data(12), strict=True)], 4)
    module = Every()
    run = trainer(tmp_path, TokenPruning("topk", options={"count": "adaptive", "threshold": 0.6}))
    shares = []
    module.vit.register_forward_hook(
        lambda m, *_: shares.append(float(prunex.attached(m).trace.keep_ratios()[0].mean()))
    )
    run.fit(module, batches)
    assert len(shares) == 2
    assert float(run.callback_metrics["prunex/keep_ratio_stage1"]) == pytest.approx(sum(shares) / 2, rel=1e-5)
