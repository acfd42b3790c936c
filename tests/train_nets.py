"""Shared by the tests of training: a small network, its data, and the weights that a run ends with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fxcompress
from fxcompress.nn import Mask
from fxcompress.training import Trained

EXAMPLE = (torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1)),)
# A mask along a ramp, channels that leave at once in the middle, and one more mask on what is left.
POLICY = """policy small {
    phase sparsify over epochs 0..3 {
        mask linear { sparsity = cubic(0% -> 60%), every = 4 steps }
    }
    phase thin after sparsify {
        remove channels(conv2d) { ratio = 50%, by = taylor }
    }
    phase last over epochs 4..5 after thin {
        mask conv2d { sparsity = linear(0% -> 50%), by = gradient, every = 3 steps }
    }
}
"""


# A teacher whose features need an adapter, a mask beside it, and channels that leave when it has gone.
DISTILL = """policy taught(teacher: model) {
    phase learn over epochs 0..4 {
        distill from teacher {
            pair output <- output { loss = kl, temperature = linear(8 -> 1), weight = 0.9 }
            pair output <- targets { loss = cross_entropy, weight = 0.1 }
            pair "conv" <- "conv" { loss = hint, weight = 0.01 }
        }
        mask linear { sparsity = linear(0% -> 50%), every = 2 steps }
    }
    phase thin after learn {
        remove channels(conv2d) { ratio = 50% }
    }
}
"""


class Net(nn.Module):
    def __init__(self, seed: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.drop, self.fc2 = nn.Linear(8 * 16, 24), nn.Dropout(dropout), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc2(self.drop(torch.relu(self.fc1(x.flatten(1)))))


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.fc = nn.Conv2d(1, 11, 3), nn.Linear(11 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


class Plain(nn.Module):
    """Nothing in it hangs on how a batch is cut: no norm over it, no dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def plain() -> Plain:
    return Plain()


plain.example_inputs = EXAMPLE  # type: ignore[attr-defined]


def samples(count: int, seed: int) -> TensorDataset:
    """Images that lie around one of four patterns."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 4, (count,), generator=generator)
    return TensorDataset(patterns[labels] + 0.7 * torch.randn(count, 1, 6, 6, generator=generator), labels)


def data() -> tuple[TensorDataset, TensorDataset]:
    return samples(96, 2), samples(40, 3)


class Noisy(torch.utils.data.Dataset[Any]):
    """Samples that are drawn anew each time, as augmentation does, by all three sources of random numbers."""

    def __init__(self) -> None:
        self.samples = samples(96, 2)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import random

        import numpy as np

        image, label = self.samples[index]
        return image + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * float(np.random.rand()), label


def noisy() -> tuple[Noisy, TensorDataset]:
    return Noisy(), samples(40, 3)


SETTINGS: dict[str, Any] = {
    "epochs": 6, "batch": 16, "optimizer": "AdamW(lr=0.01)", "scheduler": "CosineAnnealingLR", "clip": 1.0,
    "device": "cpu", "log_every": 4}


def trainer(output: Path | None = None, policy: str = POLICY, model: nn.Module | None = None, given: object = None,
            **more: Any) -> fxcompress.Trainer:
    return fxcompress.Trainer(policy, model or Net(), given or data(), EXAMPLE, output=output,
                              **{**SETTINGS, **more})


def environment() -> dict[str, str]:
    """That of a script in this folder."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def state_of(trained: Trained) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained.result.module.state_dict().items()}


def masks(module: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix("_mask"): child.mask for name, child in module.named_modules() if isinstance(child, Mask)}
