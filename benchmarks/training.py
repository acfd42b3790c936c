"""How the networks of the benchmarks are trained."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/lenet_mnist"))
from digits import Split


def train(model: nn.Module, split: Split, epochs: int, seed: int, rate: float) -> None:
    """Adam, cross entropy, a cosine learning rate; the same batches for the same seed. Ends in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=rate / 100)
    model.train()
    for _ in range(epochs):
        for images, labels in split.batches(generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
    model.eval()
