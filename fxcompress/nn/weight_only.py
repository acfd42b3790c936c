"""Layers whose weights are held as integers and multiplied as floats.

Weights of up to 4 bits lie two in a byte. They are expanded to floats at the first call and kept for the next ones, so
that a layer is as fast as before: of torch's operators that multiply packed weights on the CPU,
`_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm` give the right float32 results in 4 to 50 times the time of
`F.linear` (AVX2, 1 to 128 rows), and expanding at each call takes 1.2 to 30 times as long. What is saved is the file,
and the memory until the first call; an embedding expands only the rows that it reads, each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .held import HeldTensor
from .quantizer import groups_of, in_groups

PACKED_BITS = 4  # integers up to this many bits lie two in a byte


def pack(integers: Tensor) -> Tensor:
    """Integers from -8 to 7, [out, n], as uint8 [out, (n + 1) // 2]: the first of a pair in the lower half."""
    pairs = F.pad(integers.to(torch.int16), (0, integers.shape[1] % 2)).reshape(len(integers), -1, 2) & 15
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The integers [out, `count`] of `pack`, as int8."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :count].to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs)


class _WeightOnly(nn.Module):
    """Base of the layers. `weight` is int8 [out, inputs], or uint8 as `pack` makes it; `weight_scale` [out, groups];
    `weight_zero` int8 [out, groups] where the integers aren't symmetric; `bias` [out]."""

    fxc_frozen: ClassVar[bool] = True  # its parameters are constants, whatever they were before
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor
    weight_zero: Tensor | None

    def __init__(self, shape: Sequence[int], has_bias: bool, bits: int, group: int, symmetric: bool) -> None:
        """`shape` is that of the float weight; `group` the weights of an output that share a scale, 0 for all."""
        super().__init__()
        self.shape, self.has_bias, self.bits = tuple(shape), has_bias, bits
        self.group, self.symmetric = group, symmetric
        rows, self.inputs = self.shape[0], torch.Size(self.shape[1:]).numel()
        dtype, width = (torch.uint8, (self.inputs + 1) // 2) if bits <= PACKED_BITS else (torch.int8, self.inputs)
        groups = groups_of(self.inputs, group)
        self.weight = nn.Parameter(torch.zeros(rows, width, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(rows), requires_grad=False) if has_bias else None
        self.register_buffer("weight_scale", torch.ones(rows, groups))
        self.register_buffer("weight_zero", None if symmetric else torch.zeros(rows, groups, dtype=torch.int8))
        self._expanded = HeldTensor()

    def fill(self, integers: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> None:
        """Set the weights: integers of `shape` in `bits` bits, float [out, groups], integers [out, groups], float
        [out]."""
        rows = integers.flatten(1)
        held = pack(rows) if self.bits <= PACKED_BITS else rows.to(torch.int8)
        self.weight = nn.Parameter(held, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight_scale, self._expanded = scale, HeldTensor()
        self.weight_zero = None if self.symmetric else zero.to(torch.int8)

    def integers(self) -> Tensor:
        """The weights as int8 [out, inputs]."""
        return unpack(self.weight, self.inputs) if self.bits <= PACKED_BITS else self.weight

    def floats(self) -> Tensor:
        """The weight in the dtype of its scales, of `shape`."""
        return self._scaled(self.integers(), self.weight_scale, self.weight_zero).reshape(self.shape)

    def _scaled(self, integers: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """(q - zero) · scale, [rows, inputs]."""
        group = self.group or self.inputs
        grouped = in_groups(integers, group).to(scale.dtype)
        if zero is not None:
            grouped = grouped - zero[..., None]
        return (grouped * scale[..., None]).flatten(1)[:, : self.inputs]

    def _dense(self) -> Tensor:
        """The weight, expanded once."""
        if torch.compiler.is_compiling() or self.weight.device.type == "meta":
            return self.floats()
        kept = self._expanded.tensor
        if kept is None or kept.device != self.weight.device:
            with torch.no_grad():
                kept = self._expanded.tensor = self.floats()
        return kept

    def extra_repr(self) -> str:
        """The weight's shape, bits and group."""
        return f"{self.shape}, int{self.bits}" + (f", group={self.group}" if self.group else "")


class WeightOnlyLinear(_WeightOnly):
    """A linear layer on floats [..., in] with a weight of integers [out, in]."""

    fxc_kind: ClassVar[str] = "weight_only_linear"

    def forward(self, x: Tensor) -> Tensor:
        """Floats [..., out]."""
        return F.linear(x, self._dense(), self.bias)


class WeightOnlyConv2d(_WeightOnly):
    """A convolution of float images [N, C, H, W] with filters of integers [out, in / groups, kH, kW]."""

    fxc_kind: ClassVar[str] = "weight_only_conv2d"

    def __init__(self, shape: Sequence[int], has_bias: bool, bits: int, group: int, symmetric: bool,
                 stride: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> None:
        """The settings of `torch.nn.Conv2d`, of two numbers (or a padding's name); `group` is that of scales."""
        super().__init__(shape, has_bias, bits, group, symmetric)
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups
        self.padding = padding if isinstance(padding, str) else tuple(padding)

    def forward(self, x: Tensor) -> Tensor:
        """Floats [N, out, H', W']."""
        return F.conv2d(x, self._dense(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class WeightOnlyEmbedding(_WeightOnly):
    """An embedding whose vectors are integers [count, size]; only those that are looked up become floats."""

    fxc_kind: ClassVar[str] = "weight_only_embedding"

    def forward(self, x: Tensor) -> Tensor:
        """Indices of any shape to floats [..., size]."""
        rows = x.flatten()
        held = F.embedding(rows, self.weight) if x.device.type == "meta" else self.weight[rows]
        integers = unpack(held, self.inputs) if self.bits <= PACKED_BITS else held
        zero = None if self.weight_zero is None else self.weight_zero[rows]
        return self._scaled(integers, self.weight_scale[rows], zero).reshape(*x.shape, self.inputs)
