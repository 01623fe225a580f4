import json

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import prunex
from prunex import PrunexError
from prunex.callbacks import SafeCheckpointIO, TokenPruning
from prunex.recipes import DigitScenes, ImageClassifier
from prunex.recipes.given import shipped_weights
from prunex.recipes.modules.backbone import SaveWeights, create_model, load_weights
from prunex.recipes.modules.classifier import patch_labels

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


def small(**arguments):
    return ImageClassifier(ARCHITECTURE, 10, dict(SMALL), **({"from_scratch": "weights" not in arguments} | arguments))


def trainer(folder, **arguments):
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
        "plugins": [SafeCheckpointIO()],
    }  # fmt: skip
    return Trainer(**(defaults | arguments))


def scenes(**arguments):
    return DigitScenes(**({"batch_size": 8, "train_size": 24, "val_size": 16} | arguments))


def loader(batch):
    return DataLoader([batch, batch], batch_size=None)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"patch_label_weight": 1.0}, {"mixup": 0.2, "cutmix": 1.0}, {"label_smoothing": 0.1, "warmup": 0.5}],
)
def test_it_trains_validates_and_predicts(tmp_path, arguments):
    module = small(**arguments)
    before = module.model.head.weight.detach().clone()
    run = trainer(tmp_path)
    run.fit(module, scenes())
    assert not torch.equal(before, module.model.head.weight)
    assert {"train_loss_epoch", "val_loss", "val_accuracy"} <= set(run.callback_metrics)
    assert "test_accuracy" in run.test(module, scenes(), verbose=False)[0]
    probabilities = torch.cat(run.predict(module, scenes()))
    assert probabilities.shape == (16, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(16))


def test_batches_of_two_parts_will_do(tmp_path):
    batch = (torch.randn(4, 3, 64, 64), torch.arange(4))
    run = trainer(tmp_path)
    run.fit(small(), loader(batch), loader(batch))
    assert "val_accuracy" in run.callback_metrics


def test_a_checkpoint_reads_back_plainly_and_without_the_first_weights(tmp_path):
    source = tmp_path / "start.safetensors"
    save_file(small().model.state_dict(), source)
    module = small(weights=str(source), patch_label_weight=0.5)
    run = trainer(tmp_path)
    run.fit(module, scenes())
    run.save_checkpoint(tmp_path / "run.ckpt")
    source.unlink()
    again = ImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, map_location="cpu").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), module.eval()(images))


@pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit"])
def test_a_pruned_model_comes_back_from_its_checkpoint(tmp_path, method):
    module = small(pruning={"method": method, "keep_ratio": 0.5, "stages": [1]})
    run = trainer(tmp_path)
    run.fit(module, scenes())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, map_location="cpu").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), module.eval()(images))
    assert prunex.attached(again).spec == prunex.attached(module).spec


def test_a_model_pruned_by_the_callback_comes_back_without_it(tmp_path):
    module = small()
    run = trainer(tmp_path, callbacks=[TokenPruning("dynamicvit", keep_ratio=0.5, stages=[1])])
    run.fit(module, scenes())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, map_location="cpu").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), module.eval()(images))


def test_patch_labels_and_masked_pruning_train_together(tmp_path):
    module = small(patch_label_weight=1.0)
    head = module.patch_head.weight.detach().clone()
    run = trainer(tmp_path, callbacks=[TokenPruning("dynamicvit", keep_ratio=0.5, stages=[1])])
    run.fit(module, scenes())
    assert not torch.equal(module.patch_head.weight, head)
    assert {"train_patch_loss", "prunex/loss_ratio"} <= set(run.callback_metrics)


def test_patch_labels_refuse_tokens_that_left(tmp_path):
    with pytest.raises(PrunexError, match="needs all 16 patch tokens"):
        trainer(tmp_path, callbacks=[TokenPruning("evit", keep_ratio=0.5, stages=[1])]).fit(
            small(patch_label_weight=1.0), scenes()
        )


def test_a_pruning_without_a_method_is_refused(tmp_path):
    with pytest.raises(PrunexError, match="names no method"):
        small(pruning={"keep_ratio": 0.5}).configure_model()


def test_training_resumes_where_it_stopped(tmp_path):
    torch.manual_seed(0)
    module = small()
    trainer(tmp_path, max_epochs=2, enable_checkpointing=True).fit(module, scenes())
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    run = trainer(tmp_path, max_epochs=3)
    run.fit(small(), scenes(), ckpt_path=checkpoint)
    assert run.current_epoch == 3
    assert run.global_step == 9


def test_biases_norms_and_embeddings_are_not_decayed_and_the_head_has_its_own_rate():
    module = small(weight_decay=0.1, learning_rate=0.01, head_lr_scale=5.0)
    module._trainer = type("FakeTrainer", (), {"estimated_stepping_batches": 100})()
    groups = module.configure_optimizers()["optimizer"].param_groups
    settings = {id(p): (g["weight_decay"], g["initial_lr"]) for g in groups for p in g["params"]}
    model = module.model
    assert settings[id(model.blocks[0].mlp.fc1.weight)] == (0.1, 0.01)
    for exempt in (model.pos_embed, model.cls_token, model.blocks[0].norm1.weight, model.blocks[0].mlp.fc1.bias):
        assert settings[id(exempt)] == (0.0, 0.01)
    assert settings[id(model.head.weight)] == (0.1, 0.05)
    assert settings[id(model.head.bias)] == (0.0, 0.05)
    assert sum(len(g["params"]) for g in groups) == len(settings) == len(list(module.parameters()))


