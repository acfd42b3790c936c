"""Shapes of the common operators by arithmetic, on `meta` tensors: what torch's own meta functions give, many times as
fast.

A rule has the parameters of its canonical operator (`ops_table.py`) or a module and its inputs. It gives the result, or
None for a call outside its range, also for one that is wrong: torch then computes it, or says what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .ops_table import TABLE

META = torch.device("meta")
Rule = Callable[..., Any]


def new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous `meta` tensor."""
    return torch.empty(shape, dtype=dtype, device=META)


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A `meta` tensor in new memory, with the shape of `x` and its order of dimensions in memory."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=META)
    return torch.empty_like(x, dtype=dtype, device=META)


def _unary(input: Any, *args: Any, **kwargs: Any) -> Any:
    """Of one floating-point tensor, and of numbers."""
    if not isinstance(input, Tensor) or not input.is_floating_point():
        return None
    if any(isinstance(item, Tensor) for item in (*args, *kwargs.values())):
        return None
    return like(input)


def _binary(input: Any, other: Any) -> Any:
    """Of two floating-point tensors of one dtype, or of one and a number."""
    if not isinstance(input, Tensor):
        input, other = other, input
    if not isinstance(input, Tensor) or not input.is_floating_point():
        return None
    if not isinstance(other, Tensor):
        return like(input) if isinstance(other, int | float) else None
    if input.dtype != other.dtype:
        return None
    if input.shape == other.shape:
        if input.stride() == other.stride():
            return like(input)
    elif input.is_contiguous() and other.is_contiguous():
        shape = broadcast(input.shape, other.shape)
        return None if shape is None else new(shape, input.dtype)
    return None


def _comparison(input: Any, other: Any) -> Any:
    if not isinstance(input, Tensor) or not isinstance(other, int | float) or input.is_complex():
        return None
    return like(input, torch.bool)


