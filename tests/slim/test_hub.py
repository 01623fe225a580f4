"""Models that are uploaded and downloaded: by a folder that stands in for the Hub, and by its library over HTTP."""

import fnmatch
import os
import shutil
import subprocess
import sys
import threading

import huggingface_hub
import pytest
import timm
import torch

import prunex
from prunex import PrunexError
from prunex.slim.files import CARD, CONFIG, WEIGHTS
from tests.slim.hub_server import Server
from tests.vits import images, tiny


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories as folders; what is asked for beyond uploading and downloading is written down."""
    made = {}

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, name, private=None, exist_ok=False):
            assert exist_ok
            made[name] = {"private": private, "token": self.token}
            return f"https://hub.example/{name}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)
            made[repo_id]["message"] = commit_message

    def download(name, *, revision=None, allow_patterns):
        source, cache = tmp_path / "hub" / name, tmp_path / "cache" / name
        if not source.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {name},\n  and no connection")
        made[name]["revision"] = revision
        cache.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path, made


def test_what_is_uploaded_is_downloaded_again(hub):
    folder, made = hub
    model = tiny().eval()
    prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2))
    address = prunex.push_to_hub(
        model, "me/small", images=images(5), labels=list("abcde"), private=True, token="secret"
    )
    assert address == "https://hub.example/me/small"
    there = folder / "hub" / "me" / "small"
    assert sorted(p.name for p in there.iterdir()) == sorted((WEIGHTS, CONFIG, CARD, "kept.png"))
    card = (there / CARD).read_text()
    assert 'prunex.load("hf-hub:me/small")' in card
    assert "![kept patches](kept.png)" in card
    assert not any("secret" in file.read_text(errors="ignore") for file in there.iterdir())
    loaded = prunex.load("hf-hub:me/small@v1.0")
    assert made["me/small"] == {
        "private": True, "token": "secret", "message": "prunex.push_to_hub", "revision": "v1.0"
    }  # fmt: skip
    # Neither the card nor the picture is needed.
    assert sorted(p.name for p in (folder / "cache" / "me" / "small").iterdir()) == [CONFIG, WEIGHTS]
    x = images(2)
    assert torch.equal(loaded(x), model(x))
    assert prunex.attached(loaded).spec == prunex.attached(model).spec


def test_timm_opens_what_is_uploaded(hub):
    folder, _ = hub
    model = tiny().eval()
    prunex.push_to_hub(model, "me/dense")
    there = folder / "hub" / "me" / "dense"
    theirs = timm.create_model(f"local-dir:{there}", pretrained=True).eval()
    x = images(2)
    assert torch.allclose(theirs(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", ["small", "me/", "me/a/b", "../x", "me/small@", "me/small@../../x", "me/sm all"])
def test_names_that_are_none(hub, name):
    with pytest.raises(PrunexError, match="give owner/name"):
        prunex.push_to_hub(tiny(), name)
    with pytest.raises(PrunexError, match="give owner/name"):
        prunex.load(f"hf-hub:{name}")
    assert not hub[1]


def test_what_cannot_be_uploaded_is_refused_before_anything_is_made(hub):
    with pytest.raises(PrunexError, match="leave @v1 out"):
        prunex.push_to_hub(tiny(), "me/small@v1")
    with pytest.raises(PrunexError, match="this one is dense: leave them out"):
        prunex.push_to_hub(tiny(), "me/small", images=images(1))
    pruned = tiny()
    prunex.attach(pruned, "evit")
    with pytest.raises(PrunexError, match=r"images=\[1\] is not allowed"):
        prunex.push_to_hub(pruned, "me/small", images=[1])
    with pytest.raises(PrunexError, match="call it as prunex.push_to_hub"):
        prunex.push_to_hub("me/small", tiny())
    assert not hub[1]


def test_what_the_hub_says_is_one_line(hub, monkeypatch):
    with pytest.raises(
        PrunexError, match="^cannot download hf-hub:me/gone: LocalEntryNotFoundError: no me/gone, and no"
    ):
        prunex.load("hf-hub:me/gone")

    def refused(self, name, **options):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    with pytest.raises(PrunexError, match="^cannot upload to me/small: LocalTokenNotFoundError: Token is required"):
        prunex.push_to_hub(tiny(), "me/small")


def test_without_a_network_it_is_said_in_one_line(tmp_path, monkeypatch):
    # The library itself: nothing listens there, and nothing is in the cache.
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PrunexError, match="^cannot download hf-hub:me/gone: ") as told:
        prunex.load("hf-hub:me/gone")
    assert "\n" not in str(told.value)


ROUND_TRIP = """
import prunex, torch
from tests.vits import images, tiny

model = tiny().eval()
prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2))
print(prunex.push_to_hub(model, "me/small", images=images(1), token="hf_none"))
again = prunex.load("hf-hub:me/small")
assert torch.equal(again(images(2)), model(images(2)))
try:
    prunex.load("hf-hub:me/gone")
except prunex.PrunexError as told:
    print(told)
"""


@pytest.mark.slow  # a Python of its own: the library reads the address when it is imported
def test_the_library_itself_uploads_and_downloads(tmp_path):
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", ROUND_TRIP], capture_output=True, text=True, env=environment)
    server.shutdown()
    server.server_close()
    assert ran.returncode == 0, ran.stderr
    where, refused = ran.stdout.splitlines()
    assert where == f"{server.address}/me/small"
    assert refused.startswith("cannot download hf-hub:me/gone: RepositoryNotFoundError: 404")
    assert set(server.files["me/small"]) == {WEIGHTS, CONFIG, CARD, "kept.png"}
    assert server.asked == {WEIGHTS, CONFIG}
