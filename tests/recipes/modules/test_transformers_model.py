"""Models of transformers train by their own loss and are written where prunex explain reads them."""

from importlib.resources import files

import pytest
import torch

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

import transformers  # noqa: E402
import yaml  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

import prunex.multimodal  # noqa: E402
from prunex import PrunexError  # noqa: E402
from prunex.recipes import BoxQuestions, DrawnShapes, TransformersModel  # noqa: E402

LXMERT = {"model": "LxmertForQuestionAnswering", "config": {}}


def of(name):
    """What a ready config says of the model."""
    return yaml.safe_load((files("prunex.configs") / "synthetic" / f"{name}.yaml").read_text())["model"]["init_args"]


def fit(tmp_path, module, data):
    logger = CSVLogger(tmp_path, name="", version="run")
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": logger}
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, num_sanity_val_steps=0, **options)
    trainer.fit(module, data)
    return tmp_path / "run" / "model", trainer


def test_lxmert(tmp_path):
    torch.manual_seed(0)
    module, data = TransformersModel(**of("lxmert")), BoxQuestions(batch_size=16, train_size=32, val_size=16)
    folder, trainer = fit(tmp_path, module, data)
    assert {"val_loss", "val_accuracy", "train_loss_epoch"} <= set(trainer.callback_metrics)
    read = transformers.LxmertForQuestionAnswering.from_pretrained(folder, local_files_only=True).eval()
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        torch.testing.assert_close(
            read(**{k: v for k, v in batch.items() if k not in ("word", "box")}).question_answering_score,
            module.eval()(batch).question_answering_score,
        )
    again = TransformersModel("LxmertForQuestionAnswering", folder=str(folder))
    assert all(m.training for m in again.model.modules())
    assert torch.equal(again.model.answer_head.logit_fc[0].weight, module.model.answer_head.logit_fc[0].weight)


def test_detr_saves_norms_that_learned_frozen(tmp_path):
    torch.manual_seed(0)
    module, data = TransformersModel(**of("detr")), DrawnShapes(batch_size=4, train_size=8, val_size=4)
    assert all(p.requires_grad for p in module.model.parameters())
    folder, _ = fit(tmp_path, module, data)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules())  # goes on learning
    read = transformers.DetrForObjectDetection.from_pretrained(folder, local_files_only=True).eval()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in read.modules())
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        torch.testing.assert_close(
            read(batch["pixel_values"]).logits, module.eval()(batch).logits, rtol=1e-4, atol=1e-5
        )
    assert read.config.id2label == {0: "circle", 1: "square", 2: "triangle"}
    assert (folder / "preprocessor_config.json").is_file()
    e = prunex.multimodal.explain(read, {"pixel_values": batch["pixel_values"][:1]}, queries=[0])
    assert e.queries[0].map.shape == (12, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "NoSuchModel", "config": {}}, "has no PreTrainedModel called 'NoSuchModel'"),
        ({"model": "os", "config": {}}, "has no PreTrainedModel"),
        ({"model": "DetrConfig", "config": {}}, "has no PreTrainedModel"),
        ({"model": "DetrForObjectDetection"}, "a config .* or a folder"),
        ({"model": "DetrForObjectDetection", "config": {}, "folder": "x"}, "not both"),
        ({"model": "DetrForObjectDetection", "folder": "nowhere"}, "does not exist"),
        (
            {"model": "LxmertForQuestionAnswering", "config": {"hidden_size": 30, "num_attention_heads": 4}},
            "cannot build",
        ),
        (LXMERT | {"warmup": 2.0}, "warmup=2.0"),
        (LXMERT | {"processor": {"do_resize": False}}, "names no class"),
        (
            {"model": "LxmertForQuestionAnswering", "config": {}, "processor": {"name": "Trainer"}},
            "no processor called",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(PrunexError, match=message):
        TransformersModel(**options)


def test_without_the_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PrunexError, match="pip install"):
        TransformersModel("LxmertForQuestionAnswering", {})
