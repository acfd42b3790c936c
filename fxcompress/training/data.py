"""Training data: the order of an epoch, what is random in a sample, batches. All of it follows from (seed, epoch,
place) alone, so that a run that is resumed, or cut over several processes or workers, sees the same samples in the same
order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, default_collate

from ..diagnostics import Diagnostic, PlanError

VALIDATION_SHARE = 0.2  # of data that come without a part for validation
TARGETS = ("target", "targets", "labels", "label")  # the key of the target in a sample that is a mapping

Sample = tuple[tuple[Any, ...], dict[str, Any], Any]  # inputs, inputs by keyword, target


@dataclass(frozen=True)
class Data:
    """Datasets with a length, whose samples are tuples (input, ..., target), or mappings of inputs by keyword with a
    `target` (or `labels`). `validation` is None where there is none; `notes` say where they come from."""

    train: Dataset[Any]
    validation: Dataset[Any] | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: object, seed: int = 0) -> Data:
        """From a `Data`, a pair (train, validation), or one dataset, of which a fifth is kept for validation. Raises
        PlanError (FXC0802)."""
        if isinstance(given, Data):
            return given
        if isinstance(given, tuple) and len(given) == 2 and all(map(_is_dataset, given)):
            return cls(*given)
        if _is_dataset(given):
            return cls(*split(cast("Dataset[Any]", given), seed), (
                f"{VALIDATION_SHARE:.0%} of the data, drawn by the seed, are for validation",))
        raise PlanError([Diagnostic(
            "FXC0802", f"the data are of the type {type(given).__name__}, no dataset",
            help="give a dataset with `__len__` and `__getitem__`, or a pair of them for training and validation")])


def _is_dataset(value: object) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, tuple | str | Mapping)


def length(dataset: Dataset[Any]) -> int:
    """How many samples it has."""
    return len(cast(Sized, dataset))


def split(dataset: Dataset[Any], seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """(train, validation): a share drawn by `seed`."""
    order = torch.randperm(length(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(len(order) * VALIDATION_SHARE)
    return Subset(dataset, sorted(order[cut:])), Subset(dataset, sorted(order[:cut]))


def number(*parts: int) -> int:
    """A seed that hangs on all of `parts`, in [0, 2^63)."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of Python, numpy and torch (on the CPU) begin at `seed`, and go on as before afterwards."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


class Order(Sampler[tuple[int, int]]):
    """(epoch, index) of every sample of one epoch: shuffled by the seed and the epoch, cut to whole steps, from step
    `skip` on. `begin` says which epoch."""

    def __init__(self, samples: int, batch: int, seed: int) -> None:
        """Of `samples`, in steps of `batch`."""
        self.samples, self.batch, self.seed = samples, batch, seed
        self.epoch = self.skip = 0

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.samples // self.batch

    def begin(self, epoch: int, skip: int = 0) -> None:
        """The next iteration is of `epoch`, without its first `skip` steps."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(number(self.seed, self.epoch)))
        for index in order[self.skip * self.batch: self.steps * self.batch].tolist():
            yield self.epoch, index

    def __len__(self) -> int:
        return (self.steps - self.skip) * self.batch


class Samples(Dataset[Any]):
    """Samples by (epoch, index): what is drawn for one (its augmentation) hangs on the seed and on these alone."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        """Of a dataset of any kind; one of tensors draws nothing."""
        self.dataset, self.seed = dataset, seed
        self.plain = isinstance(dataset, TensorDataset)

    def __len__(self) -> int:
        return length(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        if self.plain:
            return self.dataset[index]
        with seeded(number(self.seed, epoch, index)):
            return self.dataset[index]

    def __getitems__(self, places: list[tuple[int, int]]) -> Any:
        """A batch's samples; those of tensors at once, as the batch."""
        if not self.plain:
            return [self[place] for place in places]
        chosen = torch.tensor([index for _, index in places])
        return Batch([tensor[chosen] for tensor in cast(TensorDataset, self.dataset).tensors])


