"""Affine quantization: real numbers to small integers and back, x ≈ (q − zero_point) · scale.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
section 2.1. Integers are plain tensors (uint8, int8, int32), never torch's quantized dtypes, which are deprecated; the
numbers are those of `torch.quantize_per_tensor` and `torch.quantize_per_channel`, bit for bit, except where torch's
overflow (|x / scale| of 2³¹ and more): there these saturate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_EXACT = 2**24  # up to which float32 holds every integer
IntName = Literal["quint8", "qint8", "qint32"]


@dataclass(frozen=True)
class IntType:
    """The integers from `low` to `high`, held in tensors of the dtype `storage`."""

    low: int
    high: int
    storage: torch.dtype


INT_TYPES: Mapping[str, IntType] = {
    "quint8": IntType(0, 255, torch.uint8),
    "qint8": IntType(-128, 127, torch.int8),
    "qint32": IntType(-(2**31), 2**31 - 1, torch.int32),
}


def int_type(dtype: str | torch.dtype) -> IntType:
    """The integers named `quint8`, `qint8` or `qint32`, by text or by torch's dtype of that name. Raises ValueError."""
    name = str(dtype).removeprefix("torch.")
    if name not in INT_TYPES:
        raise ValueError(f"no quantized type {name!r}; there are {', '.join(INT_TYPES)}")
    return INT_TYPES[name]


def quantize_tensor(x: Tensor, scale: Tensor | float, zero_point: Tensor | int, dtype: IntName | torch.dtype,
                    axis: int | None = None) -> Tensor:
    """round(x / scale) + zero_point, saturated: a uint8, int8 or int32 tensor of the shape of `x`.

    `scale` and `zero_point` are single numbers, or with `axis` vectors of one number an index of that dimension. Halves
    round to even. Raises ValueError for parameters that don't fit `x`, a scale that isn't a finite number above zero, a
    zero point outside of the type, and an `x` that holds NaN.
    """
    kind = int_type(dtype)
    scale, zero_point = _parameters(x, scale, zero_point, axis)
    if not bool((zero_point >= kind.low).all() and (zero_point <= kind.high).all()):
        raise ValueError(f"the zero point must lie between {kind.low} and {kind.high}")
    if x.isnan().any():
        raise ValueError("a NaN has no integer")
    return quantize(x, scale, zero_point, kind.low, kind.high, kind.storage)


def dequantize(q: Tensor, scale: Tensor | float, zero_point: Tensor | int, axis: int | None = None) -> Tensor:
    """(q − zero_point) · scale in float32, of the shape of `q`; the parameters as in `quantize_tensor`. Raises
    ValueError."""
    if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise ValueError(f"a tensor of integers was expected, not of {q.dtype}")
    scale, zero_point = _parameters(q, scale, zero_point, axis)
    return (q.to(torch.int64) - zero_point).to(torch.float32) * scale


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int,
             storage: torch.dtype = torch.int64) -> Tensor:
    """The same without checks, for any range of integers up to 32 bits: parameters broadcast against `x`. The
    reciprocal of the scale is taken first and in float32, as torch's kernels do; it decides halves."""
    shifted = (x.detach().to(torch.float32) * (1.0 / scale)).round_().add_(zero_point.to(torch.float32))
    if max(-low, high) > _EXACT:
        shifted = shifted.to(torch.float64)
    return shifted.clamp_(low, high).to(storage)


def _parameters(x: Tensor, scale: Tensor | float, zero_point: Tensor | int,
                axis: int | None) -> tuple[Tensor, Tensor]:
    """Both as tensors that broadcast against `x`: float32 and int64."""
    scales = torch.as_tensor(scale, device=x.device).to(torch.float32)
    zeros = torch.as_tensor(zero_point, device=x.device).to(torch.int64)
    if not bool((scales > 0).all() and scales.isfinite().all()):
        raise ValueError("the scale must be a finite number above zero (in float32)")
    if axis is None:
        if scales.numel() != 1 or zeros.numel() != 1:
            raise ValueError("without `axis`, scale and zero point are single numbers")
        return scales.reshape(()), zeros.reshape(())
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis {axis} is not a dimension of a tensor of {x.dim()}")
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    if scales.numel() not in (1, shape[axis]) or zeros.numel() not in (1, shape[axis]):
        raise ValueError(f"along dimension {axis} there are {shape[axis]} indices, but {scales.numel()} scales and "
                         f"{zeros.numel()} zero points")
    return (scales.expand(shape[axis]).reshape(shape), zeros.expand(shape[axis]).reshape(shape))
