"""Every shipped config for a folder of images, as its first lines say, on a folder and a model that are small."""

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from prunex.recipes.commands import cli
from tests.vits import quick

SMALL = {"img_size": 28, "depth": 4, "embed_dim": 48, "num_heads": 3}
NAMES = sorted(c.removeprefix("imagefolder/") for c in cli.packaged_configs() if c.startswith("imagefolder/"))


@pytest.fixture
def root(tmp_path):
    """Two classes of differing colour, eight training and four validation images each."""
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in (("cold", (20, 40, 220)), ("warm", (220, 40, 20))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 32), colour).save(folder / f"{i}.png")
    rows = [f"train/{name}/{i}.png,{int(name == 'warm')},{i % 2}" for name in ("cold", "warm") for i in range(4)]
    (tmp_path / "photos" / "concepts.csv").write_text("\n".join(["image,red,even", *rows]) + "\n")
    return tmp_path / "photos"


@pytest.mark.parametrize("name", quick(NAMES, ["dense.yaml", "diffmask.yaml", "vit_shapley.yaml"]))
def test_it_runs(root, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=2, **SMALL)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    threads = torch.get_num_threads()
    code = cli.run(
        ["fit", "--config", f"configs/imagefolder/{name}", "--data.root", str(root)]
        + ["--model.weights", str(tmp_path / "weights.safetensors"), "--data.image_size", "28"]
        + [f"--model.init_args.model_args.{k}={v}" for k, v in SMALL.items()]
        + ["--data.batch_size=4", "--data.num_workers=0", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
        + ["--trainer.enable_progress_bar=false"]
        + (["--model.init_args.surrogate_epochs=1"] if name.startswith("vit_shapley") else [])
    )
    torch.set_num_threads(threads)
    assert code == 0
    [run] = tmp_path.glob("runs/imagefolder-*/version_0")
    made = {p.name for p in run.iterdir()}
    assert {"config.yaml", "metrics.csv"} <= made
    assert ("explainer" if name in ("diffmask.yaml", "vit_shapley.yaml") else "report.html") in made
