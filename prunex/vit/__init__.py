"""All that is known about ViT backbones, and nothing about any method."""
