"""ViT Shapley: a trained network that estimates every patch's Shapley value, for every class, in one forward."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from prunex.learned.folder import check_fits, held
from prunex.learned.vit_shapley import KIND, ShapleyExplainer, load_explainer
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer_of_classes
from prunex.vit.anatomy import ViT, read
from prunex.vit.aside import as_found
from prunex.vit.recording import recording
from prunex.vit.tape import Tape


@register(
    "explainer",
    "vit_shapley",
    "Covert, Kim & Lee, ICLR 2023, arXiv 2206.05282",
    "a trained explainer; one forward of it, one of its surrogate",
)
def vit_shapley(
    model: ViT, images: Tensor, target: int | Tensor | None = None, *, explainer: nn.Module | str | Path | None = None
) -> Explanation:
    """Shapley values of patches as a trained explainer estimates them (arXiv 2206.05282).

    Explained is the explainer's **surrogate**, a copy of a classifier trained to bear missing patches, not ``model``
    itself: the recipe logs how far the two agree. ``model`` gives the logits, the target class and the trace. Values of
    every class sum to v(all) - v(none), the surrogate's probabilities with all patches and with none. How good they are
    only a run of ``shap`` on the surrogate tells.

    Args:
        explainer: A :class:`ShapleyExplainer`, a module that holds one, or the folder it was saved in (``explainer/``
            of the recipe's run).

    Returns:
        ``maps`` signed; ``raw`` [B, P, C], all classes.

    Raises:
        PrunexError: Without an explainer, for a folder that holds none, or one for another grid or other classes.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> untrained = ShapleyExplainer(model)
    >>> values = prunex.explain("vit_shapley", model, torch.randn(2, 3, 64, 64), explainer=untrained).raw
    >>> values.shape  # a patch and class
    torch.Size([2, 16, 5])
    """
    shapley = held(explainer, ShapleyExplainer, KIND, "shap") or load_explainer(str(explainer))
    check_fits(read(shapley.surrogate), read(model), KIND)
    # The explainer may lie elsewhere, and in another precision, than the model.
    weight = next(shapley.parameters())
    with recording(model, images, target, Tape(), needs_class=True) as recorded, as_found(shapley, train=False):
        values = shapley(images.to(weight.device, weight.dtype)).to(images.device)
        return answer_of_classes(recorded, values)
