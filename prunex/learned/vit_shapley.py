"""The explainer of ViT Shapley: a network that estimates values of patches, beside the surrogate it has learnt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.learned.folder import CONFIG, WEIGHTS, Beside, load_into, quietly, read_folder
from prunex.removal.game import Removal
from prunex.vit.anatomy import ViT, read
from prunex.vit.rebuild import build_like

KIND = "vit_shapley"


class ShapleyExplainer(Beside):
    """The explainer network, with the surrogate whose game it has learnt (arXiv 2206.05282).

    A ViT that starts as a copy of the surrogate without its head gives prefix and patch tokens after the final norm;
    one more transformer block, whose first LayerNorm is left out since its input is normalised already (kept where the
    backbone has no final norm); LayerNorm; an MLP D -> 4 D -> 4 D -> C with GELU; prefix rows dropped; tanh. An equal
    amount is then added to every patch, so that each class' values sum to what the surrogate makes of all patches minus
    what it makes of none.

    The surrogate is part of the module, frozen: its values end the normalisation, and it is what is explained.

    Args:
        surrogate: A supported ViT with a classifier, trained to bear missing patches.
        mlp_ratio: Width of the head's hidden layers over D.

    Raises:
        PrunexError: For a surrogate without a classifier, or a pruned one.
    """

    kind, explained = KIND, "surrogate"
    surrogate: ViT

    def __init__(self, surrogate: ViT, mlp_ratio: int = 4) -> None:
        super().__init__()
        check_whole("mlp_ratio", mlp_ratio, 1)
        anatomy = self.keep(surrogate)
        # The surrogate may come frozen, and the backbone learns.
        self.backbone = copy.deepcopy(surrogate).requires_grad_(True)
        self.backbone.reset_classifier(0)
        width, heads = anatomy.width, anatomy.dividing_heads
        bias = any(name.endswith("qkv.bias") for name, _ in surrogate.named_parameters())
        self.block = Block(width, heads, mlp_ratio=4.0, qkv_bias=bias)
        # What enters the block was normalised by the backbone's own last norm already.
        if not isinstance(surrogate.norm, nn.Identity):
            self.block.norm1 = nn.Identity()
        self.norm = nn.LayerNorm(width)
        hidden = mlp_ratio * width
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, anatomy.classes),
        )
        self.mlp_ratio = mlp_ratio
        self.prefix = anatomy.final_prefix
        weight = next(surrogate.parameters())
        self.to(device=weight.device, dtype=weight.dtype)

    def ends(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the surrogate makes of all patches and of none: float64 [B, C] each."""
        game = Removal(self.surrogate, images)
        both = torch.tensor([[True], [False]]).expand(-1, game.players)
        values = game(both.expand(len(images), -1, -1))
        return values[:, 0], values[:, 1]

    def forward(self, images: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Estimated Shapley values of patches: [B, P, C], each class summing to v(all) - v(none), the ``ends``."""
        tokens = self.backbone.forward_features(images)
        raw = self.mlp(self.norm(self.block(tokens)))[:, self.prefix :].tanh()
        full, empty = self.ends(images) if ends is None else ends
        return normalise(raw, (full - empty).to(raw.dtype))

    def described(self) -> dict[str, Any]:
        """The head's width."""
        return {"mlp_ratio": self.mlp_ratio}


def normalise(raw: Tensor, total: Tensor) -> Tensor:
    """Values [B, P, C] that sum to ``total`` [B, C]: an equal amount is added to each (additive normalisation)."""
    return raw + ((total - raw.sum(1)) / raw.shape[1])[:, None]


def load_explainer(path: str | Path) -> ShapleyExplainer:
    """A saved explainer again, in eval mode, from its folder or the ``model.safetensors`` in it; or refused."""
    spec, tensors, folder = read_folder(path, KIND, "surrogate")
    ratio = check_whole("mlp_ratio", spec.get("mlp_ratio", 4), 1)
    with quietly():
        surrogate = build_like(spec["surrogate"], tensors, "surrogate.")
        # The ratio is whatever the file says: nothing of that size is made before the weights agree.
        hidden = ratio * read(surrogate).width
        if "mlp.2.weight" not in tensors or tensors["mlp.2.weight"].shape != (hidden, hidden):
            raise PrunexError(f"{folder / WEIGHTS} does not fit {CONFIG} (mlp_ratio={ratio}): save the explainer again")
        explainer = ShapleyExplainer(surrogate, ratio)
    return load_into(explainer, tensors, folder)
