"""What of a computation would wait for the device, seen on a CPU: reads of values, and shapes that depend on them."""

import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
OURS = ("prunex", "callbacks", "recipes")
# What .item(), .tolist(), bool() and float() of a tensor, nonzero, masked_select and unique are to the dispatcher, and
# what reads values inside: the checks of multinomial and of factorisations, lengths of repeat_interleave and bincount.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "is_nonzero", "allclose", "multinomial", "bincount", "repeat_interleave", "_linalg_check_errors",
    "_linalg_eigh", "_linalg_svd", "linalg_lstsq",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes operations that wait for the device, ``file:function what`` by the innermost of our functions.

    Of torch's and Lightning's own they are noted by the package. ``looking`` switches it.
    """

    def __init__(self, looking=True):
        super().__init__()
        self.looking, self.noted, self.patches = looking, Counter(), []

    def __enter__(self):
        # These read memory without the dispatcher where it is the CPU's; those copy to a device, from pageable memory.
        self.patches = [patch.object(torch.Tensor, name, self._noting(name)) for name in ("tolist", "numpy", "cpu")]
        self.patches += [patch.object(torch, name, self._placing(name)) for name in ("tensor", "as_tensor")]
        for each in self.patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *args):
        for each in self.patches:
            each.stop()
        return super().__exit__(*args)

    def _noting(self, name):
        real = getattr(torch.Tensor, name)

        def noted(tensor, *args, **kwargs):
            self._note(name)
            return real(tensor, *args, **kwargs)

        return noted

    def _placing(self, name):
        real = getattr(torch, name)

        def placed(data, *args, **kwargs):
            if not isinstance(data, torch.Tensor) and kwargs.get("device") is not None:
                self._note(name)
            return real(data, *args, **kwargs)

        return placed

    def _note(self, what):
        if self.looking:
            self.noted[f"{_where()} {what}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        lengths = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if (name in WAITING and not lengths) or any(i is not None and i.dtype == torch.bool for i in chosen):
            self._note(name)
        if name == "lift_fresh" and args[0].ndim and sys._getframe(1).f_code.co_name != "placed":
            self._note("from a list")
        return func(*args, **(kwargs or {}))


def _where():
    """The innermost of our functions that is running, or the package that runs inside of it."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        parts = path.parts
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS:
            return f"{path.relative_to(ROOT).as_posix()}:{frame.f_code.co_name}"
        for package in ("optim", "lightning", "torchmetrics"):
            if "site-packages" in parts and package in parts:
                return package
        frame = frame.f_back
    return "elsewhere"
