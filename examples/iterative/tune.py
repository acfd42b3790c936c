"""Iterative pruning with fine-tuning: `policy.fxc` on a small network for the 8x8 digits of scikit-learn.

    python examples/iterative/tune.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcompress

EPOCHS = 12  # the ramp ends after ten
TRAIN = 1200  # of 1,797 digits


def digits() -> tuple[Tensor, Tensor]:
    """Images `float32[1797, 1, 8, 8]` and labels, shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.target))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def main() -> None:
    torch.manual_seed(0)
    images, labels = digits()
    dense = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))
    result = fxcompress.compile(Path(__file__).with_name("policy.fxc"), dense, (images[:2],))
    optimizer = result.follow(torch.optim.Adam(result.module.parameters(), lr=0.003))
    for epoch in range(EPOCHS):
        result.module.train()
        for batch in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            F.cross_entropy(result.module(images[batch]), labels[batch]).backward()
            optimizer.step()
            result.step()
        result.epoch_end()  # channels leave here, and the state of the optimizer with them
        result.module.eval()
        right = (result.module(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean()
        width = len(result.module.get_parameter("3.weight"))
        print(f"epoch {epoch + 1:2}: {width:2} of 32 channels in the second convolution, accuracy {100 * right:.1f}%")
    deployed = result.finalize()
    print(f"{sum(p.numel() for p in dense.parameters()):,} parameters -> "
          f"{sum(p.numel() for p in deployed.parameters()):,}")


if __name__ == "__main__":
    main()
