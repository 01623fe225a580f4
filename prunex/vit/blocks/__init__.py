"""How each kind of timm block is laid out: one family of blocks a file. A layout opens blocks and holds no state."""
