"""Which library computes an integer product, and how it is called: oneDNN, or FBGEMM where few numbers are multiplied.

What decides was measured by `benchmarks/integer_kernels.py`: oneDNN takes 65 to 100 µs a call whatever it computes,
FBGEMM half of that, and oneDNN is the faster one at what is left (one core, AVX2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import fbgemm

if TYPE_CHECKING:
    from .integer import After, IntConv2d, IntLinear, Product

FEW_ROWS = 64  # of a matrix, below which FBGEMM multiplies faster
FEW_PRODUCTS = 2e6  # of a convolution, below which FBGEMM's smaller overhead wins
FEW_DEPTHWISE = 3e5  # the same where each filter reads one channel
_TOP = 255  # of uint8
_D = torch.ops.onednn
_conv = getattr(_D, "qconv_pointwise", None) or _D.qconv2d_pointwise
_conv_adding = _D.qconv2d_pointwise.binary


@dataclass(frozen=True)
class Kernel:
    """A product ready to run on what it reads and adds; `engine` is the library's name, `why` says why it is that."""

    engine: str
    why: str
    run: Callable[[Tensor, Tensor | None], Tensor]

    def __call__(self, q: Tensor, other: Tensor | None) -> Tensor:
        """The product of `q`, `other` added where the layer adds."""
        return self.run(q, other)


def conv2d(layer: IntConv2d, shape: torch.Size) -> Kernel:
    """The kernel of a convolution for images [N, C, H, W]."""
    products = layer.weight.numel() * shape[0] * prod(
        (size + 2 * pad - spread * (kernel - 1) - 1) // stride + 1
        for size, pad, spread, kernel, stride in zip(shape[2:], layer.padding, layer.dilation, layer.shape[2:],
                                                     layer.stride, strict=True))
    few = {1: FEW_PRODUCTS, layer.shape[0]: FEW_DEPTHWISE}.get(layer.groups, 0)
    if products < few and layer.after.gives is not None and _takes(layer.after):
        packed = fbgemm.pack_conv2d(layer.weight, layer.weight_scale, layer.bias, *map(_listed, layer.settings))
        why = f"{products / 1e6:.2g} M products are few: less overhead for each call"
        return Kernel("fbgemm", why, _fbgemm(layer, packed, fbgemm.conv2d, torch.channels_last))
    packed = _D.qconv_prepack(layer.weight, layer.weight_scale, layer.reads.scale, layer.reads.zero_point,
                              *layer.settings, shape)
    why = _objection(layer.after) if products < few else f"{products / 1e6:.2g} M products: the faster one at many"
    return Kernel("onednn", why, _onednn(layer, packed, _conv, _conv_adding, layer.settings))


def linear(layer: IntLinear, shape: torch.Size) -> Kernel:
    """The kernel of a linear layer for rows [..., in]."""
    rows = prod(shape[:-1])
    why = f"{rows} row{'s' * (rows != 1)}: {'the faster one at few' if rows < FEW_ROWS else 'the faster one at many'}"
    if rows < FEW_ROWS and _takes(layer.after):
        packed = fbgemm.pack_linear(layer.weight, layer.weight_scale, layer.bias)
        if layer.after.gives is not None:
            return Kernel("fbgemm", why, _fbgemm(layer, packed, fbgemm.linear, torch.contiguous_format))
        reads, relu = (layer.reads.scale, layer.reads.zero_point), layer.after.activation == "relu"
        if layer.after.activation in ("none", "relu"):
            return Kernel("fbgemm", why, lambda q, other: fbgemm.linear_to_floats(q.contiguous(), reads, packed, relu))
    packed = _D.qlinear_prepack(layer.weight, shape)
    why = _objection(layer.after) if rows < FEW_ROWS else why
    return Kernel("onednn", why, _onednn(layer, packed, _D.qlinear_pointwise, _D.qlinear_pointwise.binary, ()))


def traced_conv2d(layer: IntConv2d, q: Tensor, other: Tensor | None) -> Tensor:
    """The convolution in operators that `torch.compile` and `torch.export` follow; freezing packs the weight once."""
    packed = _D.qconv_prepack(layer.weight, layer.weight_scale, layer.reads.scale, layer.reads.zero_point,
                              *layer.settings, None)
    return _traced(layer, packed, _conv, layer.settings, q, other)


def traced_linear(layer: IntLinear, q: Tensor, other: Tensor | None) -> Tensor:
    """The linear layer in operators that `torch.compile` and `torch.export` follow."""
    packed = _D.qlinear_prepack(layer.weight, None)
    return _traced(layer, packed, _D.qlinear_pointwise, (), q, other)


