"""Physical removal, save and load, export."""

from prunex.slim.export import export
from prunex.slim.files import load, read_config, save
from prunex.slim.slim import slim

__all__ = ["export", "load", "read_config", "save", "slim"]
