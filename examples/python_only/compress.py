"""Passes from Python, without a policy file: the same verbs, parameters and checks.

    python examples/python_only/compress.py
"""

from __future__ import annotations

import torch
from torch import nn

import fxcompress
from fxcompress.passes import Mask, Remove


def network() -> nn.Sequential:
    """A small image classifier: `float32[n, 3, 32, 32]` -> logits `float32[n, 10]`."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    dense = fxcompress.capture(network().eval(), (images,))
    thin = Remove(ratio=0.5, by="l1").apply(dense, "conv2d", what="channels")
    sparse = Mask(sparsity="75%", by="magnitude").apply(thin, "linear")
    for name, captured in (("dense", dense), ("thin", thin), ("sparse", sparse)):
        facts, logits = captured.facts, captured.module(images)
        print(f"{name:7} {facts.params:7,} parameters {facts.macs:10,} MACs, logits {tuple(logits.shape)}")
    try:
        Mask(sparsity=60)
    except fxcompress.PolicyError as error:
        print(f"\n{error}")


if __name__ == "__main__":
    main()
