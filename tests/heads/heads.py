"""Every head by name, with options that fit a tiny model."""

import prunex

OPTIONS = {
    "concept_transformer": {"spatial": ["ink", "paper", "edge"]},
    "vit_net": {"depth": 2},
    "attributes": {"attributes": 4},
    "mean_patch": {},
}
HEADS = [m.name for m in prunex.methods("head")]


def attach(model, name, **options):
    """A head of that name, with some options of its own."""
    return prunex.attach(model, name, **(OPTIONS[name] | options))
