"""ExplainableHead in modules and on batches that were not made for it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import prunex
from prunex import PrunexError
from prunex.callbacks import ExplainableHead
from tests.callbacks.modules import Plain, data, loader, trainer
from tests.heads.heads import HEADS, OPTIONS

IMAGES, LABELS = data(8)
ODD = LABELS % 2 > 0
GLOBAL = {"concepts": ["odd", "even"]}


class ByKey(Plain):
    """Reads dicts."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        self(batch["image"])


class Views(Plain):
    """Two views of a batch in one forward."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(torch.cat([x, x.flip(3)])), torch.cat([y, y]))


class Pools(Plain):
    """Pools tokens itself, and calls the classifier."""

    def forward(self, x):
        return self.vit.head(self.vit.pool(self.vit.forward_features(x)))


class Rests(Plain):
    """Keeps its ViT in eval mode."""

    def on_train_start(self):
        self.vit.eval()
        if self.hparams.returns == "dict":
            self.vit.prunex_head.train()


def rows(**columns):
    columns = {"image": IMAGES, "label": LABELS} | columns
    return DataLoader([{k: v[i] for k, v in columns.items()} for i in range(8)], 4)


def fit(folder, method, options, module, batches, validation=None, **kwargs):
    run = trainer(folder, ExplainableHead(method, dict(options)), **kwargs)
    run.fit(module, batches, validation)
    return run.callback_metrics


def test_bool_concepts_teach_as_numbers_do(tmp_path):
    marks, ink = torch.stack([ODD, ~ODD], 1), (torch.arange(16) % 2 > 0).expand(8, 16)[..., None]
    seen = []
    for kind in (torch.bool, torch.int64, torch.float32):
        torch.manual_seed(0)
        batches = rows(concepts=marks.to(kind), spatial_concepts=ink.to(kind))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="no concept labels")
            measured = fit(tmp_path, "concept_transformer", GLOBAL | {"spatial": ["ink"]}, ByKey(), batches, batches)
        seen.append({k: float(v) for k, v in measured.items() if k.startswith("prunex/")})
    assert {"prunex/loss_explanation", "prunex/val_top_concept"} <= set(seen[0])
    assert seen[0] == seen[1] == seen[2]


def test_concepts_that_mean_something_else(tmp_path):
    batches = rows(concepts=torch.arange(56).reshape(8, 7))
    fit(tmp_path, "vit_net", {"depth": 2}, ByKey(), batches, batches)  # nobody asks for them
    for train, validate in ((batches, None), (rows(), batches)):
        with pytest.raises(PrunexError, match=r"global concept labels have shape \[4, 7\]: give \[4, 2\]"):
            fit(tmp_path, "concept_transformer", GLOBAL, ByKey(), train, validate, num_sanity_val_steps=0)
    listed = DataLoader([{"image": IMAGES[i], "label": LABELS[i], "concepts": [1.0, 0.0]} for i in range(8)], 4)
    with pytest.raises(PrunexError, match="concept_transformer found no concepts in the training batch .* one tensor"):
        fit(tmp_path, "concept_transformer", GLOBAL, ByKey(), listed)


@pytest.mark.parametrize("name", HEADS)
def test_two_views_in_one_forward(tmp_path, name):
    measured = fit(tmp_path, name, OPTIONS[name], Views(), loader(8))
    wanted = {"concept_transformer": {"prunex/loss_sparsity"}, "attributes": {"prunex/loss_diversity"}}
    assert {n for n in measured if n.startswith("prunex/loss_")} == wanted.get(name, set())


def test_an_intervention_left_on_is_told(tmp_path):
    module = Plain()
    prunex.attach(module, "concept_transformer", **OPTIONS["concept_transformer"]).intervene({"ink": 1})
    with pytest.warns(UserWarning, match=r"attention set by hand \(\{'ink': 1.0\}\), which no checkpoint keeps"):
        fit(tmp_path, "concept_transformer", OPTIONS["concept_transformer"], module, loader(8))


def test_a_module_that_pools_itself_is_told_how_to_reach_the_head(tmp_path):
    with pytest.raises(PrunexError, match=r"it pools tokens or calls the classifier itself, .* or its forward_head"):
        fit(tmp_path, "attributes", {}, Pools(), loader(8))


def test_a_head_in_eval_mode_is_told(tmp_path):
    with pytest.warns(UserWarning, match="runs attributes in eval mode, in which it brings no losses"):
        measured = fit(tmp_path, "attributes", {}, Rests(), loader(8))
    assert "prunex/loss_diversity" not in measured
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in eval mode, in which")
        measured = fit(tmp_path, "attributes", {}, Rests(returns="dict"), loader(8))
    assert float(measured["prunex/loss_diversity"]) > 0


@pytest.mark.parametrize("name", ["vit_net", "concept_transformer"])
def test_a_compiled_validation_is_told_and_measures_nothing_old(tmp_path, name):
    module = Plain()
    head = prunex.attach(module, name, **OPTIONS[name])
    head.read(IMAGES)
    with torch.no_grad():
        module.eval()(IMAGES[:4])
    assert head.last is not None
    module.train()
    module.vit.compile(backend="eager")
    with pytest.warns(
        UserWarning, match=f"validation runs {name} compiled or with a graph, which leaves nothing to measure"
    ):
        measured = fit(tmp_path, name, OPTIONS[name], module, loader(8), loader(8))
    assert not any(k.startswith("prunex/val") for k in measured)
    assert head.last is None