def broadcast(one: Sequence[int], two: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that both broadcast to, None where they don't."""
    if len(one) < len(two):
        one, two = two, one
    shape = list(one)
    for place in range(1, len(two) + 1):
        a, b = one[-place], two[-place]
        if a != b:
            if a != 1 and b != 1:
                return None
            shape[-place] = b if a == 1 else a
    return tuple(shape)


def _dropout(input: Any, p: float = 0.5, training: Any = True) -> Any:
    if not isinstance(training, bool):
        return None
    return like(input) if training and p else input


def per_axis(value: Any, axes: int) -> tuple[int, ...] | None:
    """One number for each axis; None for anything else."""
    if type(value) is int:
        return (value,) * axes
    if isinstance(value, tuple | list) and all(type(item) is int for item in value):
        if len(value) == axes:
            return tuple(value)
        if len(value) == 1:
            return tuple(value) * axes
    return None


def conv(
    axes: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:
    """A convolution over `axes` axes, as in the documentation of `torch.nn.Conv2d`."""
    x, w = input.shape, weight.shape
    strides, dilations = per_axis(stride, axes), per_axis(dilation, axes)
    same = padding == "same"
    pads = per_axis(0 if padding == "valid" or same else padding, axes)
    if strides is None or dilations is None or pads is None or not _fit(axes, input, weight, bias, w[0]):
        return None
    if x[1] != w[1] * groups or w[0] % groups or (same and any(step != 1 for step in strides)):
        return None
    sizes = []
    for size, kernel, step, gap, pad in zip(x[2:], w[2:], strides, dilations, pads, strict=True):
        out = size if same else (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        if out < 1 or step < 1 or gap < 1 or pad < 0:
            return None
        sizes.append(out)
    return torch.empty((x[0], w[0], *sizes), dtype=input.dtype, device=META)


def conv_transpose(
    axes: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:
    """A transposed convolution, as in the documentation of `torch.nn.ConvTranspose2d`."""
    x, w = input.shape, weight.shape
    settings = [each for value in (stride, padding, output_padding, dilation) if (each := per_axis(value, axes))]
    if len(settings) < 4 or not _fit(axes, input, weight, bias, w[1] * groups) or x[1] != w[0] or w[0] % groups:
        return None
    sizes = []
    for size, kernel, step, pad, extra, gap in zip(x[2:], w[2:], *settings[:4], strict=True):
        out = (size - 1) * step - 2 * pad + gap * (kernel - 1) + extra + 1
        if out < 1 or step < 1 or gap < 1 or pad < 0 or extra < 0 or extra >= max(step, gap):
            return None
        sizes.append(out)
    return torch.empty((x[0], w[1] * groups, *sizes), dtype=input.dtype, device=META)


def _fit(axes: int, x: Tensor, weight: Tensor, bias: Tensor | None, channels: int) -> bool:
    """Whether a batched input, a weight and a bias of a convolution agree in ranks, dtypes and memory order."""
    return (x.dim() == weight.dim() == axes + 2 and x.dtype == weight.dtype and x.numel() > 0
            and x.is_contiguous() and weight.is_contiguous()
            and (bias is None or (bias.dtype == x.dtype and tuple(bias.shape) == (channels,))))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """`input @ weight.T + bias`, the result contiguous."""
    w = weight.shape
    if len(w) != 2 or not input.dim() or input.shape[-1] != w[1] or input.dtype != weight.dtype:
        return None
    if bias is not None and (tuple(bias.shape) != (w[0],) or bias.dtype != input.dtype):
        return None
    return new((*input.shape[:-1], w[0]), input.dtype) if input.is_contiguous() else None


def _bmm(input: Tensor, mat2: Tensor) -> Any:
    a, b = input.shape, mat2.shape
    if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[2] != b[1] or input.dtype != mat2.dtype:
        return None
    return new((a[0], a[1], b[2]), input.dtype)


def _batchnorm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: Any = False,
    momentum: Any = 0.1, eps: float = 1e-05,
) -> Any:
    return per_channel(input, running_mean, running_var, weight, bias)


def per_channel(input: Tensor, *held: Tensor | None) -> Any:
    """A norm that has one number for each channel in each tensor of `held`."""
    if input.dim() < 2 or not (input.is_contiguous() or _channels_last(input)):
        return None
    if any(tensor is not None and tuple(tensor.shape) != (input.shape[1],) for tensor in held):
        return None
    return like(input)


def _channels_last(x: Tensor) -> bool:
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))


def layernorm(input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-05) -> Any:
    """A norm over the last dimensions (`layer_norm`, `rms_norm`), the result contiguous."""
    shape = tuple(normalized_shape)
    if tuple(input.shape[-len(shape):]) != shape or any(t is not None and tuple(t.shape) != shape
                                                        for t in (weight, bias)):
        return None
    return new(input.shape, input.dtype)


def rmsnorm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    """As `layernorm`."""
    return layernorm(input, normalized_shape, weight)


def groupnorm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-05) -> Any:
    """A norm over groups of channels."""
    if input.dim() < 2 or input.shape[1] % num_groups or not input.is_contiguous():
        return None
    return per_channel(input, weight, bias)


def _softmax(input: Tensor, dim: Any = None, dtype: Any = None) -> Any:
    if dim is None or not input.is_floating_point() or not -input.dim() <= dim < input.dim():
        return None
    return new(input.shape, dtype or input.dtype)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: Any = None, enable_gqa: bool = False,
) -> Any:
    q, k, v = query.shape, key.shape, value.shape
    if len(q) < 3 or len(q) != len(k) or len(q) != len(v) or q[-1] != k[-1] or k[-2] != v[-2]:
        return None
    if q[:-2] != k[:-2] or q[:-2] != v[:-2] or not query.dtype == key.dtype == value.dtype:
        return None
    if attn_mask is not None and broadcast((*q[:-1], k[-2]), attn_mask.shape) != (*q[:-1], k[-2]):
        return None
    return new((*q[:-1], v[-1]), query.dtype)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    rank, size = first.dim(), 0
    if not rank or not -rank <= dim < rank:
        return None
    dim %= rank
    shape = list(first.shape)
    for tensor in tensors:
        if tensor.dim() != rank or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        size += tensor.shape[dim]
        shape[dim] = tensor.shape[dim]
        if tuple(shape) != tuple(tensor.shape):
            return None
    shape[dim] = size
    return new(shape, first.dtype)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if any(t.shape != first.shape or t.dtype != first.dtype or not t.is_contiguous() for t in tensors):
        return None
    if not -first.dim() - 1 <= dim <= first.dim():
        return None
    shape = list(first.shape)
    shape.insert(dim % (first.dim() + 1), len(tensors))
    return new(shape, first.dtype)


