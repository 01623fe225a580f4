"""Draw the methods that need a training, from finished runs: python docs/make_method_pictures.py RUNS.

RUNS is the folder in which ``prunex fit`` left its runs of each config of CONFIGS in docs/site/methods.py.
What needs no training is drawn when the site is built.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import prunex  # noqa: E402
from docs.site.methods import CONFIGS  # noqa: E402
from docs.site.pictures import SCENES, kept_of, scenes, shipped  # noqa: E402

OUT = Path(__file__).parent / "pictures"


def main() -> None:
    runs = Path(sys.argv[1])
    OUT.mkdir(exist_ok=True)
    images = scenes()[0][:SCENES]
    for (kind, name), config in CONFIGS.items():
        run = sorted(runs.glob(f"digits-{config}/version_*"))[-1]
        explainer = {"explainer": str(run / "explainer")} if (run / "explainer").is_dir() else {}
        if kind in ("heads", "units"):
            pattern = "head-epoch=*.png" if kind == "heads" else "units-classes-epoch=*.png"
            save(kind, name, Image.open(sorted((run / "maps").glob(pattern))[-1]))
        model: Any = shipped() if explainer else prunex.load(run / "slim").eval()
        if kind == "tokens":
            if explainer:
                prunex.attach(model, name, **explainer)
            save(kind, name, kept_of(model, images))
        if kind in ("heads", "explainers"):
            e = prunex.explain(name, model, images, **explainer)
            save("explainers", name, e.show(images))


def save(kind: str, name: str, picture: Any) -> None:
    image = Image.fromarray(np.asarray(picture)[..., :3])
    image.quantize(128).save(OUT / f"{kind}-{name}.png", optimize=True)
    print(kind, name, image.size, (OUT / f"{kind}-{name}.png").stat().st_size)


if __name__ == "__main__":
    main()
