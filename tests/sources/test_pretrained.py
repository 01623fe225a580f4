"""transformers' wrapper of timm models: pruned, explained and trained as it is, saved and opened pruned."""

import copy
import json
import logging
import pickle
import warnings

import lightning as L
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prunex
from prunex import PrunexError
from prunex.callbacks import RelevancyMonitor, TokenPruning
from tests.sources.models import images, transformers

ARGS = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}
PRUNERS = {
    "evit": {"keep_ratio": 0.6, "stages": (1, 2)},
    "topk": {"keep_ratio": 0.6, "stages": (1, 2), "schedule": "linear", "shrink_length": 0.5},
    "dynamicvit": {"keep_ratio": 0.6, "stages": (1, 2)},
    "tome": {"r": 2},
    "diffrate": {"keep_ratio": 0.7},
    "ppt": {"r": 3, "tau": 0.01},
}


def wrapper(cls="TimmWrapperForImageClassification", architecture="vit_tiny_patch16_224", **args):
    config = transformers.TimmWrapperConfig(architecture=architecture, model_args=ARGS | args)
    config.num_labels = 5
    model = getattr(transformers, cls)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    return model.eval()


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("name", PRUNERS)
def test_it_comes_back_pruned(name, tmp_path):
    model, x = wrapper(), images()
    dense = logits(model, x)
    pruning = prunex.attach(model, name, **PRUNERS[name])
    pruning.progress = 0.3
    with torch.no_grad():
        for parameter in pruning.pruner.parameters():
            parameter.normal_(std=0.3)
    want = logits(model, x)
    assert not torch.equal(want, dense)
    model.save_pretrained(tmp_path)
    again = prunex.load_pretrained(tmp_path)
    assert logits(again, x).equal(want)
    assert type(again) is type(model)
    assert not again.training
    handle = prunex.attached(again)
    assert handle.spec == json.loads(json.dumps(pruning.spec))
    assert handle.progress == 0.3
    assert json.loads((tmp_path / "config.json").read_text())["prunex"]["pruning"]["method"] == name
    again.save_pretrained(str(tmp_path / "again"))  # what was opened is saved alike
    assert logits(prunex.load_pretrained(tmp_path / "again"), x).equal(want)


def test_the_library_alone_gives_a_dense_one_and_says_so(tmp_path, caplog):
    model, x = wrapper(), images()
    dense = logits(model, x)
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2))
    model.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        plain = type(model).from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert logits(plain, x).equal(dense)
    assert "open_with.prunex.load_pretrained" in caplog.text


def test_once_detached_it_is_saved_as_ever(tmp_path):
    model, x = wrapper(), images()
    dense = logits(model, x)
    prunex.attach(model, "evit", keep_ratio=0.6).detach()
    model.save_pretrained(tmp_path)
    assert "prunex" not in json.loads((tmp_path / "config.json").read_text())
    assert not any("prunex" in name for name in load_file(tmp_path / "model.safetensors"))
    for opened in (type(model).from_pretrained(tmp_path), prunex.load_pretrained(tmp_path)):
        assert logits(opened, x).equal(dense)


def test_nothing_stays_behind_on_the_model(tmp_path):
    model = wrapper()
    prunex.attach(model, "evit", keep_ratio=0.6)
    names = list(model.state_dict())
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    before |= {key: model.config.to_dict()[key] for key in ("architectures", "dtype")}  # the library's own
    assert model.config.to_dict() == before
    assert list(model.state_dict()) == names
    assert not any("open_with" in name for name in names)


def test_a_failed_save_leaves_the_configuration(tmp_path):
    model = wrapper()
    prunex.attach(model, "evit", keep_ratio=0.6)
    with pytest.raises(TypeError):
        model.save_pretrained(None)
    assert not hasattr(model.config, "prunex")


def test_units_head_and_tokens_together(tmp_path):
    model, x = wrapper(), images()
    units = prunex.attach(model, "magnitude", budget=0.7)
    units.calibrate()
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2))
    prunex.attach(model, "mean_patch")
    want = logits(model, x)
    model.save_pretrained(tmp_path)
    again = prunex.load_pretrained(tmp_path)
    assert torch.allclose(logits(again, x), want, atol=1e-6)
    assert prunex.attached(again, head=True).method == "mean_patch"


def test_copies_say_what_hangs_on_them(tmp_path):
    model, x = wrapper(), images()
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2))
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        prunex.attached(twin).detach()
        prunex.attach(twin, "topk", keep_ratio=0.5, stages=(1,))
        twin.save_pretrained(tmp_path / str(number))
        again = prunex.load_pretrained(tmp_path / str(number))
        assert prunex.attached(again).method == "topk"
        assert logits(again, x).equal(logits(twin, x))
    assert prunex.attached(model).method == "evit"


