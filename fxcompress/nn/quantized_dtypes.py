"""The one adapter to the operators on torch's quantized dtypes.

Outside of this file integers are plain uint8 tensors: here they get a quantized tensor's head on the same memory, and
lose it again. These operators run by FBGEMM, which has the least overhead for each call and multiplies few rows by a
matrix much faster, or by oneDNN, which adds to large images faster here than on plain bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

Engine = Literal["fbgemm", "onednn"]
_Q = torch.ops.quantized
_SETTING = Lock()  # of torch's quantized engine, which all threads share
_HEAD = "_fxc_head"  # the attribute of bytes that has their quantized tensor


@cache
def available(engine: Engine) -> bool:
    """Whether this build of torch has the engine, and the quantized dtypes, which torch means to take away: it says so
    once, and that is heard here."""
    if engine not in torch.backends.quantized.supported_engines:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch._empty_affine_quantized([0], scale=1.0, zero_point=0, dtype=torch.quint8)
        torch._make_per_channel_quantized_tensor(torch.zeros(1, dtype=torch.int8), torch.ones(1).double(),
                                                 torch.zeros(1, dtype=torch.int64), 0)
    return True


def as_quantized(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor on the memory of `q` (uint8): the one that it was the bytes of, if that has this grid."""
    kept = q.__dict__.get(_HEAD)
    if kept is not None and kept[0] == scale and kept[1] == zero_point:
        found: Tensor = kept[2]
        return found
    head = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=torch.quint8)
    return head.set_(q.untyped_storage(), q.storage_offset(), q.shape, q.stride())


def as_bytes(quantized: Tensor, scale: float, zero_point: int) -> Tensor:
    """The integers of a quantized tensor of this grid, uint8, on its memory. They remember it: making a head for the
    next operator takes as long as a small product."""
    made = torch.empty(0, dtype=torch.uint8).set_(
        quantized.untyped_storage(), quantized.storage_offset(), quantized.shape, quantized.stride())
    made.__dict__[_HEAD] = scale, zero_point, quantized
    return made


def to_bytes(x: Tensor, scale: float, zero_point: int, layout: torch.memory_format) -> Tensor:
    """Floats to uint8 (round(x / scale) + zero_point, saturated) in one pass over the memory, and then to `layout`:
    there are fewer bytes to move than floats."""
    made = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8).contiguous(memory_format=layout)
    return as_bytes(made, scale, zero_point)


def to_floats(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """(q − zero_point) · scale in float32, in one pass."""
    return as_quantized(q, scale, zero_point).dequantize()


def pack_linear(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """Weights of a linear layer, int8 [out, in] with `scale` [out], for `linear` and `linear_to_floats`."""
    with _engine("fbgemm"):
        return _Q.linear_prepack(_weight(weight, scale), bias)


def pack_conv2d(engine: Engine, weight: Tensor, scale: Tensor, bias: Tensor | None, stride: list[int],
                padding: list[int], dilation: list[int], groups: int) -> Any:
    """Filters, int8 [out, in / groups, kH, kW] with `scale` [out], for `conv2d` on that engine."""
    with _engine(engine):
        return _Q.conv2d_prepack(_weight(weight, scale), bias, stride, padding, dilation, groups)


def product(kind: Literal["conv2d", "linear"], packed: Any, reads: tuple[float, int], gives: tuple[float, int],
            relu: bool, layout: torch.memory_format) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What computes uint8 from uint8, of the grids `reads` and `gives` (scale, zero_point), in `layout`. Its second
    argument isn't read. (It is written in one piece: calls in Python take a tenth of what a small layer does.)"""
    op = getattr(_Q, f"{kind}_relu" if relu else kind)
    (scale, zero), (given_scale, given_zero) = reads, gives

    def run(q: Tensor, other: Tensor | None) -> Tensor:
        kept = q.__dict__.get(_HEAD)
        if kept is not None and kept[0] == scale and kept[1] == zero:
            head = kept[2]
        else:
            head = as_quantized(q.contiguous(memory_format=layout), scale, zero)
        made = op(head, packed, given_scale, given_zero)
        given = torch.empty(0, dtype=torch.uint8).set_(
            made.untyped_storage(), made.storage_offset(), made.shape, made.stride())
        given.__dict__[_HEAD] = given_scale, given_zero, made
        return given

    return run


def linear_to_floats(q: Tensor, reads: tuple[float, int], packed: Any, relu: bool) -> Tensor:
    """uint8 [..., in] to float32 [..., out]. FBGEMM's operator reads floats: what it rounds again is on the grid, and
    comes out the same."""
    name = "linear_with_input_q_dq_qweight_dq"
    run = getattr(_Q, f"{name}_relu_output_fp32" if relu else f"{name}_output_fp32")
    found: Tensor = run(to_floats(q, *reads), *reads, packed)
    return found


def adding_conv2d(packed: Any, reads: tuple[float, int], adds: tuple[float, int], gives: tuple[float, int],
                  relu: bool) -> Callable[[Tensor, Tensor], Tensor | None]:
    """The same for a convolution packed for oneDNN, with its second argument added before the sum is rounded: the
    result takes the memory of that. None, and nothing done, where another thread has a hand on torch's setting of the
    engine, which this operator asks for at every call."""
    op, onednn = _Q.conv2d_add_relu if relu else _Q.conv2d_add, torch.backends.quantized._get_qengine_id("onednn")

    def run(q: Tensor, other: Tensor) -> Tensor | None:
        heads = as_quantized(q, *reads), as_quantized(other, *adds)
        if not _SETTING.acquire(blocking=False):
            return None
        was = torch._C._get_qengine()
        try:
            torch._C._set_qengine(onednn)
            made = op(*heads, packed, *gives)
        finally:
            torch._C._set_qengine(was)
            _SETTING.release()
        return as_bytes(made, *gives)

    return run


def _weight(weight: Tensor, scale: Tensor) -> Tensor:
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zeros, 0)


@contextmanager
def _engine(engine: Engine) -> Iterator[None]:
    """Packing asks torch's setting which engine to pack for."""
    with _SETTING:
        was = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = was
