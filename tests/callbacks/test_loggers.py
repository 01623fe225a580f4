"""Pictures and numbers in the loggers people use, read back from what each wrote, without any network."""

import json
import logging
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_module
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from prunex.callbacks import KeptTokenMonitor, RelevancyMonitor, TokenPruning
from prunex.callbacks.run_folder import run_folder
from tests.callbacks.modules import Plain, csv_logger, loader, trainer

NAMES = ("kept_tokens", "relevancy")
STEPS = [1, 3]  # of two epochs of two steps, counted from 0, as Lightning numbers what is logged at an epoch's end


def fit(folder, logger, module=None):
    """Two epochs with both monitors, and the run's folder."""
    monitors = [KeptTokenMonitor(images=2), RelevancyMonitor(images=2)]
    run = trainer(folder, TokenPruning("topk", keep_ratio=0.5), *monitors, logger=logger, max_epochs=2)
    run.fit(module or Plain(), loader(8), loader(8, masks=True))
    return run_folder(run)


def pixels(file):
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(file).convert("RGB"))


def check(run, arrived, numbers):
    """``arrived``: by picture [(step, uint8 array)] in the order they came; ``numbers``: the loss's steps."""
    assert set(arrived) == set(NAMES)
    for name, pictures in arrived.items():
        assert [step for step, _ in pictures] == STEPS
        for epoch, (_, picture) in enumerate(pictures):
            assert np.array_equal(picture, pixels(run / "maps" / f"{name}-epoch={epoch:03d}.png"))
    assert numbers == STEPS


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="tb")
    run = fit(tmp_path, logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    arrived = {}
    for name in NAMES:
        shown = events.Images(f"prunex/{name}")
        for event in shown:
            (tmp_path / "shown.png").write_bytes(event.encoded_image_string)
            arrived.setdefault(name, []).append((event.step, pixels(tmp_path / "shown.png")))
    check(run, arrived, [event.step for event in events.Scalars("val_loss")])


class Twice(Plain):
    """Two optimisers, stepped in turn by hand: global_step counts each of them."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimiser in self.optimizers():
            optimiser.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimiser.step()

    def configure_optimizers(self):
        first, second = list(self.vit.blocks.parameters()), list(self.vit.head.parameters())
        return [torch.optim.SGD(some, 0.1) for some in (first, second)]


def test_pictures_lie_beside_the_numbers_with_several_optimisers(tmp_path):
    class Steps(CSVLogger):
        shown = []

        def log_image(self, key, images, step=None):
            self.shown.append(step)

        def log_metrics(self, metrics, step=None):
            if "val_loss" in metrics:
                self.shown.append(step)

    fit(tmp_path, Steps(str(tmp_path), name="run"), Twice())
    assert Steps.shown == [1, 1, 1, 3, 3, 3]


def told(caplog):
    return [record.getMessage() for record in caplog.records if "takes no pictures" in record.getMessage()]


class Numbers(L.pytorch.loggers.logger.Logger):
    """A logger of somebody's own that takes numbers alone."""

    name, version = "mine", 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_logger_that_takes_no_pictures_is_named_once(tmp_path, caplog, monkeypatch):
    # Heard at its source: whoever trains quietly changes Lightning's loggers above it.
    monkeypatch.setattr(rank_zero_module.log, "propagate", False)
    monkeypatch.setattr(rank_zero_module.log, "handlers", [caplog.handler])
    with caplog.at_level(logging.INFO, rank_zero_module.log.name):
        run = fit(tmp_path, [csv_logger(tmp_path), Numbers()])
    assert told(caplog) == [
        f"prunex: {name} takes no pictures: those of the monitors are files in maps/"
        for name in ("CSVLogger", "Numbers")
    ]
    assert len(list((run / "maps").glob("*.png"))) == 4


# ----------------------------------------------------------------------------------------------------------- services


def wandb_rows(path, wandb_internal_pb2):
    """What an offline run's file says, row by row of its history; records are framed as in a LevelDB log."""
    content, at, whole = path.read_bytes(), 7, b""
    while at < len(content):
        left = 32768 - at % 32768
        if left < 7:  # too short for a heading: the block ends in zeros
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'prunex-vit[loggers]'")
    from lightning.pytorch.loggers import WandbLogger
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=str(tmp_path), project="tests", offline=True)
    run = fit(tmp_path, logger)
    wandb.finish()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    rows = list(wandb_rows(next(folder.glob("run-*.wandb")), wandb_internal_pb2))
    assert [row["_step"] for row in rows] == sorted(row["_step"] for row in rows)
    steps = [row["trainer/global_step"] for row in rows]
    assert steps == sorted(steps)
    arrived = {}
    for row, step in zip(rows, steps, strict=True):
        for name in NAMES:
            for file in row.get(f"prunex/{name}/filenames", ()):
                arrived.setdefault(name, []).append((step, pixels(folder / "files" / file)))
    check(run, arrived, [step for row, step in zip(rows, steps, strict=True) if "val_loss" in row])