def _traced(layer: Product, packed: Tensor, product: Any, settings: tuple[Any, ...], q: Tensor,
            other: Tensor | None) -> Tensor:
    """What writes into its argument can't be traced: additions are written out, in the words that Inductor fuses into
    the product again."""
    after, bias = layer.after, layer.bias
    if after.adds is None:
        made: Tensor = _onednn(layer, packed, product, None, settings)(q, None)
        return made
    assert other is not None
    given = (layer.reads.scale, layer.reads.zero_point, packed, layer.weight_scale, layer.weight_zero)
    total = product(q, *given, bias, *settings, 1.0, 0, torch.float32, "none", [], "")
    added = other if other.is_floating_point() else (other.to(torch.float32) - after.adds.zero_point) * after.adds.scale
    total = torch.relu(total + added) if after.activation == "relu" else total + added
    if after.gives is None:
        return total
    inverse = 1.0 / after.gives.scale
    made = ((total * inverse).round() + after.gives.zero_point).clamp(0, _TOP).to(torch.uint8)
    return made if after.gives.high == _TOP else made.clamp(max=after.gives.high)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _takes(after: After) -> bool:
    """Whether FBGEMM can do what follows the product: nothing but bounds, which integers are clamped to."""
    return fbgemm.available() and after.adds is None and after.bounds is not None


def _objection(after: After) -> str:
    """Why FBGEMM doesn't compute a product that it would be faster at."""
    if not fbgemm.available():
        return "this build of torch has no FBGEMM"
    return "it adds a tensor" if after.adds is not None else f"`{after.activation}` is computed in the kernel"


def _fbgemm(layer: Product, packed: Any, product: Callable[..., Tensor],
            layout: torch.memory_format) -> Callable[[Tensor, Tensor | None], Tensor]:
    after, gives = layer.after, layer.after.gives
    assert gives is not None and after.bounds is not None
    low, high = (round(bound / gives.scale) + gives.zero_point for bound in after.bounds)
    relu = after.activation == "relu"
    grids = ((layer.reads.scale, layer.reads.zero_point), packed, (gives.scale, gives.zero_point), relu)
    if relu:
        low = gives.low  # the operator does it
    if (low, high) == (0, _TOP):
        return lambda q, other: product(q.contiguous(memory_format=layout), *grids)
    return lambda q, other: product(q.contiguous(memory_format=layout), *grids).clamp_(low, high)


def _onednn(layer: Product, packed: Tensor, product: Any, adding: Any,
            settings: tuple[Any, ...]) -> Callable[[Tensor, Tensor | None], Tensor]:
    after = layer.after
    given = (layer.reads.scale, layer.reads.zero_point, packed, layer.weight_scale, layer.weight_zero)
    gives = (after.gives.scale, after.gives.zero_point, torch.uint8) if after.gives else (1.0, 0, torch.float32)
    bias, top = layer.bias, after.gives.high if after.gives is not None else _TOP
    if after.adds is None:
        # The bounds of the grid are kept by the kernel itself where it can: as those of an activation.
        narrow = top < _TOP and after.bounds is not None
        activation, numbers = ("hardtanh", after.bounds) if narrow else (after.activation, after.numbers)
        last = (*gives, activation, list(numbers or ()), "")
        if narrow or top == _TOP:
            return lambda q, other: product(q, *given, bias, *settings, *last)
        return lambda q, other: product(q, *given, bias, *settings, *last).clamp_(max=top)
    adds = (after.adds.scale, after.adds.zero_point, "sum", 1.0, after.activation, list(after.numbers), "")
    images = bool(settings)

    def add(q: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None
        other = other.clone() if after.copies else other
        other = other.detach()  # what is added may come from layers with parameters, and is written into
        if images:
            other = other.contiguous(memory_format=torch.channels_last)
            made: Tensor = adding(q, *given, other, bias, *settings, *gives, *adds)
        else:
            made = adding(q, *given, other, bias, *gives, *adds)
        return made if top == _TOP else made.clamp_(max=top)

    return add


def _shape_of_packed(weight: Tensor, *settings: Any) -> Tensor:
    return weight.new_empty(weight.shape)


if not torch._C._dispatch_has_kernel_for_dispatch_key("onednn::qconv_prepack", "Meta"):
    torch.library.register_fake("onednn::qconv_prepack", _shape_of_packed)
