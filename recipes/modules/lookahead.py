"""Lookahead around Adam: slow weights that follow the fast ones, and pull them back."""

from collections.abc import Callable
from typing import Any

import torch

from prunex.checks import check_number, check_whole
from prunex.errors import PrunexError


class LookaheadAdam(torch.optim.Adam):
    """Adam whose parameters go back, every few steps, to a point between where they were and where they are.

    After every ``slow_steps`` steps of a parameter: slow <- slow + slow_rate (fast - slow), fast <- slow (Zhang et al.,
    NeurIPS 2019, arXiv 1907.08610). Every parameter counts its own steps, and one without a gradient is left alone, so
    that a parameter that is trained now and then is not moved in between (timm's Lookahead counts by group). With
    ``slow_steps`` 0 it is plain Adam, whose other options it takes; ``slow_rate`` lies in (0, 1].

    >>> p = torch.nn.Parameter(torch.zeros(()))
    >>> optimizer = LookaheadAdam([p], lr=1.0, slow_steps=2)
    >>> places = []
    >>> for _ in range(4):
    ...     p.grad = torch.tensor(-1.0)
    ...     optimizer.step()
    ...     places.append(round(p.item(), 3))
    >>> places
    [1.0, 1.0, 2.0, 2.0]
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, slow_steps: int = 6, slow_rate: float = 0.5, **options: Any
    ) -> None:
        self.slow_steps = check_whole("slow_steps", slow_steps, 0)
        self.slow_rate = check_number("slow_rate", slow_rate, 0, 1)
        if self.slow_rate == 0:
            raise PrunexError("slow_rate=0 is not allowed: nothing would ever move; give a number in (0, 1]")
        super().__init__(params, lr=lr, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Adam; then the pull, for parameters whose turn it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving: list[torch.Tensor] = []
        for group in self.param_groups:
            moving += [p for p in group["params"] if p.grad is not None]
        # Adam takes a parameter with any state for one that it has seen: ours is added after its first step.
        first = {p: p.detach().clone() for p in moving if self.slow_steps and "slow" not in self.state[p]}
        super().step()
        if not self.slow_steps:
            return loss
        # Only what has moved is pulled.
        with torch.no_grad():
            for p in moving:
                state = self.state[p]
                if p in first:
                    state["slow"], state["slow_count"] = first[p], 0
                state["slow_count"] += 1
                if state["slow_count"] % self.slow_steps == 0:
                    state["slow"].lerp_(p, self.slow_rate)
                    p.copy_(state["slow"])
        return loss