def test_the_learning_rate_rises_and_falls():
    module = small(learning_rate=1.0, warmup=0.1, final_learning_rate=0.01)
    module._trainer = type("FakeTrainer", (), {"estimated_stepping_batches": 100})()
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    factors = [schedule.lr_lambdas[0](step) for step in range(101)]
    assert factors[0] < 0.2
    assert factors[10] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_patch_labels_follow_the_mask():
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 16:32, 48:64] = True
    labels = patch_labels(masks, torch.tensor([3, 5]), (4, 4), background=10)
    assert labels[0].tolist() == [10] * 7 + [3] + [10] * 8
    assert labels[1].tolist() == [10] * 16


def test_weights_of_another_grid_and_class_count(tmp_path, caplog):
    source, path = small().model, tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    target = create_model(ARCHITECTURE, 4, SMALL | {"img_size": 96})
    with caplog.at_level("WARNING"):
        untouched = load_weights(target, str(path))
    assert set(untouched) == {"head.weight", "head.bias"}
    assert "starts untrained" in caplog.text
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(target.pos_embed[:, :1], source.pos_embed[:, :1])
    assert target(torch.zeros(1, 3, 96, 96)).shape == (1, 4)


def test_weights_with_layer_scale_and_registers(tmp_path):
    arguments = SMALL | {"img_size": 56, "patch_size": 14, "reg_tokens": 4, "no_embed_class": True}
    name = "vit_small_patch14_reg4_dinov2"
    source = timm.create_model(name, num_classes=0, **arguments)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = create_model(name, 10, arguments | {"img_size": 84})
    load_weights(target, str(tmp_path / "w.safetensors"))
    assert torch.equal(target.blocks[0].ls1.gamma, source.blocks[0].ls1.gamma)
    assert torch.equal(target.reg_token, source.reg_token)
    assert target(torch.zeros(1, 3, 84, 84)).shape == (1, 10)


def test_weights_saved_from_the_whole_module(tmp_path):
    module = small(patch_label_weight=1.0)
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    save_file(state, tmp_path / "w.safetensors")
    other = small(weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(other.model.head.weight, module.model.head.weight)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(small().model.state_dict(), path)
    with pytest.raises(PrunexError, match=r"do not fit.*wrong shape.*check architecture"):
        load_weights(create_model(ARCHITECTURE, 10, SMALL | {"embed_dim": 64}), str(path))
    with pytest.raises(PrunexError, match=r"missing: blocks\.2"):
        load_weights(create_model(ARCHITECTURE, 10, SMALL | {"depth": 3}), str(path))
    with pytest.raises(PrunexError, match=r"unknown: blocks\.1"):
        load_weights(create_model(ARCHITECTURE, 10, SMALL | {"depth": 1}), str(path))
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(PrunexError, match="not a readable safetensors file"):
        small(weights=str(path))
    torch.save(small().model.state_dict(), path)
    with pytest.raises(PrunexError, match=r"is a file of torch\.save.*convert it once by safetensors"):
        small(weights=str(path))
    with pytest.raises(PrunexError, match=r"neither a file nor shipped"):
        small(weights=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"architecture": "vit_tinny_patch16_224"}, "unknown architecture 'vit_tinny_patch16_224'.*vit_tiny"),
        ({"model_args": {"dept": 3}}, r"does not accept model_args=.*dept"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5.*in .0, 1."),
        ({"warmup": -0.1}, "warmup=-0.1.*in .0, 1."),
        ({"patch_label_weight": -1.0}, "patch_label_weight=-1.0.*at least 0"),
        ({"architecture": "resnet18", "patch_label_weight": 1.0}, "needs a ViT"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message):
    with pytest.raises(PrunexError, match=message):
        ImageClassifier(**({"architecture": ARCHITECTURE, "num_classes": 10} | arguments))


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(PrunexError, match=r"pretrained=True.*no route to host.*weights="):
        ImageClassifier(ARCHITECTURE, 10, pretrained=True)


def test_batches_that_cannot_be_learnt_from(tmp_path):
    images, masks = torch.randn(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.bool)
    with pytest.raises(PrunexError, match=r"labels run from 0 to 12, the model has 10"):
        trainer(tmp_path).fit(small(), loader((images, torch.tensor([0, 1, 2, 12]), masks)))
    with pytest.raises(PrunexError, match="no masks"):
        trainer(tmp_path).fit(small(patch_label_weight=1.0), loader((images, torch.arange(4))))
    with pytest.raises(PrunexError, match="one part"):
        trainer(tmp_path).fit(small(), loader((images,)))


def test_save_weights_writes_a_file_that_tells_its_story(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    module = small()
    trainer(tmp_path, callbacks=[SaveWeights(str(path))]).fit(module, scenes())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model_args"]) == SMALL
    assert metadata["architecture"] == ARCHITECTURE
    assert 0 <= float(metadata["val_accuracy"]) <= 1
    again = create_model(metadata["architecture"], int(metadata["num_classes"]), json.loads(metadata["model_args"]))
    assert load_weights(again, str(path)) == []
    with pytest.raises(PrunexError, match=r"ending in \.safetensors"):
        SaveWeights("weights.pt")


def test_the_shipped_weights_are_small_and_know_their_digits(tmp_path):
    from importlib.resources import as_file, files

    assert "digits" in shipped_weights()
    with as_file(files("prunex.recipes") / "weights" / "digits.safetensors") as path:
        assert path.stat().st_size < 3_000_000
        state = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    module = ImageClassifier(metadata["architecture"], 10, json.loads(metadata["model_args"]), weights="digits")
    metrics = trainer(tmp_path).validate(module, DigitScenes(val_size=2000), verbose=False)[0]
    assert metrics["val_accuracy"] >= 0.92
    assert metrics["val_accuracy"] == pytest.approx(float(metadata["val_accuracy"]), abs=0.002)
