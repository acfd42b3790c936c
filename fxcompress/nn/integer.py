"""Layers that compute in integers on the CPU, on plain uint8 and int8 tensors.

The products are oneDNN's: u8 activations times s8 weights, summed in 32 bits, the scale, bias, addition and activation
applied to the sum, and rounded to u8 (or left in float). Weights are kept as int8 and packed at the first call: what is
packed can neither be copied nor saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Grid:
    """What an integer of a tensor stands for: (q − zero_point)·scale."""

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255


def saturates() -> bool:
    """Whether products of u8 and s8 saturate 16 bits on this CPU: where it has no VNNI instructions activations must
    stay within 7 bits."""
    return not torch.cpu._is_vnni_supported()  # type: ignore[no-untyped-call]


class ToInteger(nn.Module):
    """Floats to uint8, by `grid`."""

    fxc_kind: ClassVar[str] = "to_integer"

    def __init__(self, grid: Grid) -> None:
        """Rounds to `grid`."""
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """uint8, of the shape of `x`; images in channels-last order, which the products want."""
        grid = self.grid
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        q = (x * (1.0 / torch.tensor(grid.scale))).round_().add_(grid.zero_point).clamp_(grid.low, grid.high)
        return q.to(torch.uint8, memory_format=layout)

    def extra_repr(self) -> str:
        """The grid."""
        return f"scale={self.grid.scale:.4g}, zero_point={self.grid.zero_point}"


class ToFloat(nn.Module):
    """uint8 to float32, by `grid`."""

    fxc_kind: ClassVar[str] = "to_float"

    def __init__(self, grid: Grid) -> None:
        """Reads integers of `grid`."""
        super().__init__()
        self.grid = grid

    def forward(self, q: Tensor) -> Tensor:
        """float32, of the shape of `q`."""
        return q.to(torch.float32).sub_(self.grid.zero_point).mul_(self.grid.scale)

    def extra_repr(self) -> str:
        """The grid."""
        return f"scale={self.grid.scale:.4g}, zero_point={self.grid.zero_point}"


class MaxPool2d(nn.Module):
    """The maximum over windows of uint8 images; `F.max_pool2d` refuses large ones."""

    fxc_kind: ClassVar[str] = "int_max_pool2d"

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], ceil_mode: bool) -> None:
        """The settings of `torch.nn.MaxPool2d`, each of two numbers."""
        super().__init__()
        self.settings = (list(kernel_size), list(stride), list(padding), list(dilation), ceil_mode)

    def forward(self, q: Tensor) -> Tensor:
        """uint8 [N, C, H', W']."""
        if _is_fake(q):
            return nn.functional.max_pool2d(q.to(torch.float32), *self.settings).to(torch.uint8)
        return torch.ops.quantized.max_pool2d(q, *self.settings)


@dataclass(frozen=True)
class After:
    """What a product does with its sum: adds a tensor on the grid `adds`, then applies `activation` (oneDNN's name, with
    its numbers), then rounds to `gives`, or gives floats where that is None."""

    gives: Grid | None
    adds: Grid | None = None
    activation: str = "none"
    numbers: tuple[float, ...] = ()


class _Product(nn.Module):
    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, reads: Grid, after: After) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero", torch.zeros(len(weight_scale), dtype=torch.int64), persistent=False)
        self.register_buffer("bias", bias)
        self.reads, self.after = reads, after
        self._packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def _gives(self) -> tuple[float, int, torch.dtype | None]:
        gives = self.after.gives
        return (gives.scale, gives.zero_point, None) if gives is not None else (1.0, 0, torch.float32)

    def _adds(self) -> tuple[float, int]:
        adds = self.after.adds
        return (adds.scale, adds.zero_point) if adds is not None else (1.0, 0)

    def extra_repr(self) -> str:
        """The weight's shape and what follows the product."""
        steps = ["add"] * (self.after.adds is not None) + [self.after.activation] * (self.after.activation != "none")
        return ", ".join([str(tuple(self.weight.shape)), *steps, "u8" if self.after.gives else "f32"])


class Conv2d(_Product):
    """A convolution of uint8 images [N, C, H, W] with int8 filters; gives uint8 or float32."""

    fxc_kind: ClassVar[str] = "int_conv2d"

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, reads: Grid, after: After,
                 stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
        """`weight` is int8 [out, in / groups, kH, kW], `weight_scale` float [out], `bias` float [out]."""
        super().__init__(weight, weight_scale, bias, reads, after)
        self.settings = (list(stride), list(padding), list(dilation), groups)

    def forward(self, q: Tensor, other: Tensor | None = None) -> Tensor:
        """The product; with `after.adds`, `other` (uint8, of the result's shape) is added to it."""
        if _is_fake(q):
            return _like_floats(nn.functional.conv2d(q.float(), self.weight.float(), None, *self.settings), self.after)
        reads, after = self.reads, self.after
        if self._packed is None:
            self._packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.weight_scale, reads.scale, reads.zero_point, *self.settings, list(q.shape))
        scale, zero, dtype = self._gives()
        given = (q, reads.scale, reads.zero_point, self._packed, self.weight_scale, self.weight_zero)
        if other is None:
            return torch.ops.onednn.qconv2d_pointwise(*given, self.bias, *self.settings, scale, zero, dtype,
                                                      after.activation, list(after.numbers), "")
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *given, other, self.bias, *self.settings, scale, zero, dtype, *self._adds(), "sum", 1.0,
            after.activation, list(after.numbers), "")


class Linear(_Product):
    """A linear layer on uint8 rows [..., in] with int8 weights; gives uint8 or float32 [..., out]."""

    fxc_kind: ClassVar[str] = "int_linear"

    def forward(self, q: Tensor, other: Tensor | None = None) -> Tensor:
        """The product; with `after.adds`, `other` (uint8, of the result's shape) is added to it."""
        if _is_fake(q):
            return _like_floats(nn.functional.linear(q.float(), self.weight.float()), self.after)
        reads, after = self.reads, self.after
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.weight, list(q.shape))
        scale, zero, dtype = self._gives()
        given = (q, reads.scale, reads.zero_point, self._packed, self.weight_scale, self.weight_zero)
        if other is None:
            return torch.ops.onednn.qlinear_pointwise(*given, self.bias, scale, zero, dtype or torch.uint8,
                                                      after.activation, list(after.numbers), "")
        return torch.ops.onednn.qlinear_pointwise.binary(
            *given, other, self.bias, scale, zero, dtype or torch.uint8, *self._adds(), "sum", 1.0, after.activation,
            list(after.numbers), "")


def _is_fake(q: Tensor) -> bool:
    """Whether only the shape is asked for."""
    return q.device.type == "meta" or isinstance(q, FakeTensor)


def _like_floats(value: Tensor, after: After) -> Tensor:
    return value if after.gives is None else value.to(torch.uint8)
