"""Data that are drawn and not stored: a sample is a pure function of ``(seed, split, epoch, index)``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from prunex.checks import check_whole

Split = Literal["train", "val", "test"]
SPLITS = {"train": 0, "val": 1, "test": 2}


def uniform(key: Sequence[int], counters: np.ndarray, draws: int) -> Tensor:
    """Random numbers, float32 ``[N, draws]`` in [0, 1), that depend on key and counters ``[N]`` alone.

    Not on the order they are asked for in; the key is integers such as ``(seed, split)``.

    >>> a = uniform((0, 1), np.array([3, 4]), 20); b = uniform((0, 1), np.array([4]), 20)
    >>> bool((a[1] == b[0]).all()), bool((a[0] == a[1]).any())
    (True, False)
    """

    # The finaliser of SplitMix64: every input bit reaches every output bit.
    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    # 2^64 over the golden ratio, SplitMix64's step: counters in a row land far apart.
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for part in key:
            state = mix(state + golden + np.array([part % 2**64], np.uint64))
        rows = mix(state + golden * (counters.astype(np.uint64) + np.uint64(1)))
        numbers = mix(rows[:, None] + golden * np.arange(1, draws + 1, dtype=np.uint64))
    return torch.from_numpy((numbers >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


class EpochSampler(DistributedSampler[int]):
    """Yields ``epoch * size + i``, so a sample's number tells its epoch, in worker processes too."""

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        for index in super().__iter__():
            yield self.epoch * size + index


class DrawnDataset(Dataset[Any]):
    """A split of so many samples, drawn a whole batch at a time by ``__getitems__``."""

    size: int

    def __len__(self) -> int:
        return self.size

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The batch of these numbers."""


class DrawnData(LightningDataModule):
    """Fresh samples every training epoch, always the same ones for validation and test."""

    def __init__(self, batch_size: int, train_size: int, val_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size = check_whole("batch_size", batch_size, 1)
        self.train_size = check_whole("train_size", train_size, 1)
        self.val_size = check_whole("val_size", val_size, 1)
        self.seed = check_whole("seed", seed, 0)
        self.num_workers = check_whole("num_workers", num_workers, 0)

    @abstractmethod
    def dataset(self, split: Split) -> DrawnDataset:
        """The samples of one split as a map-style dataset."""

    def size_of(self, split: Split) -> int:
        """Samples of a split; of the training split in an epoch."""
        return self.train_size if split == "train" else self.val_size

    def _loader(self, dataset: DrawnDataset, sampler: DistributedSampler[int] | None = None) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            # The dataset draws whole batches.
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Fresh samples; Lightning tells the sampler the epoch."""
        dataset = self.dataset("train")
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        # Samples are independent draws already, so shuffling their numbers would add nothing.
        return self._loader(dataset, EpochSampler(dataset, world, rank, shuffle=False))

    def val_dataloader(self) -> DataLoader[Any]:
        """The same samples every time."""
        return self._loader(self.dataset("val"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Those of validation."""
        return self.val_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Samples that neither training nor validation has."""
        return self._loader(self.dataset("test"))


def _as_is(batch: Any) -> Any:
    return batch
