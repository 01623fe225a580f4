"""Vision DiffMask: gates beside a frozen ViT that say which patches its output needs, in one forward."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from prunex.learned.diffmask import KIND, DiffMaskExplainer, check_layer, load_explainer, log_keep
from prunex.learned.folder import check_fits, held
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.vit.anatomy import ViT, read
from prunex.vit.aside import as_found
from prunex.vit.recording import recording
from prunex.vit.tape import Tape


@register(
    "explainer",
    "diffmask",
    "Nalmpantis et al., CVPRW 2023, arXiv 2304.06391",
    "a trained explainer; one forward of its model",
)
def diffmask(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    explainer: nn.Module | str | Path | None = None,
    layer: int = -1,
    aggregated: bool = True,
) -> Explanation:
    """How likely each patch is needed, by gates trained to keep as few patches as the output allows (arXiv 2304.06391).

    Explained is the explainer's **own copy** of the dense model it was trained beside, not ``model`` itself, which may
    be pruned or fine-tuned since: ``model`` gives the logits, the target and the trace. The maps know no class.
    Training kept the whole distribution of classes while patches were replaced by a learned placeholder; of patches
    that say the same all but one may be dropped. It tells what may go better than what matters most.

    Departures from the authors' code: the multipliers ascend (theirs descend under their Lightning, by our reading, not
    run), and only patches are gated and counted (theirs count the class token, too).

    Args:
        explainer: A :class:`DiffMaskExplainer`, a module that holds one, or the folder it was saved in (``explainer/``
            of the recipe's run).
        layer: The hidden state whose map is shown: 0 (patch embeddings) to L + 1, or negative from the end.
        aggregated: Whether a patch needs every vote up to the layer, exp(c_k) = prod_{i <= k} P(v_i != 0); False: the
            vote of the layer alone, P(v_k != 0).

    Returns:
        ``maps`` in 0..1, of one layer; ``raw`` [B, L + 2, P], of all of them.

    Raises:
        PrunexError: Without an explainer, for a folder that holds none, or one for another grid or other classes.

    >>> import prunex, timm, torch
    >>> from prunex.learned.diffmask import DiffMaskExplainer
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> # untrained here; the recipe trains one
    >>> prunex.explain("diffmask", model, torch.randn(2, 3, 64, 64), explainer=DiffMaskExplainer(model)).maps.shape
    torch.Size([2, 4, 4])
    """
    gates = held(explainer, DiffMaskExplainer, KIND, "rollout") or load_explainer(str(explainer))
    check_fits(gates.anatomy, read(model), KIND)
    layer = check_layer(layer, gates.anatomy.depth)
    # The gates may lie elsewhere, and in another precision, than the model.
    weight = next(gates.parameters())
    with recording(model, images, target, Tape()) as recorded, as_found(gates, train=False):
        votes = log_keep(gates.observe(images.to(weight.device, weight.dtype)).gates)
        raw = (votes.cumsum(1) if aggregated else votes).exp().to(images.device)
        return answer(recorded, raw[:, layer], raw)
