"""The example service: over HTTP from a server of its own, and by Starlette's client for the rest."""

import importlib.util
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.recipes.data.images import preparation
from tests.vits import tiny

for needed in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'prunex-vit[service]' httpx")
import httpx  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

SERVICE = Path(__file__).parents[2] / "service"


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


PHOTO = png(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
LONG = png(np.zeros((1, 10001, 3), dtype=np.uint8))  # few bytes and many pixels


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    model = tiny(depth=2, embed_dim=24)
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,))
    folder = tmp_path_factory.mktemp("service") / "slim"
    prunex.save(prunex.slim(model), folder, labels=["a", "b", "c", "d", "e"])
    return folder


def application():
    spec = importlib.util.spec_from_file_location("prunex_service_app", SERVICE / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where FastAPI looks up the names of its annotations
    spec.loader.exec_module(module)
    return module.create()


@pytest.fixture
def client(slim, monkeypatch):
    monkeypatch.setenv("PRUNEX_MODEL", str(slim))
    monkeypatch.setenv("PRUNEX_MAX_BYTES", "20000")
    monkeypatch.setenv("PRUNEX_MAX_PIXELS", "10000")
    return TestClient(application(), raise_server_exceptions=False)


def wanted(slim):
    """What the model itself says of the photo: logits [C], kept [gh, gw], and the photo as it sees it."""
    model = prunex.load(slim)
    picture, pixels = preparation(model)(Image.open(io.BytesIO(PHOTO)))
    with torch.no_grad():
        logits = model(pixels[None])[0]
    return logits, prunex.attached(model).trace.kept()[0], picture, model, pixels


def test_over_http(slim):
    """uvicorn in a process of its own, on a port of the loopback that the system chooses."""
    code = (
        "import asyncio, socket, uvicorn, app\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "config = uvicorn.Config(app.create(), log_level='warning')\n"
        "asyncio.run(uvicorn.Server(config).serve(sockets=[s]))\n"
    )
    root = str(SERVICE.parent)
    environment = os.environ | {"PRUNEX_MODEL": str(slim), "PYTHONPATH": os.pathsep.join([root, str(SERVICE)])}
    server = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        base = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with httpx.Client(base_url=base, timeout=60, trust_env=False) as http:
            deadline = time.monotonic() + 120
            while True:
                try:
                    health = http.get("/health")
                    break
                except httpx.TransportError:
                    assert server.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            assert health.json() == {
                "status": "ok",
                "model": str(slim),
                "prunex": prunex.__version__,
                "explains": True,
            }
            logits, kept = wanted(slim)[:2]
            said = http.post("/predict", content=PHOTO).json()
            assert torch.allclose(torch.tensor(said["logits"]), logits, atol=1e-5)
            assert http.post("/kept", content=PHOTO).json()["kept"] == kept.tolist()
            assert http.post("/relevancy?format=png", content=PHOTO).headers["content-type"] == "image/png"
            broken = http.post("/predict", content=b"no image")
            assert broken.status_code == 400
            assert set(broken.json()) == {"error"}
    finally:
        server.terminate()
        server.wait(30)


def test_classes_come_with_their_names_and_probabilities(client, slim):
    logits = wanted(slim)[0]
    said = client.post("/predict?top=2", content=PHOTO).json()
    order = logits.argsort(descending=True)[:2].tolist()
    assert [row["class"] for row in said["classes"]] == order
    assert [row["label"] for row in said["classes"]] == ["abcde"[number] for number in order]
    assert said["classes"][0]["probability"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)


def test_pictures_are_the_models_own(client, slim):
    from prunex.pictures import dim_dropped, overlay

    _, kept, picture, model, pixels = wanted(slim)
    shown = client.post("/kept?format=png", content=PHOTO).content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown))), dim_dropped(picture, kept.numpy()))
    heat = prunex.explain("rollout", model, pixels[None], 3).maps[0]
    said = client.post("/relevancy?method=rollout&target=3", content=PHOTO).json()
    assert torch.allclose(torch.tensor(said["relevancy"]), heat, atol=1e-5)
    shown = client.post("/relevancy?method=rollout&target=3&format=png", content=PHOTO).content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown))), overlay(picture, heat.numpy()))


@pytest.mark.parametrize(
    ("path", "content", "status", "match"),
    [
        ("/predict", b"", 400, "no body"),
        ("/predict", b"GIF89a", 400, "no image that can be read"),
        ("/predict", PHOTO[:200], 400, "no image that can be read"),
        ("/predict", b"x" * 20001, 413, "over 20,000 bytes"),
        ("/predict", LONG, 413, "10001 x 1 pixels"),
        ("/predict?top=0", PHOTO, 422, "top"),
        ("/kept?format=gif", PHOTO, 422, "format"),
        ("/relevancy?method=nonsense", PHOTO, 400, "nonsense"),
        ("/relevancy?target=99", PHOTO, 400, "99"),
        ("/relevancy?target=x", PHOTO, 422, "target"),
        ("/nowhere", PHOTO, 404, "Not Found"),
    ],
)
def test_mistakes_are_json_and_say_what_came(client, path, content, status, match):
    answer = client.post(path, content=content)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert match in answer.json()["error"]


def test_a_fault_of_the_service_tells_nothing_of_its_inside(client, monkeypatch):
    monkeypatch.setattr("prunex.explain", lambda *_: 1 / 0)
    answer = client.post("/relevancy", content=PHOTO)
    assert answer.status_code == 500
    assert answer.json() == {"error": "the service failed; its log says how"}


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("PRUNEX_MODEL", "", "PRUNEX_MODEL is not set"),
        ("PRUNEX_MODEL", "nowhere", "nowhere"),
        ("PRUNEX_MAX_BYTES", "0", "PRUNEX_MAX_BYTES='0' is not allowed"),
        ("PRUNEX_MAX_PIXELS", "many", "PRUNEX_MAX_PIXELS='many' is not allowed"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(slim, monkeypatch, name, value, match):
    monkeypatch.setenv("PRUNEX_MODEL", str(slim))
    monkeypatch.setenv(name, value)
    with pytest.raises(PrunexError, match=match):
        application()


@pytest.mark.slow
def test_an_onnx_graph_is_served_without_relevancy(slim, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = prunex.export(prunex.load(slim), tmp_path / "model.onnx", kept=True)
    monkeypatch.setenv("PRUNEX_MODEL", str(path))
    client = TestClient(application())
    logits, kept = wanted(slim)[:2]
    assert torch.allclose(torch.tensor(client.post("/predict", content=PHOTO).json()["logits"]), logits, atol=1e-5)
    assert client.post("/predict", content=PHOTO).json()["classes"][0]["label"] in "abcde"
    assert client.post("/kept", content=PHOTO).json()["kept"] == kept.tolist()
    refused = client.post("/relevancy", content=PHOTO)
    assert refused.status_code == 404
    assert "serve a slim folder" in refused.json()["error"]
    assert client.get("/health").json()["explains"] is False
