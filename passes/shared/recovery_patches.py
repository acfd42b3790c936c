"""Convolutions and linear layers as one product: patches of what a layer reads, times its weight in rows.

[groups, patches, inputs] × [groups, outputs, inputs] gives [groups, patches, outputs]. A linear layer has one group, a
depthwise convolution as many as channels. Which patches are looked at is drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.graph.ops import arguments, kind_of
from fxcompress.nn.post_ops import FUNCTIONS
from fxcompress.passes.shared.post_ops import post_op
from fxcompress.passes.shared.recovery import Layer

KINDS = ("linear", "conv2d")
_BYTES = 2**26  # that all patches of a layer take


@dataclass(frozen=True)
class Product:
    """How a layer multiplies: in how many groups, and where the patches of a convolution lie."""

    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, layer: Layer) -> Product | None:
        """That of `layer`; None for kinds that aren't computed so."""
        values, kind = arguments(layer.node), kind_of(layer.node)
        if kind == "linear":
            return cls()
        if kind != "conv2d" or isinstance(values["padding"], str):
            return None
        wide, high = layer.weight().shape[-2:]
        return cls(int(values["groups"]), (wide, high), *(_pair(values[name]) for name in
                                                          ("stride", "padding", "dilation")))

    def rows(self, weight: Tensor) -> Tensor:
        """A weight, or anything of its shape, as [groups, outputs, inputs]."""
        return weight.reshape(self.groups, len(weight) // self.groups, -1)


def _pair(value: Any) -> tuple[int, int]:
    numbers = (value, value) if isinstance(value, int) else tuple(value) * (1 + (len(value) == 1))
    return numbers[0], numbers[1]


class Places:
    """Where patches are taken: in all batches together at most `count`, the same in every tensor of one shape."""

    def __init__(self, layer: Layer, product: Product, gives: list[Tensor], count: int, seed: int = 0) -> None:
        """`gives` are the values that the layer computes, [..., out] or [N, C, H, W], a tensor for each batch."""
        self.product, self.linear = product, kind_of(layer.node) == "linear"
        width = layer.weight()[0].numel() * product.groups * 4
        count = max(64, min(count, _BYTES // width))
        generator = torch.Generator().manual_seed(seed)
        sizes = [value.numel() // value.shape[-1 if self.linear else 1] for value in gives]
        self.places = []
        for value, size in zip(gives, sizes, strict=True):
            share = min(size, -(-count * size // sum(sizes)))
            self.places.append(torch.randperm(size, generator=generator)[:share].to(value.device))
        self.shapes = [tuple(value.shape[-2:]) for value in gives]
        self.order = torch.randperm(sum(map(len, self.places)), generator=generator).to(gives[0].device)

    def of(self, values: list[Tensor]) -> Tensor:
        """[groups, patches, inputs] of what the layer reads, in random order."""
        found = torch.cat([self._linear(x, at) if self.linear else self._conv(x, at, shape)
                           for x, at, shape in zip(values, self.places, self.shapes, strict=True)])
        return found[self.order].transpose(0, 1).contiguous()

    @staticmethod
    def _linear(x: Tensor, at: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])[at].unsqueeze(1)

    def _conv(self, x: Tensor, at: Tensor, shape: tuple[int, ...]) -> Tensor:
        made, (high, wide) = self.product, shape
        x = F.pad(x, (made.padding[1], made.padding[1], made.padding[0], made.padding[0]))
        image, row, column = at // (high * wide), at // wide % high, at % wide
        rows = row[:, None] * made.stride[0] + torch.arange(made.kernel[0], device=x.device) * made.dilation[0]
        columns = column[:, None] * made.stride[1] + torch.arange(made.kernel[1], device=x.device) * made.dilation[1]
        found = x[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [patches, kh, kw, channels]
        return found.permute(0, 3, 1, 2).reshape(len(at), made.groups, -1)


def bias_of(layer: Layer, product: Product) -> Tensor:
    """The bias as [groups, 1, outputs], zeros where there is none."""
    bias, weight = layer.tensor("bias"), layer.weight()
    return (weight.new_zeros(len(weight)) if bias is None else bias.detach()).reshape(product.groups, 1, -1)


def activation_of(layer: Layer) -> Callable[[Tensor], Tensor]:
    """The function behind the product in its region; the identity where there is none, or an addition comes first."""
    name, numbers = post_op(layer.region.activation if layer.region.add is None else None)
    return lambda x: FUNCTIONS[name](x, *numbers)
