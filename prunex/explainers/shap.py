"""Shapley values of patches: each one's mean contribution over all orders in which patches may appear."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer_of_classes
from prunex.removal.coalitions import PER_PLAYER, Estimate, kernel_shap, permutation_sampling, seeded
from prunex.removal.game import Removal
from prunex.vit.anatomy import ViT
from prunex.vit.recording import recording
from prunex.vit.tape import Tape

PAIRS = 20  # antithetic pairs of orders, where no budget is given


@register(
    "explainer",
    "shap",
    "Lundberg & Lee, NeurIPS 2017, arXiv 1705.07874; Castro et al. 2009",
    "forwards only, thousands an image",
)
def shap(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    estimator: Literal["permutation", "kernel"] = "permutation",
    removal: Literal["drop", "mask"] = "drop",
    budget: int | None = None,
    selection: str = "frozen",
    output: Literal["probability", "logit", "log_odds"] = "probability",
    seed: int = 0,
    chunk: int | None = None,
) -> Explanation:
    """Shapley values phi of the patches in the game v(S) = the class's probability with only the patches S there.

    They sum to v(all) - v(none) at every budget, for every class. Absent patches are taken out before the first block
    (see ``prunex.removal.game``), never painted over: games of grey patches give other numbers and should not stand in
    one table with these.

    - "permutation": phi_i = mean over orders of v(earlier ones and i) - v(earlier ones), in antithetic pairs (an order
      and its reverse). Unbiased; exact after one pair where patches interact at most in pairs.
    - "kernel": weighted least squares (arXiv 1705.07874, Thm. 2) on coalitions drawn by size with their complements
      (Covert & Lee, arXiv 2012.01536), constraint exact, no l1 selection of patches. Often less noisy.

    Error falls as 1 / sqrt(budget); ``prunex.removal.coalitions`` gives standard errors. Models that never saw missing
    patches are off their training distribution where few are there. Some hundred evaluations an image are a sketch; the
    paper behind ``vit_shapley`` reports about 10^5 to converge on ViT-B (unverified).

    Args:
        estimator: "permutation" or "kernel".
        removal: "drop" (cost falls with the number of patches there) or "mask" (all slots kept). Equal results.
        budget: Most forwards of one token sequence each an image, v(all) and v(none) included. Permutation: 2 + 2 (P -
            1) for every pair of orders. Kernel: at least 2 + 2 P, to be useful 20 times as many. None: 20 pairs, 2 + 40
            (P - 1); 7,802 for 196 patches.
        selection: Of a pruned model: "frozen" (the clean run's decisions are kept) or "free" (the pruner decides anew
            among the patches there; needs ``removal="drop"``), also known as "adaptive".
        output: "probability", "logit", or "log_odds".
        seed: Of the draws, at least 0. Every image gets the same ones.
        chunk: Most token sequences in one forward: bounds memory, changes no result. None: what is fastest.

    Returns:
        ``maps`` signed; ``raw`` [B, P, C], all classes.

    Raises:
        PrunexError: For options that exclude each other, a budget too small, or a model without a classifier.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("shap", model, torch.randn(2, 3, 64, 64), budget=40).maps.shape
    torch.Size([2, 4, 4])
    """
    check_whole("seed", seed, 0)
    if budget is not None:
        check_whole("budget", budget, 1)
    with recording(model, images, target, Tape(), needs_class=True) as recorded:
        value = Removal(model, images, removal=removal, selection=selection, output=output, chunk=chunk)
        return answer_of_classes(recorded, estimate(value, len(images), estimator, budget, seed).values)


def estimate(value: Removal, batch: int, estimator: str, budget: int | None, seed: int) -> Estimate:
    """Shapley values of all classes with their standard errors, as :func:`shap` makes them for a batch of images."""
    players = value.players
    # An order of P patches passes P - 1 coalitions between nothing and everything.
    pair = 2 * (players - 1)
    budget = 2 + PAIRS * pair if budget is None else budget
    if estimator == "permutation":
        if budget < 2 + pair:
            raise PrunexError(
                f"budget={budget} is too small: one antithetic pair of orders of {players} patches takes {2 + pair} "
                "evaluations"
            )
        # v(all) and v(none) are known; an order and its reverse take the others.
        orders = 2 * ((budget - 2) // pair) if pair else 2
        return permutation_sampling(value, players, batch, orders, seeded(seed))
    least = 2 + PER_PLAYER * players
    if players > 1 and budget < least:
        raise PrunexError(
            f"budget={budget} is too small for estimator='kernel': {players} values are solved for, which needs at "
            f"least {least} evaluations and is useful from about {20 * players}; give more, or estimator='permutation'"
        )
    return kernel_shap(value, players, batch, (budget - 2) // 2 * 2, seeded(seed))
