"""Which library computes an integer product, and how it is called: oneDNN, or FBGEMM where few numbers are multiplied.

What decides was measured by `benchmarks/integer_kernels.py`: FBGEMM has the least overhead a call, and oneDNN is the
faster one at what is left. Of its convolutions those on quantized dtypes keep what they have set up from call to call;
those on plain bytes do what the others can't: other activations than a ReLU, narrower grids, floats as the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import quantized_dtypes
from .post_ops import FUNCTIONS, named

if TYPE_CHECKING:
    from .integer import After, IntConv2d, IntLinear, Product

FEW_ROWS = 64  # of a matrix, below which FBGEMM multiplies faster
FEW_PRODUCTS = 2e6  # of a convolution, below which FBGEMM's smaller overhead wins
FEW_DEPTHWISE = 2e5  # the same where each filter reads one channel
_TOP = 255  # of uint8
_D = torch.ops.onednn
_conv = getattr(_D, "qconv_pointwise", None) or _D.qconv2d_pointwise
_conv_adding = _D.qconv2d_pointwise.binary


@dataclass(frozen=True)
class Kernel:
    """A product ready to `run` on what it reads and, where the layer adds, on what it adds; `engine` is the library's
    name, `why` says why it is that."""

    engine: str
    why: str
    run: Callable[[Tensor, Tensor | None], Tensor]


def conv2d(layer: IntConv2d, shape: torch.Size) -> Kernel:
    """The kernel of a convolution for images [N, C, H, W]."""
    places = shape[0] * prod(
        (size + 2 * pad - spread * (kernel - 1) - 1) // stride + 1
        for size, pad, spread, kernel, stride in zip(shape[2:], layer.padding, layer.dilation, layer.shape[2:],
                                                     layer.stride, strict=True))
    products = layer.weight.numel() * places
    few, fits = {1: FEW_PRODUCTS, layer.shape[0]: FEW_DEPTHWISE}.get(layer.groups, 0), _pairs_fit(layer)
    if products < few and fits and layer.after.gives is not None and _takes(layer.after):
        why = f"{products / 1e6:.2g} M products are few: less overhead for each call"
        return Kernel("fbgemm", why, _quantized(layer, "conv2d", _filters(layer, "fbgemm"), torch.channels_last))
    why = f"{products / 1e6:.2g} M products: the faster one at many"
    if products < few:
        why = _objection(layer.after) if fits else "FBGEMM's sums would saturate"
    if not _plain(layer.after) or not quantized_dtypes.available("onednn"):
        return Kernel("onednn", why, _pointwise(layer, shape))
    if layer.after.adds is not None:
        return Kernel("onednn", why, _adding_conv2d(layer, shape))
    return Kernel("onednn", why, _quantized(layer, "conv2d", _filters(layer, "onednn"), torch.channels_last))


def linear(layer: IntLinear, shape: torch.Size) -> Kernel:
    """The kernel of a linear layer for rows [..., in]."""
    rows = prod(shape[:-1])
    why = f"{rows} row{'s' * (rows != 1)}: {'the faster one at few' if rows < FEW_ROWS else 'the faster one at many'}"
    if rows < FEW_ROWS and _takes(layer.after):
        packed = quantized_dtypes.pack_linear(layer.weight, layer.weight_scale, layer.bias)
        if layer.after.gives is not None:
            return Kernel("fbgemm", why, _quantized(layer, "linear", packed, torch.contiguous_format))
        reads, relu = (layer.reads.scale, layer.reads.zero_point), layer.after.activation == "relu"
        if layer.after.activation in ("none", "relu"):
            return Kernel("fbgemm", why, lambda q, other: quantized_dtypes.linear_to_floats(
                q.contiguous(), reads, packed, relu))
    packed = _D.qlinear_prepack(layer.weight, shape)
    why = _objection(layer.after) if rows < FEW_ROWS else why
    return Kernel("onednn", why, _onednn(layer, packed, _D.qlinear_pointwise, _D.qlinear_pointwise.binary, ()))


def in_floats(layer: Product, q: Tensor, other: Tensor | None) -> Tensor:
    """What `layer` gives, computed in float32: for products that no kernel computes exactly on this CPU."""
    after, reads = layer.after, layer.reads
    total = layer.summed(q.to(torch.float32) - reads.zero_point)
    shape = (-1, 1, 1) if total.dim() == 4 and layer.weight.dim() == 4 else (-1,)
    total = total * (layer.weight_scale * reads.scale).reshape(shape)
    total = total if layer.bias is None else total + layer.bias.reshape(shape)
    if after.adds is not None:
        assert other is not None
        total = total + (other.to(torch.float32) - after.adds.zero_point) * after.adds.scale
    total = FUNCTIONS[after.activation](total, *after.numbers)
    if after.gives is None:
        return total
    steps = (total * (1.0 / after.gives.scale)).round() + after.gives.zero_point
    return steps.clamp(after.gives.low, after.gives.high).to(torch.uint8)


def traced_conv2d(layer: IntConv2d, q: Tensor, other: Tensor | None) -> Tensor:
    """The convolution in operators that `torch.compile` and `torch.export` follow; freezing packs the weight once."""
    packed = _D.qconv_prepack(layer.weight, layer.weight_scale, layer.reads.scale, layer.reads.zero_point,
                              *layer.settings, _known(q.shape))
    return _traced(layer, packed, _conv, layer.settings, q, other)


def traced_linear(layer: IntLinear, q: Tensor, other: Tensor | None) -> Tensor:
    """The linear layer in operators that `torch.compile` and `torch.export` follow."""
    packed = _D.qlinear_prepack(layer.weight, _known(q.shape))
    return _traced(layer, packed, _D.qlinear_pointwise, (), q, other)


def _traced(layer: Product, packed: Tensor, product: Any, settings: tuple[Any, ...], q: Tensor,
            other: Tensor | None) -> Tensor:
    """What writes into its argument can't be traced: an addition is an operator of its own, which doesn't, and
    `backends/compiled.py` lets it. A program that is exported keeps to operators that every torch has."""
    after, bias = layer.after, layer.bias
    if after.adds is None:
        made: Tensor = _onednn(layer, packed, product, None, settings)(q, None)
        return made
    assert other is not None
    given = (layer.reads.scale, layer.reads.zero_point, packed, layer.weight_scale, layer.weight_zero)
    top = after.gives.high if after.gives is not None else _TOP
    if settings and not torch.compiler.is_exporting():
        made = torch.ops.fxcompress.conv2d_add(q, *given, other, bias, *settings, *_end(after), *_added(after))
        return made if top == _TOP else made.clamp(max=top)
    total = product(q, *given, bias, *settings, 1.0, 0, torch.float32, "none", [], "")
    added = other if other.is_floating_point() else (other.to(torch.float32) - after.adds.zero_point) * after.adds.scale
    total = torch.relu(total + added) if after.activation == "relu" else total + added
    if after.gives is None:
        return total
    made = ((total * (1.0 / after.gives.scale)).round() + after.gives.zero_point).clamp(0, _TOP).to(torch.uint8)
    return made if top == _TOP else made.clamp(max=top)


def _known(shape: torch.Size) -> list[int] | None:
    """The shape to pack weights for; None where it isn't known, or a program is exported, for any that fits."""
    known = not torch.compiler.is_exporting() and all(isinstance(size, int) for size in shape)
    return list(shape) if known else None


