"""Heads that explain themselves, one method a file; importing the room makes them known."""

from prunex.heads import attributes as attributes
from prunex.heads import concept_transformer as concept_transformer
from prunex.heads import mean_patch as mean_patch
from prunex.heads import vit_net as vit_net
