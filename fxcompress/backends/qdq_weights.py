"""Layers on floats with integer weights, for ONNX: what `nn/dynamic.py` and `nn/weight_only.py` compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import nn as layers
from ..nn.dynamic import parameters_of
from .qdq_nodes import Dequantized, onnx


class DynamicLinear(nn.Module):
    """The same arithmetic as `nn.DynamicLinear`; the sums of products are MatMulInteger's."""

    def __init__(self, kernel: layers.DynamicLinear) -> None:
        """Takes the weights of `kernel`."""
        super().__init__()
        self.scheme, self.per_token, self.width = kernel.scheme, kernel.per_token, kernel.shape[1]
        self.sizes = [part.shape[1] for part in torch.split(kernel.weight, kernel.group or self.width, 1)]
        self.bias = kernel.bias
        self.register_buffer("integers", kernel.weight.detach().t().contiguous())
        self.register_buffer("scale", kernel.weight_scale.t().contiguous())
        parts = torch.split(self.integers.int(), self.sizes)
        sums = [part.sum(0).float() * scale for part, scale in zip(parts, self.scale, strict=True)]
        self.register_buffer("sums", torch.stack(sums).sum(0))

    integers: Tensor
    scale: Tensor
    sums: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., out]."""
        rows = x.reshape(-1, self.width)
        scale, zero = parameters_of(rows if self.per_token else x.reshape(1, -1), self.scheme, per_token=True)
        counted = (zero + rows * scale.reciprocal()).round().clamp(self.scheme.low, self.scheme.high).to(torch.uint8)
        made = -zero * self.sums
        for part, weight, each in zip(torch.split(counted, self.sizes, 1), torch.split(self.integers, self.sizes),
                                      self.scale, strict=True):
            total = onnx("MatMulInteger", part, weight, shape=(rows.shape[0], weight.shape[1]), dtype=torch.int32)
            made = made + total.to(torch.float32) * each
        made = made * scale
        made = made if self.bias is None else made + self.bias
        return made.reshape(*x.shape[:-1], made.shape[1])


class _Weights(nn.Module):
    """The weight of a layer of `nn/weight_only.py` behind a DequantizeLinear, integers of few bits in a byte each; with
    groups one scale for each row of [out · groups, group]."""

    def __init__(self, kernel: layers.WeightOnlyLinear | layers.WeightOnlyConv2d) -> None:
        super().__init__()
        self.shape, self.inputs, group = kernel.shape, kernel.inputs, kernel.group or kernel.inputs
        integers = F.pad(kernel.integers().detach(), (0, -self.inputs % group)).reshape(-1, group)
        zero = None if kernel.weight_zero is None else kernel.weight_zero.flatten()
        if len(integers) == self.shape[0]:
            integers = integers.reshape(self.shape)
        self.stored = Dequantized(integers, kernel.weight_scale.flatten(), 0, zero)

    def forward(self) -> Tensor:
        """Floats of the weight's shape."""
        made = self.stored()
        if made.shape == self.shape:
            return made  # type: ignore[no-any-return]
        return made.reshape(self.shape[0], -1)[:, : self.inputs].reshape(self.shape)  # type: ignore[no-any-return]


class WeightLinear(nn.Module):
    """`nn.WeightOnlyLinear`."""

    def __init__(self, kernel: layers.WeightOnlyLinear) -> None:
        """Takes the weights of `kernel`."""
        super().__init__()
        self.weight, self.bias = _Weights(kernel), kernel.bias

    def forward(self, x: Tensor) -> Tensor:
        """Floats [..., out]."""
        return F.linear(x, self.weight(), self.bias)


class WeightConv2d(nn.Module):
    """`nn.WeightOnlyConv2d`."""

    def __init__(self, kernel: layers.WeightOnlyConv2d) -> None:
        """Takes the weights of `kernel`."""
        super().__init__()
        self.weight, self.bias = _Weights(kernel), kernel.bias
        self.settings: Any = (kernel.stride, kernel.padding, kernel.dilation, kernel.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Floats [N, out, H', W']."""
        return F.conv2d(x, self.weight(), self.bias, *self.settings)


class WeightEmbedding(nn.Module):
    """`nn.WeightOnlyEmbedding`: rows are looked up as integers."""

    integers: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, kernel: layers.WeightOnlyEmbedding) -> None:
        """Takes the vectors of `kernel`."""
        super().__init__()
        self.group, self.inputs = kernel.group or kernel.inputs, kernel.inputs
        self.register_buffer("integers", kernel.integers().detach())
        self.register_buffer("scale", kernel.weight_scale)
        self.register_buffer("zero", kernel.weight_zero)

    def forward(self, x: Tensor) -> Tensor:
        """Indices of any shape to floats [..., size]."""
        found = F.embedding(x, self.integers).to(torch.float32)
        if self.zero is not None:
            found = found - self._spread(F.embedding(x, self.zero).to(torch.float32))
        return found * self._spread(F.embedding(x, self.scale))

    def _spread(self, each: Tensor) -> Tensor:
        """What belongs to the groups of a row, [..., groups], to the places in it."""
        return each if each.shape[-1] == 1 else each.repeat_interleave(self.group, -1)[..., : self.inputs]
