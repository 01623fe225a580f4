"""Images of different lengths in one tensor: where their tokens are, and how to work on the tokens alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.vit.arithmetic import fused_attention
from prunex.vit.policy import present


@dataclass(eq=False, repr=False)
class Packing(Brief):
    """Which of B x N slots hold a token.

    Norms, linear layers and MLPs see the tokens of all images as one sequence [1, S, D] of S tokens and no empty slots;
    attention looks at each image by itself.
    """

    policy: Tensor  # [B, N], above 0 where a token is
    at: Tensor  # int64 [S], the slots that hold one, counted through all images
    lengths: list[int]  # tokens of each image; they sum to S

    @classmethod
    def of(cls, policy: Tensor) -> Packing:
        """The packing of a policy [B, N]; this waits for the device."""
        # Counting waits for the device; it is done once a stage, not once a block.
        filled = policy > 0
        return cls(policy, filled.flatten().nonzero().squeeze(1), filled.sum(1).tolist())

    def pack(self, x: Tensor) -> Tensor:
        """From slots [B, N, D] to tokens [1, S, D]."""
        return x.flatten(0, 1)[self.at].unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """From tokens [1, S, D] to slots [B, N, D], zeros in the empty ones."""
        empty = x.new_zeros(self.policy.numel(), x.shape[2])
        return empty.index_copy(0, self.at, x[0]).unflatten(0, self.policy.shape)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The images of [1, H, S, d], one [1, H, n, d] each."""
        return x.split(self.lengths, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, one_by_one: bool | None = None) -> Tensor:
        """Fused attention within each image, [1, H, S, d] three times and out, without any N x N matrix.

        ``one_by_one``: a call for each image, fastest on a CPU (``benchmarks/lengths.py``). False: one call over all
        slots, empty keys hidden, which spares a GPU many small kernels. None: by the device.
        """
        one_by_one = q.device.type == "cpu" if one_by_one is None else one_by_one
        if one_by_one:
            images = zip(self.split(q), self.split(k), self.split(v), strict=True)
            return torch.cat([fused_attention(a, b, c) for a, b, c in images], 2)
        b, n = self.policy.shape
        # [1, H, S, d] -> [B, H, N, d] and back; values sit in slots as 0, so that no mask has to reach them.
        wide = [
            self.unpack(t.transpose(1, 2).flatten(2)).unflatten(2, (q.shape[1], -1)).transpose(1, 2) for t in (q, k, v)
        ]
        # Empty slots are asked for too, and thrown away: one large kernel beats many small ones on a GPU.
        out = fused_attention(wide[0], wide[1], wide[2], present(self.policy))
        return self.pack(out.transpose(1, 2).flatten(2)).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
