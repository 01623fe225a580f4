"""Means and covariances of what enters a layer, as far as they say what it loses with some of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.errors import PrunexError


class Moments:
    """Sums over rows h [F] that a layer W h + b was given, added batch by batch, centred, in float64.

    K are the inputs that are kept, R those that are lost, and l = W_R h_R, [D], is what is lost. Held are the means and
    variances of h, the covariances of h_K [K, K] and of h_K with l [K, D], and the variances of l and of the output:
    K (K + D) numbers however many rows there are. Products are in float32 (or float64) a batch: centred by the batch's
    mean before they are added, so that nothing cancels.
    """

    def __init__(self, weight: Tensor, kept: Tensor, lost: Tensor, covariance: bool) -> None:
        """Of a layer's weight [D, F], and the numbers of inputs kept and lost; ``covariance``: whether h_K's."""
        self.kept, self.lost = kept.to(weight.device), lost.to(weight.device)
        self.home = torch.device("cpu") if weight.device.type == "mps" else weight.device  # mps knows no float64
        self.lossy = weight.index_select(1, self.lost)
        self.columns = self.lossy.to(self.home).double()
        outputs, inputs = weight.shape
        self.rows = 0
        self.mean, self.squares = self._zeros(inputs), self._zeros(inputs)
        self.lost_squares, self.squares_out, self.mean_out = self._zeros(()), self._zeros(()), self._zeros(outputs)
        size = len(kept) if covariance else 0
        self.among, self.across = self._zeros((size, size)), self._zeros((size, outputs))
        self.covariance = covariance

    def _zeros(self, shape: int | tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.home)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows [n, F] that entered the layer, and what it made of them, [n, D]."""
        count = len(x)
        if count == 0:
            return
        exact = x.is_cuda and torch.get_float32_matmul_precision() != "highest"
        kind = torch.float64 if exact else torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(kind), y.to(kind)
        centre, middle = x.mean(0), y.mean(0)
        x, y = x - centre, y - middle
        lost = x[:, self.lost] @ self.lossy.to(kind).T
        # What rounding left of the sums of centred rows.
        rest, rest_out = self._sum(x), self._sum(y)
        gap, gap_out = self._home(centre) + rest / count - self.mean, self._home(middle) + rest_out / count
        gap_out = gap_out - self.mean_out
        total = self.rows + count
        merged = self.rows * count / total
        self.squares += self._sum(x.square()) - rest.square() / count + merged * gap.square()
        out = self._sum(y.square()) - rest_out.square() / count + merged * gap_out.square()
        self.squares_out += out.sum()
        rest_lost, gap_lost = self.columns @ rest[self.lost], self.columns @ gap[self.lost]
        self.lost_squares += (self._sum(lost.square()) - rest_lost.square() / count + merged * gap_lost.square()).sum()
        if self.covariance:
            left, rest_left, gap_left = x[:, self.kept], rest[self.kept], gap[self.kept]
            self.among += self._home(left.T @ left)
            self.among += torch.outer(gap_left, merged * gap_left) - torch.outer(rest_left, rest_left / count)
            self.across += self._home(left.T @ lost)
            self.across += torch.outer(gap_left, merged * gap_lost) - torch.outer(rest_left, rest_lost / count)
        self.mean += gap * (count / total)
        self.mean_out += gap_out * (count / total)
        self.rows = total

    def _home(self, x: Tensor) -> Tensor:
        return x.to(self.home).double()

    def _sum(self, x: Tensor) -> Tensor:
        if self.home == x.device:
            return x.sum(0, dtype=torch.float64)
        return self._home(x.sum(0))

    def check(self, name: str) -> None:
        """Refuse what nothing can be made of; ``name`` is the layer's."""
        if self.rows == 0:
            raise PrunexError(f"no token of these images reached {name}, so nothing is known to correct it by")
        held = (self.mean, self.squares, self.lost_squares, self.among, self.across)
        if not all(bool(torch.isfinite(t).all()) for t in held):
            raise PrunexError(f"what enters {name} is NaN or infinite on these images: see weights and images")

    @property
    def scarce(self) -> bool:
        """Whether there are fewer rows than coefficients of each output."""
        return self.covariance and self.rows < len(self.kept)

    @property
    def variance(self) -> float:
        """Of the output, mean over its channels."""
        return float(self.squares_out) / self.rows / len(self.mean_out)

    def refit(self, intercept: bool, ridge: float) -> Tensor:
        """What is added to W_K, [D, K]: l by ridge regression on h_K, with an intercept or without.

        ``ridge`` is a share of the mean of the inputs' variances (without an intercept, of their squares).

        Raises:
            PrunexError: For a covariance that cannot be inverted, as without a ridge where inputs depend on each other.
        """
        among, across, squares = self.among / self.rows, self.across / self.rows, self.squares / self.rows
        if not intercept:
            left = self.mean[self.kept]
            among = among + torch.outer(left, left)
            across = across + torch.outer(left, self._lost_mean)
            squares = squares + self.mean.square()
        scale = float(squares.mean())
        among = (among + ridge * (scale or 1.0) * torch.eye(len(among), dtype=among.dtype, device=among.device)).cpu()
        factor, wrong = torch.linalg.cholesky_ex(among)
        if int(wrong) > 0:
            raise PrunexError("inputs depend on each other on these images, so without a ridge nothing fits: give one")
        return torch.cholesky_solve(across.cpu(), factor).T

    @property
    def _lost_mean(self) -> Tensor:
        return self.columns @ self.mean[self.lost]

    def shift(self, change: Tensor | None) -> Tensor:
        """What is added to the bias, [D], beside ``change`` of W_K, so that the mean output stays."""
        lost = self._lost_mean.cpu()
        return lost if change is None else lost - change @ self.mean[self.kept].cpu()

    def error(self, change: Tensor | None, shift: Tensor | None) -> float:
        """Mean squared error of the output on the rows seen, with W_K and b changed so, mean over channels."""
        lost, squares = self._lost_mean.cpu(), self.lost_squares / self.rows
        bias = lost if shift is None else lost - shift
        left = float(squares)
        if change is not None:
            bias = bias - change @ self.mean[self.kept].cpu()
            among, across = self.among.cpu() / self.rows, self.across.cpu() / self.rows
            left += float((change @ among * change).sum() - 2 * (change.T * across).sum())
        return (max(0.0, left) + float(bias.square().sum())) / len(lost)