def _end(after: After) -> tuple[float, int, torch.dtype]:
    """Scale, zero point and dtype of the result, as oneDNN wants them."""
    return (after.gives.scale, after.gives.zero_point, torch.uint8) if after.gives else (1.0, 0, torch.float32)


def _added(after: After) -> tuple[float, int, str, float, str, list[float], str]:
    """What is added, and how, as oneDNN wants it."""
    assert after.adds is not None
    return after.adds.scale, after.adds.zero_point, "sum", 1.0, after.activation, list(after.numbers), ""


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _takes(after: After) -> bool:
    """Whether FBGEMM can do what follows the product: nothing but bounds, which integers are clamped to."""
    return quantized_dtypes.available("fbgemm") and after.adds is None and after.bounds is not None


def _pairs_fit(layer: IntConv2d) -> bool:
    """Whether no sum of two products saturates 16 bits, where FBGEMM sums so: for filters of one channel it does,
    whatever the CPU has."""
    return layer.groups == 1 or 2 * layer.reads.high * int(layer.weight.abs().max()) < 2**15


def _integers(after: After) -> tuple[int, int] | None:
    """Between what integers the result is kept, both included; None where the activation does more than that."""
    gives, bounds = after.gives, after.bounds
    if gives is None or bounds is None:
        return None
    low, high = (round(bound / gives.scale) + gives.zero_point for bound in bounds)
    return max(low, 0), min(high, _TOP)


def _plain(after: After) -> bool:
    """Whether the sum is rounded to all of a byte, with nothing but a ReLU before that."""
    return after.gives is not None and _integers(after) in ((0, _TOP), (after.gives.zero_point, _TOP))


def _objection(after: After) -> str:
    """Why FBGEMM doesn't compute a product that it would be faster at."""
    if not quantized_dtypes.available("fbgemm"):
        return "this build of torch has no FBGEMM"
    return "it adds a tensor" if after.adds is not None else f"`{after.activation}` is computed in the kernel"


def _filters(layer: IntConv2d, engine: quantized_dtypes.Engine) -> Any:
    """The layer's filters packed for the operators on quantized dtypes."""
    return quantized_dtypes.pack_conv2d(engine, layer.weight, layer.weight_scale, layer.bias,
                                        *map(_listed, layer.settings))


def _quantized(layer: Product, kind: Literal["conv2d", "linear"], packed: Any,
               layout: torch.memory_format) -> Callable[[Tensor, Tensor | None], Tensor]:
    gives, bounds = layer.after.gives, _integers(layer.after)
    assert gives is not None and bounds is not None
    low, high = bounds
    relu = low == gives.zero_point > 0  # at zero_point 0 it is what a byte does anyway
    product = quantized_dtypes.product(kind, packed, (layer.reads.scale, layer.reads.zero_point),
                                       (gives.scale, gives.zero_point), relu, layout)
    if high == _TOP and (relu or low == 0):
        return product
    return lambda q, other: product(q, other).clamp_(low, high)