class Numbered(Samples):
    """Samples whose batches are [indices, batch]."""

    def __getitems__(self, places: list[tuple[int, int]]) -> Any:
        """The indices of a batch's samples, and these."""
        return [torch.tensor([index for _, index in places]), super().__getitems__(places)]


def collated_numbered(found: list[Any]) -> list[Any]:
    """[indices, batch]."""
    return [found[0], collated(found[1])]


class Batch(list[Tensor]):
    """Samples that are a batch already."""


def collated(samples: Any) -> Any:
    """Samples as a batch."""
    return list(samples) if isinstance(samples, Batch) else default_collate(samples)


def training_loader(data: Data, batch: int, parts: int, seed: int, workers: int) -> tuple[DataLoader[Any], Order]:
    """[indices, batch] of `batch / parts` samples, and their order. Raises PlanError (FXC0802) for less than one
    batch."""
    count = length(data.train)
    if count < batch:
        raise PlanError([Diagnostic("FXC0802", f"there are {count} training samples, which is less than one batch",
                                    notes=(f"a batch has {batch} samples",),
                                    help="take a smaller batch: `--batch 16`")])
    order = Order(count, batch, seed)
    loader: DataLoader[Any] = DataLoader(
        Numbered(data.train, seed), batch_size=batch // parts, sampler=cast("Sampler[Any]", order), drop_last=True,
        collate_fn=collated_numbered, num_workers=workers, generator=torch.Generator().manual_seed(seed))
    return loader, order


def validation_loader(data: Data, batch: int, seed: int, workers: int) -> DataLoader[Any] | None:
    """Batches of the validation samples in their order; None where there are none."""
    if data.validation is None or not length(data.validation):
        return None
    places = [(0, index) for index in range(length(data.validation))]
    return DataLoader(Samples(data.validation, seed), batch_size=batch, sampler=cast("Sampler[Any]", places),
                      collate_fn=collated, num_workers=workers, generator=torch.Generator().manual_seed(seed))


def parted(batch: Any) -> Sample:
    """Inputs, inputs by keyword, and the target of a sample or a batch. Raises PlanError (FXC0802)."""
    if isinstance(batch, Mapping):
        key = next((name for name in TARGETS if name in batch), None)
        if key is not None:
            return (), {name: value for name, value in batch.items() if name != key}, batch[key]
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return tuple(batch[:-1]), {}, batch[-1]
    raise PlanError([Diagnostic(
        "FXC0802", f"a sample is a {type(batch).__name__} that doesn't say what its target is",
        help="let samples be tuples (input, target), or mappings with a `target`")])


class Inputs:
    """Batches of inputs alone, of the first `samples` training samples in an order drawn by the seed: what quantizers
    and criteria are shown. It is made anew whenever it is iterated."""

    def __init__(self, data: Data, samples: int, batch: int, seed: int) -> None:
        """`batch` samples at a time."""
        self.samples = Samples(data.train, seed)
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(number(seed, -1)))
        self.chosen = [chunk.tolist() for chunk in torch.split(order[:samples], batch)]

    def __iter__(self) -> Iterator[Any]:
        for chunk in self.chosen:
            args, kwargs, _ = parted(default_collate([self.samples[0, index] for index in chunk]))
            yield kwargs or args

    def __len__(self) -> int:
        return len(self.chosen)


def first_inputs(data: Data, batch: int = 2) -> Any:
    """Inputs to capture a model with: a tuple, or a dict by keyword."""
    samples = Samples(data.train, 0)
    args, kwargs, _ = parted(default_collate([samples[0, index] for index in range(min(batch, len(samples)))]))
    return kwargs or args


def size_of(batch: Any) -> int:
    """How many samples a batch has, by the first tensor in it."""
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((count for value in values if (count := size_of(value))), 0)