def _reduced(input: Tensor, dim: Any = None, keepdim: Any = False, dtype: Any = None) -> Any:
    if not input.is_floating_point() or dtype is not None or not input.is_contiguous():
        return None
    rank = input.dim()
    dims = range(rank) if dim is None or dim == () else (dim,) if isinstance(dim, int) else dim
    if any(not -rank <= item < rank for item in dims):
        return None
    gone = {item % rank for item in dims}
    if len(gone) != len(dims):
        return None
    sizes = [1 if place in gone else size for place, size in enumerate(input.shape) if keepdim or place not in gone]
    return new(sizes, input.dtype)


def _adaptive(axes: int) -> Rule:
    def rule(input: Tensor, output_size: Any) -> Any:
        sizes = per_axis(output_size, axes)
        if sizes is None or input.dim() != axes + 2 or not input.is_floating_point() or min(sizes) < 1:
            return None
        if not input.is_contiguous() or 0 in input.shape:
            return None
        return new((*input.shape[:2], *sizes), input.dtype)

    return rule


def _interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None,
    recompute_scale_factor: Any = None, antialias: bool = False,
) -> Any:
    axes = input.dim() - 2
    fits = {"nearest": axes in (1, 2, 3), "bilinear": axes == 2, "bicubic": axes == 2, "linear": axes == 1,
            "trilinear": axes == 3}
    if not fits.get(mode, False) or antialias or not input.is_contiguous() or not input.is_floating_point():
        return None
    sizes = per_axis(size, axes)
    if size is None and isinstance(scale_factor, int | float) and scale_factor > 0:
        sizes = tuple(math.floor(float(n * scale_factor)) for n in input.shape[2:])
    if sizes is None or min(sizes) < 1 or 0 in input.shape or (align_corners is not None and mode == "nearest"):
        return None
    return new((*input.shape[:2], *sizes), input.dtype)


def _masked_fill(input: Tensor, mask: Tensor, value: Any) -> Any:
    same = mask.dtype == torch.bool and broadcast(input.shape, mask.shape) == tuple(input.shape)
    return new(input.shape, input.dtype) if same and not isinstance(value, Tensor) and input.is_contiguous() else None


def _roll(input: Tensor, shifts: Any, dims: Any = None) -> Any:
    rank, dims = input.dim(), (dims,) if isinstance(dims, int) else dims
    whole = isinstance(shifts, int) or all(isinstance(item, int) for item in shifts)
    count = 1 if isinstance(shifts, int) else len(shifts)
    if dims is None or not whole or len(dims) != count or any(not -rank <= item < rank for item in dims):
        return None
    return like(input) if input.is_contiguous() else None


_UNARY = ("relu relu6 silu hardswish hardsigmoid mish selu softsign tanhshrink gelu leaky_relu elu celu "
          "hardtanh softplus softshrink hardshrink threshold exp log sqrt rsqrt reciprocal sin cos tanh sigmoid erf "
          "square abs neg floor ceil trunc clamp").split()
_BINARY = "add sub mul div maximum minimum pow".split()
_NAMED: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _unary), **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys("eq ne lt le gt ge".split(), _comparison),
    **{f"conv{n}d": partial(conv, n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": partial(conv_transpose, n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": _adaptive(n) for n in (1, 2, 3)},
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduced), **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    "dropout": _dropout, "linear": linear, "bmm": _bmm, "batchnorm": _batchnorm, "layernorm": layernorm,
    "rmsnorm": rmsnorm, "groupnorm": groupnorm, "scaled_dot_product_attention": _attention, "cat": _cat,
    "stack": _stack, "interpolate": _interpolate, "masked_fill": _masked_fill, "roll": _roll,
}
RULES: Mapping[Callable[..., Any], Rule] = {op.target: _NAMED[op.name] for op in TABLE if op.name in _NAMED}