def _adding_conv2d(layer: IntConv2d, shape: torch.Size) -> Callable[[Tensor, Tensor | None], Tensor]:
    after, gives = layer.after, layer.after.gives
    assert gives is not None and after.adds is not None
    product = quantized_dtypes.adding_conv2d(
        _filters(layer, "onednn"), (layer.reads.scale, layer.reads.zero_point),
        (after.adds.scale, after.adds.zero_point), (gives.scale, gives.zero_point), after.activation == "relu")
    other_way: list[Callable[[Tensor, Tensor | None], Tensor]] = []

    def add(q: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None
        held = other.clone(memory_format=torch.channels_last) if after.copies else other.contiguous(
            memory_format=torch.channels_last)
        made = product(q.contiguous(memory_format=torch.channels_last), held)
        if made is None:  # many threads at once: what they need is packed when they do
            other_way[:] = other_way or [_pointwise(layer, shape)]
            made = other_way[0](q, held)
        return made

    return add


def _pointwise(layer: IntConv2d, shape: torch.Size) -> Callable[[Tensor, Tensor | None], Tensor]:
    """By oneDNN's operator on plain bytes."""
    packed = _D.qconv_prepack(layer.weight, layer.weight_scale, layer.reads.scale, layer.reads.zero_point,
                              *layer.settings, shape)
    return _onednn(layer, packed, _conv, _conv_adding, layer.settings)


def _onednn(layer: Product, packed: Tensor, product: Any, adding: Any,
            settings: tuple[Any, ...]) -> Callable[[Tensor, Tensor | None], Tensor]:
    after, bias = layer.after, layer.bias
    given = (layer.reads.scale, layer.reads.zero_point, packed, layer.weight_scale, layer.weight_zero)
    (scale, zero, dtype), top = _end(after), after.gives.high if after.gives is not None else _TOP
    if after.adds is None:
        dtype, activation, numbers = _activation(after)
        name, algorithm = named(activation)
        last = (scale, zero, dtype, name, list(numbers), algorithm)
        if dtype == torch.int8:
            return lambda q, other: product(q, *given, bias, *settings, *last).view(torch.uint8)
        if activation == "hardtanh" or top == _TOP:
            return lambda q, other: product(q, *given, bias, *settings, *last)
        return lambda q, other: product(q, *given, bias, *settings, *last).clamp_(max=top)
    adds, layout = _added(after), torch.channels_last if settings else torch.contiguous_format

    def add(q: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None
        # What is added may come from layers with parameters; it is written into, as if it lay in `layout`.
        held = other.detach()
        held = held.clone(memory_format=layout) if after.copies else held.contiguous(memory_format=layout)
        made: Tensor = adding(q, *given, held, bias, *settings, scale, zero, dtype, *adds)
        return made if top == _TOP else made.clamp_(max=top)

    return add


def _activation(after: After) -> tuple[torch.dtype, str, tuple[float, ...]]:
    """The dtype that the kernel gives, and the activation with its numbers by which it keeps the bounds of the result:
    the cheapest one. A byte keeps its own; so does int8 behind a ReLU, whose bytes are read as uint8."""
    bounds = _integers(after)
    if after.gives is None or bounds is None or after.bounds is None:
        return _end(after)[2], after.activation, after.numbers
    zero = after.gives.zero_point
    if bounds[1] == _TOP and bounds[0] in (0, zero):
        return torch.uint8, "none" if bounds[0] == 0 else "relu", ()
    if bounds == (0, 127) and zero == 0:
        return torch.int8, "relu", ()
    return torch.uint8, "hardtanh", after.bounds


# `onednn::qconv2d_pointwise.binary` that leaves `other` as it is.
_LIBRARY: Any = torch.library.Library("fxcompress", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "conv2d_add(Tensor q, float q_scale, int q_zero, Tensor weight, Tensor weight_scale, Tensor weight_zero, "
    "Tensor other, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, float scale, "
    "int zero_point, ScalarType dtype, float other_scale, int other_zero, str binary, float alpha, str unary, "
    "Scalar?[] numbers, str algorithm) -> Tensor")
OTHER = 6  # the place of `other` in its arguments


@torch.library.impl(_LIBRARY, "conv2d_add", "CPU")
def _conv2d_add(*values: Any) -> Tensor:
    other = values[OTHER].clone(memory_format=torch.channels_last)
    made: Tensor = _conv_adding(*values[:OTHER], other, *values[OTHER + 1:])
    return made


@torch.library.impl(_LIBRARY, "conv2d_add", "Meta")
def _shape_of_sum(*values: Any) -> Tensor:
    return torch.empty_like(values[OTHER], dtype=values[14], memory_format=torch.channels_last)


def _shape_of_packed(weight: Tensor, *settings: Any) -> Tensor:
    return weight.new_empty(weight.shape)


if not torch._C._dispatch_has_kernel_for_dispatch_key("onednn::qconv_prepack", "Meta"):
    torch.library.register_fake("onednn::qconv_prepack", _shape_of_packed)
