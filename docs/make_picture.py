"""Make the README's picture from a finished run: python docs/make_picture.py runs/digits-dynamicvit/version_0."""

import sys
from pathlib import Path

import numpy as np

from prunex.pictures import dim_dropped, outline, overlay, resized, save_png
from prunex.pictures.sheet import INK, RIGHT, WRONG, Column, compose

IMAGES, SIDE = (1, 4, 6, 5), 192


def main() -> None:
    run = Path(sys.argv[1])
    newest = sorted((run / "maps").glob("epoch=*.npz"))[-1]
    with np.load(newest, allow_pickle=False) as data:
        found = {k: data[k][list(IMAGES)] for k in ("images", "labels", "predicted", "relevance/tokentm")}
        kept = data["kept"][:, list(IMAGES)]
    cells = resized(found["images"], SIDE)
    columns = [Column("unseen scene", cells)]
    for number, stage in enumerate(kept, start=1):
        columns.append(Column(f"stage {number}: {stage.mean():.0%} kept", dim_dropped(cells, stage)))
    heat = outline(overlay(cells, found["relevance/tokentm"]), kept[-1], thick=1)
    columns.append(Column("what it rests on", heat))
    rows = [
        [(f"digit {t}", INK), (f"{'✓' if p == t else '✗'} predicted {p}", RIGHT if p == t else WRONG)]
        for t, p in zip(found["labels"], found["predicted"], strict=True)
    ]
    picture = compose(columns, rows)
    save_png(Path(__file__).parent / "kept_tokens.png", picture)


if __name__ == "__main__":
    main()
