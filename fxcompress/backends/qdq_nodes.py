"""ONNX's operators of quantization as modules, which torch's exporter writes as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def onnx(operator: str, *inputs: Tensor | None, shape: Sequence[int], dtype: torch.dtype, **attributes: Any) -> Tensor:
    """A call of an operator of ONNX that gives one tensor."""
    made: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=shape)
    return made


class Rounded(nn.Module):
    """Floats rounded to integers of 8 bits or fewer, and floats again: with one scale, or one for each index of
    `axis`."""

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None = None) -> None:
        """`scale` and `zero_point` are numbers, or vectors with an `axis`; integers are kept between `low` and `high`,
        and are of int8 where `low` is negative."""
        super().__init__()
        self.axis, self.dtype = axis, torch.int8 if low < 0 else torch.uint8
        whole = torch.iinfo(self.dtype)
        self.clips = (low, high) != (whole.min, whole.max)
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("zero_point", zero_point.to(self.dtype))
        if self.clips:
            self.register_buffer("low", torch.tensor(low, dtype=self.dtype))
            self.register_buffer("high", torch.tensor(high, dtype=self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """float32, of the shape of `x`."""
        axis = {} if self.axis is None else {"axis": self.axis}
        q = onnx("QuantizeLinear", x, self.scale, self.zero_point, shape=x.shape, dtype=self.dtype, **axis)
        if self.clips:
            q = onnx("Clip", q, self.low, self.high, shape=x.shape, dtype=self.dtype)
        return onnx("DequantizeLinear", q, self.scale, self.zero_point, shape=x.shape, dtype=torch.float32, **axis)


class Dequantized(nn.Module):
    """Integers with a scale for each index of `axis`, as floats. Always with zero points: ONNX Runtime's more exact
    mode for CPUs without VNNI fails without."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, integers: Tensor, scale: Tensor, axis: int = 0, zero_point: Tensor | None = None) -> None:
        """Without `zero_point` they are zeros."""
        super().__init__()
        self.axis = axis
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=integers.dtype) if zero_point is None
                             else zero_point)

    def forward(self) -> Tensor:
        """float32, of the shape of the integers."""
        return onnx("DequantizeLinear", self.integers, self.scale, self.zero_point, shape=self.integers.shape,
                    dtype=torch.float32, axis=self.axis)
