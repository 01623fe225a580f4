"""Draw what all methods say about a few validation images: python docs/make_gallery.py RUN ROOT."""

from pathlib import Path

import numpy as np
from PIL import Image
from scenes import Scenes, parser

from prunex.pictures import contact_sheet, from_tensor

WIDE = 192  # pixels that a method's name of 23 letters needs


def main() -> None:
    options = parser(__doc__, images=4)
    options.add_argument("--across", type=int, default=5, help="columns side by side; default 5")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "explainers.png")
    args = options.parse_args()
    scenes = Scenes(args)
    images, labels, masks = next(scenes.batches(args.images))
    found = scenes.explainers(scenes.vit, images)
    first = next(iter(found.values()))
    rows, columns = first.trace.grid
    each = -(-WIDE // columns)  # whole pixels a patch, so that all patches are squares of one size
    size = (columns * each, rows * each)
    pictures = from_tensor(images, scenes.mean, scenes.std)
    picture = contact_sheet(
        np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in pictures]),
        {name: e.maps.numpy() for name, e in found.items()},
        [name for name, e in found.items() if e.signed],
        first.trace.kept().cpu().numpy() if first.trace.stages else None,
        masks.numpy(),
        labels.numpy(),
        first.logits.argmax(1).cpu().numpy(),
        scenes.names,
        side=WIDE,
        across=args.across,
    )
    for name, reason in scenes.explainers.skipped.items():
        print(f"skipped {name}: {reason}")
    Image.fromarray(picture).quantize(256).save(args.out, optimize=True)  # a third of the size, nothing to be seen
    print(args.out)


if __name__ == "__main__":
    main()
