"""What follows a ViT in a module, as a function of the ViT's output alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError, Unfollowed
from prunex.targets import Aimed, fields
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import PLAIN, Arithmetic
from prunex.vit.aside import as_found, shallow
from prunex.vit.intermediates import GridCall

Forward = Callable[..., Tensor]
ROWS = 64  # unit vectors that go through a tail at once


class Tail:
    """What a module makes of its ViT's output in eval mode: rows [R, D] to rows [R, classes], each by itself.

    ``blank`` [1, ...] is an image without content, which the module is called on when its ViT's answer is known;
    ``field`` is the part of its output that is taken; ``given`` and ``output`` are the ViT's and the module's answer to
    a real call. Refused where images and batch have a part in the module's output beside the ViT's. With ``grid_call``
    it is the ViT's grids that the module reads, and rows are these.
    """

    def __init__(
        self,
        module: nn.Module,
        vit: ViT,
        blank: Tensor,
        field: str,
        given: Tensor,
        output: Tensor,
        grid_call: GridCall | None = None,
    ) -> None:
        self.module, self.vit, self.blank, self.field, self.given = module, vit, blank, field, given
        self.grid_call = grid_call
        self.classes = output.shape[1]
        # A number of its own kind, and no class's score.
        self.scalar = isinstance(module, Aimed) and module.target is not None
        try:
            # The same rows again, on blank images and among others.
            again = self._run(torch.cat([given, -given]))
        except PrunexError:
            raise
        except Exception as error:  # whatever a stranger's forward raises
            raise cannot(module, f"raised {type(error).__name__} on other images ({error})") from error
        if not alike(again[: len(given)], output, precise(given)):
            raise cannot(
                module,
                f"answers by more than its {kind(vit)}'s output for each image (by the image itself, by other images "
                "of the batch, or by chance)",
            )
        self._answers = torch.cat([output, again[len(given) :]])
        sums = self._answers.double().sum(1)
        # Rows that sum to 1, for outputs turned round as well, come out of a softmax.
        self.probabilities = self.classes > 1 and bool((self._answers >= 0).all() and ((sums - 1).abs() < 1e-2).all())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tail:
        # A copy of the ViT, such as a wider one, is followed by the same module.
        return self

    def __call__(self, out: Tensor, ops: Arithmetic = PLAIN) -> Tensor:
        """The module's output for a ViT's output; by an arithmetic's own rule where that opens every layer."""
        # Relevance rules need the layer itself, gradients only its values.
        if ops.opened:
            return ops.linear(self.linear().to(out), out)
        answer = self._run(out.to(self.given.dtype))
        return answer if out.dtype == self.given.dtype else answer.to(out.dtype)

    def linear(self) -> nn.Linear:
        """The tail as one linear layer; refused where it is more than that."""
        given, width = self.given, self.given.shape[1]
        with torch.no_grad():
            # f(0) is the bias, f(unit vector) - f(0) a column of the weight.
            rows = torch.cat([given.new_zeros(1, width), torch.eye(width, dtype=given.dtype, device=given.device)])
            answers = torch.cat([self._run(part) for part in rows.split(ROWS)])
            # Its values come from nobody's random numbers.
            layer = nn.utils.skip_init(nn.Linear, width, answers.shape[1], device=given.device, dtype=answers.dtype)
            layer.bias.copy_(answers[0])
            layer.weight.copy_((answers[1:] - answers[0]).T)
            both = layer(torch.cat([given, -given]).to(answers.dtype))
        if not alike(both, self._answers, precise(given)):
            raise PrunexError(
                f"relevance rules know linear layers behind a ViT, and {kind(self.module)} does more: use "
                "generic_attention or rollout, or explain the ViT itself by what enters it"
            )
        return layer.requires_grad_(False)

    def _run(self, out: Tensor) -> Tensor:
        answered = []

        def forward(*_: Any, **__: Any) -> Tensor:
            answered.append(True)
            # The module may write into it, and may call its ViT without a graph where it trains its head alone.
            with torch.set_grad_enabled(out.requires_grad):
                return out.clone()

        def grids(*_: Any, **__: Any) -> list[Tensor]:
            row = forward()
            return [row] if self.grid_call is None else self.grid_call.grids(row)

        with as_found(self.module, train=False):
            whole = with_another(self.module, self.vit, stand_in(self.vit, forward, grids))
            output = whole(self.blank.expand(len(out), *self.blank.shape[1:]))
        if len(answered) != 1:
            raise cannot(self.module, f"calls its {kind(self.vit)} {len(answered)} times on other images")
        return rows_of(fields(output).get(self.field), len(out))


def alike(a: Tensor, b: Tensor, precise: bool = True) -> bool:
    """Whether two outputs [B, C] are the same up to rounding, in relation to the largest of them."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    both = torch.isfinite(a) | torch.isfinite(b)  # what is no number in both is alike
    scale = torch.where(torch.isfinite(b), b.abs(), 0).max().clamp(min=1e-6)
    return bool(((a - b).abs()[both] <= (1e-3 if precise else 0.15) * scale).all())


def precise(images: Tensor) -> bool:
    """Whether a model computes with them to at least float32, so that two ways of doing it agree."""
    kind = images.device.type
    if images.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(kind):
        return False
    return kind != "cuda" or not torch.backends.cuda.matmul.allow_tf32


def with_another(module: nn.Module, vit: nn.Module, other: nn.Module) -> nn.Module:
    """A module that shares all with this one, but for another ViT in the place of its own."""
    # A compiled wrapper would run the graph of the module it was made for.
    compiled = module._modules.get("_orig_mod")
    if compiled is not None:
        return with_another(compiled, vit, other)
    if module is vit:
        return other
    if not any(m is vit for m in module.modules()):
        return module
    copied = shallow(module)
    children = {name: None if m is None else with_another(m, vit, other) for name, m in module._modules.items()}
    copied.__dict__["_modules"] = children
    if hasattr(copied.__dict__.get("forward"), "_torchdynamo_orig_callable"):
        del copied.__dict__["forward"]  # compiled for the module that this is a copy of
    return copied


def stand_in(vit: ViT, forward: Forward, grids: Callable[..., Any] | None = None) -> ViT:
    """The ViT with another forward, and another ``forward_intermediates``; hooks on it stay."""
    copied = shallow(vit)
    copied.__dict__["forward"] = forward
    if grids is not None:
        copied.__dict__["forward_intermediates"] = grids
    return copied


def fits(value: Any, count: int) -> bool:
    """Whether something is float [B, classes] of so many images."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2 and len(value) == count


def rows_of(value: Any, count: int) -> Tensor:
    """What :func:`fits`, and nothing else."""
    if not fits(value, count):
        raise Unfollowed(f"what follows the ViT gave no tensor [{count}, classes] for {count} images")
    return value


def kind(module: nn.Module) -> str:
    """What messages call a module."""
    return type(module).__name__


def cannot(module: nn.Module, what: str, instead: str = "") -> Unfollowed:
    """The error for a module that cannot be explained as a whole."""
    return Unfollowed(
        f"{kind(module)} {what}, so it cannot be explained as a whole: {instead and instead + ', or '}explain the ViT "
        "itself (module.model or as it is called there) by the tensor that enters it"
    )
