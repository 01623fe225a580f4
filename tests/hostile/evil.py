"""Named in hostile data as a class to build: no case may import it, see ``Room.check``."""

from lightning.pytorch import LightningModule


class Evil(LightningModule):
    """Never made."""
