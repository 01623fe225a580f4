"""Models of text and image, explained and measured; their libraries are the extra ``prunex-vit[multimodal]``."""
