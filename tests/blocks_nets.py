"""Nets of residual blocks of many kinds whose forward can leave out chosen blocks: the reference for their removal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth


class Block(nn.Module):
    """`x + f(x)` in one of `KINDS`; `skip` makes f zero."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.skip = kind, False
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=kind != "plain")
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.scale = nn.Parameter(torch.rand(width, 1, 1)) if kind == "scaled" else None
        self.drop = StochasticDepth(0.3, "row") if kind == "depth" else nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        if self.kind == "gated":
            y = y * torch.sigmoid(self.conv2(y.mean((2, 3), keepdim=True)))
            return y
        if self.kind == "nested":
            return y + self.conv2(y)
        if self.kind == "shuffled":
            a, b = self.conv2(y).chunk(2, dim=1)
            return torch.cat([b, a], dim=1)
        return self.conv2(y)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x) if self.skip else self.branch(x)
        if self.kind == "scaled":
            return x + self.scale * y
        if self.kind == "minus":
            return x - y
        if self.kind == "alpha":
            return torch.add(x, y, alpha=0.5)
        if self.kind == "norm":
            return self.norm1(y + x) if self.skip else nn.functional.batch_norm(
                y + x, self.norm1.running_mean, self.norm1.running_var, self.norm1.weight, self.norm1.bias)
        total = self.drop(y) + x
        return torch.relu(total) if self.kind in ("plain", "gated") else total


KINDS = ("plain", "scaled", "depth", "gated", "nested", "shuffled", "minus", "alpha", "norm")


class Tower(nn.Module):
    """A stem, blocks of `kinds`, after some of them a step to another width by a projected shortcut, a head."""

    def __init__(self, kinds: Sequence[str], steps: Collection[int] = (), width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        self.steps = nn.ModuleDict()
        for place, kind in enumerate(kinds):
            self.blocks.append(Block(kind, width))
            if place in steps:
                self.steps[str(place)] = nn.ModuleList([nn.Conv2d(width, width + 2, 1, stride=2),
                                                        nn.Conv2d(width, width + 2, 3, stride=2, padding=1)])
                width += 2
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for place, block in enumerate(self.blocks):
            x = block(x)
            if str(place) in self.steps:
                one, other = self.steps[str(place)]
                x = one(x) + torch.relu(other(x))
        return self.head(x.mean((2, 3)))


def skipping(net: Tower, gone: Collection[int]) -> Tower:
    """`net` with the branches of some blocks giving zero; the others as they were."""
    for place, block in enumerate(net.blocks):
        block.skip = place in gone
    return net