@pytest.mark.slow
def test_mlflow_in_a_local_database(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'prunex-vit[loggers]'")
    from lightning.pytorch.loggers import MLFlowLogger

    store = f"sqlite:///{tmp_path}/mlflow.db"
    logger = MLFlowLogger("tests", tracking_uri=store, artifact_location=str(tmp_path / "artifacts"))
    run = fit(tmp_path, logger)
    client = logger.experiment
    arrived = {}
    for artifact in client.list_artifacts(logger.run_id, "images"):
        key, _, step, *_ = Path(artifact.path).name.split("+")
        if artifact.path.endswith(".png"):
            file = client.download_artifacts(logger.run_id, artifact.path, str(tmp_path))
            arrived.setdefault(key.removeprefix("prunex."), []).append((int(step), pixels(file)))
    for pictures in arrived.values():  # by name, which begins with the step and is not padded
        pictures.sort(key=lambda picture: picture[0])
    check(run, arrived, [point.step for point in client.get_metric_history(logger.run_id, "val_loss")])


class Lightnings:
    """The parts of lightning.ai that an experiment of litlogger talks to, in a folder."""

    def __init__(self, folder):
        self.folder, self.media, self.metrics, self.tags = folder, [], {}, []
        self.id, self.name, self.owner = "team", "team", SimpleNamespace(name="me")
        self._teamspace_api = self

    def list_models(self):
        return []

    def upload_file(self, file_path, remote_path, **_):
        shutil.copy(file_path, self.folder / remote_path)

    def stream(self):
        return SimpleNamespace(id="stream", name="run", cloudspace_id="", cluster_id="here", tags=self.tags)

    def lit_logger_service_get_metrics_stream(self, project_id, name):
        return self.stream() if self.tags else None

    def lit_logger_service_create_metrics_stream(self, project_id, body):
        return self.stream()

    def lit_logger_service_update_metrics_stream(self, project_id, id, body):  # noqa: A002
        self.tags = body.tags if body.tags is not None else self.tags

    def lit_logger_service_get_logger_metrics_summary(self, project_id, ids):
        return SimpleNamespace(summaries_per_name={})

    def lit_logger_service_append_logger_metrics(self, project_id, id, body):  # noqa: A002
        for metric in body.metrics:
            self.metrics.setdefault(metric.name, []).extend(int(value.step) for value in metric.values)

    def lit_logger_service_create_lit_logger_media(self, body, project_id, metrics_stream_id):
        path = f"{len(self.media)}.png"
        self.media.append((body.name, body.step, self.folder / path, body.mime_type))
        media = SimpleNamespace(id=path, cluster_id="here", storage_path=path)
        return SimpleNamespace(media=media, already_exists=False)

    def lit_logger_service_update_lit_logger_media(self, body, **_):
        assert body.upload_complete


@pytest.mark.slow
def test_litlogger_against_a_stand_in_of_its_service(tmp_path, monkeypatch):
    litlogger = pytest.importorskip("litlogger", reason="litlogger is not installed: pip install 'prunex-vit[loggers]'")
    loggers = pytest.importorskip("lightning.pytorch.loggers.litlogger", reason="LitLogger came with Lightning 2.6")
    (tmp_path / "cloud").mkdir()
    service = Lightnings(tmp_path / "cloud")
    for name in ("metrics_api", "media_api", "artifacts_api"):
        monkeypatch.setattr(f"litlogger.api.{name}.LitRestClient", lambda **_: service)
    inside = sys.modules["litlogger.experiment"]  # as an attribute that name is the running experiment, or None
    monkeypatch.setattr(inside, "AuthApi", lambda: SimpleNamespace(authenticate=lambda: None))
    monkeypatch.setattr(inside, "_resolve_teamspace", lambda name: service)
    monkeypatch.setattr(inside.signal, "signal", lambda *_: None)  # not in the process of all tests
    logger = loggers.LitLogger(str(tmp_path / "logs"), name="tests", save_logs=False)
    run = fit(tmp_path, logger)
    assert isinstance(logger.experiment, litlogger.Experiment)
    arrived = {}
    for name, step, path, kind in service.media:
        assert kind == "image/png"
        arrived.setdefault(name.removeprefix("prunex/"), []).append((step, pixels(path)))
    check(run, arrived, service.metrics["val_loss"])
