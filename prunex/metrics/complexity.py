"""How few patches a map needs to say what it says. Neither measure asks the model: a simple map may be a wrong one.

Both take ``maps`` float [B, gh, gw] or [B, H, W] and read their absolute values; the answer is float64 [B], NaN for
maps that hold NaN or nothing but zeros. Maps in pixels have other numbers than maps of patches: compare on one grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.errors import PrunexError
from prunex.metrics.base import mean_of
from prunex.metrics.checks import check_grid
from prunex.registry import register

_MAPS = "a map alone"


@register("metric", "sparseness", "Chalasani et al., ICML 2020, arXiv 1810.06583", _MAPS)
def sparseness(maps: Tensor) -> Tensor:
    """Gini index of a map's absolute values (arXiv 1810.06583): [B] in 0..1 - 1 / n, high is sparser.

    With the n values rising, sum of (2 i - n - 1) |phi|_(i), i = 1..n, over n times their sum: 0 where all are equal,
    1 - 1 / n where one patch has everything. Uniform noise has 1/3.

    >>> sparseness(torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [3.0, 0.0]]])).tolist()
    [0.0, 0.75]
    """
    share = _shares(maps)
    n = share.shape[1]
    weight = 2 * torch.arange(1, n + 1, device=share.device, dtype=share.dtype) - n - 1
    return (share.sort(1).values * weight).sum(1) / n


@register("metric", "complexity", "Bhatt, Weller & Moura, IJCAI 2020, arXiv 2005.00631", _MAPS)
def complexity(maps: Tensor) -> Tensor:
    """Entropy of how a map's absolute values are shared out (arXiv 2005.00631): [B] in 0..ln n nats, low is simpler.

    The sum of -p ln p, p = |phi| / sum |phi|, over n values: ln n where all are equal, 0 where one patch has
    everything. Uniform noise has about ln n - 0.19.

    >>> complexity(torch.tensor([[[0.0, 0.0], [3.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])).tolist()
    [0.0, 1.3862943611198906]
    """
    share = _shares(maps)
    # A patch without any relevance adds nothing, and -0 is no answer.
    return -torch.special.xlogy(share, share).sum(1) + 0.0


def _shares(maps: Tensor) -> Tensor:
    """Each value's share of all, float64 [B, n]; NaN for a map without any."""
    size = check_grid("maps", maps).double().flatten(1).abs()
    if not size.shape[1]:
        raise PrunexError(f"maps have shape {list(maps.shape)}: give at least one patch")
    # The largest first: sums of huge or of tiny values must not leave the range of their type.
    size = size / size.amax(1, keepdim=True).where(size.amax(1, keepdim=True) > 0, torch.nan)
    return size / size.sum(1, keepdim=True)


Sparseness = mean_of("Sparseness", sparseness)
Complexity = mean_of("Complexity", complexity, higher_is_better=False)
