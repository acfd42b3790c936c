"""Shared by the tests of the engine: a small network, its data, a plain training loop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.diagnostics import FxcError
from fxcompress.engine import Result
from fxcompress.nn import Mask as MaskModule

SPARSE = """
policy p {
    phase sparsify over %s {
        mask conv2d | linear {
            sparsity = %s
            every    = %s
        }
    }
}
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


EXAMPLE = (torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1)),)


def batches(seed: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def train(result: Result, optimizer: torch.optim.Optimizer, data: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    for _ in range(steps):
        images, labels = next(data)
        optimizer.zero_grad()
        F.cross_entropy(result.module(images), labels).backward()
        optimizer.step()
        result.step()


def sgd(result: Result) -> torch.optim.Optimizer:
    return torch.optim.SGD(result.module.parameters(), lr=0.05, momentum=0.9)


def masks(module: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix("_mask"): child.mask for name, child in module.named_modules()
            if isinstance(child, MaskModule)}


def sparsity(module: nn.Module) -> float:
    found = masks(module).values()
    return sum(int((~mask).sum()) for mask in found) / sum(mask.numel() for mask in found)


def code_of(error: pytest.ExceptionInfo[FxcError]) -> str:
    return error.value.diagnostics[0].code
