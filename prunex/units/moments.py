"""Means and covariances of what enters a layer, as far as they say what it loses with some of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.errors import PrunexError

ENOUGH = 10_000  # rows that a covariance is always taken from where there are so many
EACH = 10  # and rows for each input that is kept


class Moments:
    """Sums over rows h [F] that a layer W h + b was given, added batch by batch in float64, about a fixed centre.

    K are the inputs that are kept, R those that are lost, and l = W_R h_R, [D], is what is lost. Held are the means of
    h and of the output, the variances of h, the covariances of h_K [K, K] and of h_K with l [K, D], and the variances
    of l and of the output: K (K + D) numbers however many rows there are. Products are in float32 (or float64) a batch,
    about the first batch's mean, so that nothing cancels.

    Attributes:
        ahead: How many times the first batch's rows there will be in all, as far as that is known. Covariances and
            variances are then taken from every n-th row where there are more than :data:`ENOUGH` and :data:`EACH` for
            each input kept: products of all of them would cost more than the model's forwards.
    """

    def __init__(self, weight: Tensor, kept: Tensor, lost: Tensor, covariance: bool) -> None:
        """Of a layer's weight [D, F], and the numbers of inputs kept and lost; ``covariance``: whether h_K's."""
        self.kept, self.lost = kept.to(weight.device), lost.to(weight.device)
        self.home = torch.device("cpu") if weight.device.type == "mps" else weight.device  # mps knows no float64
        self.lossy = weight.index_select(1, self.lost)
        outputs, inputs = weight.shape
        self.seen, self.rows, self.batches = 0, 0, 0  # rows of the means, and those of the variances
        self.ahead, self.every = 1.0, 1
        self._sum, self._sum_out = self._zeros(inputs), self._zeros(outputs)
        self._about, self._about_out = self._zeros(inputs), self._zeros(outputs)
        self._squares, self._squares_out, self._squares_lost = (self._zeros(n) for n in (inputs, outputs, outputs))
        size = len(kept) if covariance else 0
        self._among, self._across = self._zeros((size, size)), self._zeros((size, outputs))
        self.covariance = covariance

    def _zeros(self, shape: int | tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.home)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows [n, F] that entered the layer, and what it made of them, [n, D]."""
        count = len(x)
        if count == 0:
            return
        # TensorFloat32 would round products to three digits.
        exact = x.is_cuda and torch.get_float32_matmul_precision() != "highest"
        kind = torch.float64 if exact else torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(kind), y.to(kind)
        mean, mean_out = x.mean(0), y.mean(0)
        if self.seen == 0:
            self.centre, self.centre_out = mean, mean_out
            self.every = max(1, int(count * self.ahead) // max(ENOUGH, EACH * len(self.kept)))
        self.seen += count
        self._sum += self._home(mean).double() * count
        self._sum_out += self._home(mean_out).double() * count
        # Not the same tokens of every image where a step fits into their number.
        first = self.batches % self.every
        self.batches += 1
        x, y = x[first :: self.every] - self.centre, y[first :: self.every] - self.centre_out
        lost = x[:, self.lost] @ self.lossy.to(kind).T
        self.rows += len(x)
        for total, part in (
            (self._about, x), (self._about_out, y), (self._squares, x.square()), (self._squares_out, y.square()),
            (self._squares_lost, lost.square()),
        ):  # fmt: skip
            total += self._home(part.sum(0))
        if self.covariance:
            left = x[:, self.kept]
            self._among += self._home(left.T @ left)
            self._across += self._home(left.T @ lost)

    def _home(self, x: Tensor) -> Tensor:
        # Adding float32 to float64 in place needs no copy; mps has none of it.
        return x.to(self.home)

    @property
    def mean(self) -> Tensor:
        """Of the inputs, [F]."""
        return self._sum / self.seen

    @property
    def variances(self) -> Tensor:
        """Of the inputs, [F]."""
        return self._squares / self.rows - (self._about / self.rows).square()

    @property
    def variance(self) -> float:
        """Of the output, mean over its channels."""
        return float((self._squares_out / self.rows - (self._about_out / self.rows).square()).mean())

    @property
    def among(self) -> Tensor:
        """Covariance of the inputs kept, [K, K]."""
        about = (self._about / self.rows)[self.kept]
        return self._among / self.rows - torch.outer(about, about)

    @property
    def across(self) -> Tensor:
        """Covariance of the inputs kept with what is lost, [K, D]."""
        about = self._about / self.rows
        return self._across / self.rows - torch.outer(about[self.kept], self._gone(about))

    @property
    def gone(self) -> Tensor:
        """Mean of what is lost, [D]."""
        return self._gone(self.mean)

    def _gone(self, inputs: Tensor) -> Tensor:
        return self.lossy.to(self.home).double() @ inputs[self.lost]

    def check(self, name: str) -> None:
        """Refuse what nothing can be made of; ``name`` is the layer's."""
        if self.seen == 0:
            raise PrunexError(f"no token of these images reached {name}, so nothing is known to correct it by")
        held = (self._sum, self._squares, self._squares_lost, self._among, self._across)
        if not all(bool(torch.isfinite(t).all()) for t in held):
            raise PrunexError(f"what enters {name} is NaN or infinite on these images: see weights and images")

    @property
    def scarce(self) -> bool:
        """Whether there are fewer rows than coefficients of each output."""
        return self.covariance and self.rows < len(self.kept)

    def refit(self, intercept: bool, ridge: float) -> Tensor:
        """What is added to W_K, [D, K]: l by ridge regression on h_K, with an intercept or without.

        ``ridge`` is a share of the mean of the inputs' variances (without an intercept, of their squares).

        Raises:
            PrunexError: For a covariance that cannot be inverted, as without a ridge where inputs depend on each other.
        """
        among, across, squares = self.among, self.across, self.variances
        if not intercept:
            left = self.mean[self.kept]
            among, across = among + torch.outer(left, left), across + torch.outer(left, self.gone)
            squares = squares + self.mean.square()
        scale = float(squares.mean())
        # Inputs that are all 0 have no scale, and any ridge at all makes their system regular.
        among = (among + ridge * (scale or 1.0) * torch.eye(len(among), dtype=among.dtype, device=among.device)).cpu()
        factor, wrong = torch.linalg.cholesky_ex(among)
        if int(wrong) > 0:
            raise PrunexError("inputs depend on each other on these images, so without a ridge nothing fits: give one")
        return torch.cholesky_solve(across.cpu(), factor).T

    def shift(self, change: Tensor | None) -> Tensor:
        """What is added to the bias, [D], beside ``change`` of W_K, so that the mean output stays."""
        gone = self.gone.cpu()
        return gone if change is None else gone - change @ self.mean[self.kept].cpu()

    def error(self, change: Tensor | None, shift: Tensor | None) -> float:
        """Mean squared error of the output on the rows seen, with W_K and b changed so, mean over channels."""
        bias = self.gone.cpu() if shift is None else self.gone.cpu() - shift
        spread = self._squares_lost / self.rows - self._gone(self._about / self.rows).square()
        left = float(spread.sum())
        if change is not None:
            bias = bias - change @ self.mean[self.kept].cpu()
            left += float((change @ self.among.cpu() * change).sum() - 2 * (change.T * self.across.cpu()).sum())
        # A square that is multiplied out may fall below 0 by rounding.
        return (max(0.0, left) + float(bias.square().sum())) / len(bias)
