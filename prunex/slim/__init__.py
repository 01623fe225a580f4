"""Physical removal, save and load, export."""

from prunex.slim.export import export
from prunex.slim.files import check_savable, load, read_config, save
from prunex.slim.int8 import quantise
from prunex.slim.push import push_to_hub
from prunex.slim.slim import slim

__all__ = ["check_savable", "export", "load", "push_to_hub", "quantise", "read_config", "save", "slim"]