def test_in_shards_in_half_precision_and_without_a_classifier(tmp_path):
    model = wrapper("TimmWrapperModel").bfloat16()
    prunex.attach(model, "topk", keep_ratio=0.6, stages=(1, 2))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, x = prunex.load_pretrained(tmp_path), images().bfloat16()
    with torch.no_grad():
        assert again(x).pooler_output.equal(model(x).pooler_output)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


class Module(L.LightningModule):
    """Somebody's module round the wrapper."""

    def __init__(self):
        super().__init__()
        self.net = wrapper()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0], labels=batch[1]).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0], labels=batch[1]).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_trained_monitored_and_saved_in_a_run(tmp_path):
    module, x = Module(), images(batch=4)
    data = torch.utils.data.DataLoader(list(zip(x, torch.arange(4), strict=True)), batch_size=2)
    callbacks = [TokenPruning("evit", keep_ratio=0.6, options={"stages": (1, 2)}), RelevancyMonitor(["rollout"])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(
            default_root_dir=tmp_path, max_epochs=1, callbacks=callbacks, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False,
        ).fit(module, data, data)  # fmt: skip
    assert list(tmp_path.rglob("relevancy-*.png"))
    module.eval()
    module.net.save_pretrained(tmp_path / "net")
    assert logits(prunex.load_pretrained(tmp_path / "net"), x).equal(logits(module.net, x))


@pytest.mark.parametrize("method", ["rollout", "generic_attention"])
def test_explained_through_the_wrapper(method):
    model, x = wrapper(), images()
    e = prunex.explain(method, model, x, target=2)
    assert torch.allclose(e.logits, logits(model, x), atol=1e-5)
    assert torch.allclose(e.maps, prunex.explain(method, model.timm_model, x, target=2).maps)


def test_a_wrapper_needs_no_twin():
    with pytest.raises(PrunexError, match="holds a timm model, which prunex.attach and prunex.explain take as it is"):
        prunex.from_transformers(wrapper())


def edited(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | values))


PRUNING = {"method": "evit", "keep_ratio": 0.6, "stages": [1, 2]}
EDITED = {
    "another class": ({"architectures": ["ViTModel"]}, "is of ViTModel, and this opens TimmWrapperForImage"),
    "a hub's name": ({"architecture": "hf-hub:someone/model"}, "is of 'hf-hub:someone/model', which timm"),
    "an unknown name": ({"architecture": "vit_of_mine"}, "which timm .* does not know"),
    "too deep": ({"model_args": {"depth": 10**9}}, "'depth' is nothing that describes a model"),
    "a file": ({"model_args": {"checkpoint_path": "x.pth"}}, "'checkpoint_path' is nothing that describes"),
    "an unknown argument": ({"model_args": {"wings": 2}}, "cannot be opened: TypeError"),
    "a later version": ({"prunex": {"version": 2}}, "by a later prunex"),
    "an unknown pruner": ({"prunex": {"pruning": {"method": "evitt"}}}, "unknown pruner 'evitt'"),
    "an explainer's folder": ({"prunex": {"pruning": PRUNING | {"explainer": "/"}}}, "is none of prunex's"),
    "no mapping": ({"prunex": {"pruning": [1]}}, "is none of prunex's"),
    "a pruner with parameters": ({"prunex": {"pruning": {"method": "dynamicvit"}}}, "do not fit what its config.json"),
    "another depth": ({"model_args": ARGS | {"depth": 3}}, "stages|do not fit what its config.json"),
}


@pytest.mark.parametrize("what", EDITED)
def test_an_edited_folder_is_refused(what, tmp_path):
    model = wrapper()
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2))
    model.save_pretrained(tmp_path)
    values, wrong = EDITED[what]
    edited(tmp_path, **values)
    with pytest.raises(PrunexError, match=wrong) as told:
        prunex.load_pretrained(tmp_path)
    assert "\n" not in str(told.value)


def test_weights_of_another_model_are_refused(tmp_path):
    model = wrapper()
    prunex.attach(model, "evit", keep_ratio=0.6)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"timm_model.head.weight": torch.zeros(5, 47)}, path, metadata={"format": "pt"})
    with pytest.raises(PrunexError, match="do not fit what its config.json says .timm_model.head.weight"):
        prunex.load_pretrained(tmp_path)


def test_a_module_that_only_looks_like_the_wrapper_is_left_alone():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.timm_model = timm.create_model("vit_tiny_patch16_224", **ARGS)

    mine = Mine()
    prunex.attach(mine, "evit", keep_ratio=0.6)
    assert "save_pretrained" not in vars(mine)
