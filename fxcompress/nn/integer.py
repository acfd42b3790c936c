"""Layers that compute in integers on the CPU, on plain uint8 and int8 tensors.

The products are oneDNN's: u8 activations times s8 weights, summed in 32 bits; scale, bias, addition and activation are
applied to the sum, which is then rounded to u8, or left in float. Weights are kept as int8 and packed at the first
call: what is packed can neither be copied nor saved.
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
    """What an integer of a tensor stands for, (q − zero_point)·scale, and between what integers it lies."""

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255


_TOP = 255  # of uint8
FLOATS = Grid(1.0, 0)  # a tensor of floats, where a kernel wants a grid


def saturates() -> bool:
    """Whether sums of two products of u8 and s8 saturate 16 bits on this CPU (`vpmaddubsw`): without VNNI instructions
    activations have to stay within 7 bits."""
    return not torch.cpu._is_vnni_supported()


class ToInteger(nn.Module):
    """Floats to uint8."""

    fxc_kind: ClassVar[str] = "to_integer"

    def __init__(self, gives: Grid) -> None:
        """Rounds to the grid `gives`."""
        super().__init__()
        self.gives = gives
        # In float32, as the simulation has it; on the CPU, whatever device modules are being made on.
        self._inverse = float(1.0 / torch.tensor(gives.scale, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """uint8, of the shape of `x`; images in the channels-last order that the products want."""
        gives = self.gives
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        q = (x * self._inverse).round_().add_(gives.zero_point).clamp_(gives.low, gives.high)
        return q.to(torch.uint8, memory_format=layout)

    def extra_repr(self) -> str:
        """The grid."""
        return f"scale={self.gives.scale:.4g}, zero_point={self.gives.zero_point}"


class ToFloat(nn.Module):
    """uint8 to float32."""

    fxc_kind: ClassVar[str] = "to_float"

    def __init__(self, reads: Grid) -> None:
        """Reads integers of the grid `reads`."""
        super().__init__()
        self.reads = reads

    def forward(self, q: Tensor) -> Tensor:
        """float32, of the shape of `q`."""
        return q.to(torch.float32).sub_(self.reads.zero_point).mul_(self.reads.scale)

    def extra_repr(self) -> str:
        """The grid."""
        return f"scale={self.reads.scale:.4g}, zero_point={self.reads.zero_point}"


class IntMaxPool2d(nn.Module):
    """The maximum over windows of uint8 images (`F.max_pool2d` refuses large ones)."""

    fxc_kind: ClassVar[str] = "int_max_pool2d"

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], ceil_mode: bool) -> None:
        """The settings of `torch.nn.MaxPool2d`, each of two numbers."""
        super().__init__()
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding, self.dilation, self.ceil_mode = tuple(padding), tuple(dilation), ceil_mode

    def forward(self, q: Tensor) -> Tensor:
        """uint8 [N, C, H', W']."""
        settings = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        if _is_fake(q):
            return nn.functional.max_pool2d(q.to(torch.float32), *settings).to(torch.uint8)
        found: Tensor = torch.ops.quantized.max_pool2d(q, *settings)
        return found


@dataclass(frozen=True)
class After:
    """What a product does with its sum: adds a tensor on the grid `adds` (a copy of it where others read it later: the
    kernel writes into it), applies `activation` (oneDNN's name, with its `numbers`), and rounds to `gives`, or gives
    floats where that is None."""

    gives: Grid | None
    adds: Grid | None = None
    copies: bool = False
    activation: str = "none"
    numbers: tuple[float, ...] = ()


class _Packed:
    """Holds packed weights, which can't be copied or pickled: a copy holds nothing."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()


class _Product(nn.Module):
    """Base of the products. `weight` is int8, `weight_scale` float [out], `bias` float [out]."""

    fxc_frozen: ClassVar[bool] = True  # its parameters are constants, whatever they were before
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor
    _weight_zero: Tensor

    def __init__(self, shape: Sequence[int], has_bias: bool, reads: Grid, after: After) -> None:
        super().__init__()
        self.shape, self.has_bias, self.reads, self.after = tuple(shape), has_bias, reads, after
        self.weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(self.shape[0]), requires_grad=False) if has_bias else None
        self.register_buffer("weight_scale", torch.ones(self.shape[0]))
        self.register_buffer("_weight_zero", torch.zeros(self.shape[0], dtype=torch.int64), persistent=False)
        self._packed = _Packed()

    def fill(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Set the weights: int8, float [out], float [out]."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight_scale, self._packed = scale, _Packed()

    def forward(self, q: Tensor, other: Tensor | None = None) -> Tensor:
        """The product of `q` (uint8), uint8 or float32; with `after.adds`, `other` is added to it."""
        after = self.after
        if _is_fake(q):
            made = self._shaped(q)
            return made if after.gives is None else made.to(torch.uint8)
        if self._packed.tensor is None:
            self._packed.tensor = self._pack(q)
        given = (q, self.reads.scale, self.reads.zero_point, self._packed.tensor, self.weight_scale,
                 self._weight_zero)
        gives = (after.gives.scale, after.gives.zero_point, torch.uint8) if after.gives else (1.0, 0, torch.float32)
        last = (after.activation, list(after.numbers), "")
        if other is None:
            made = self._run(given, (*gives, *last))
        else:
            assert after.adds is not None
            added = (other.clone() if after.copies else other).detach()
            adds = (after.adds.scale, after.adds.zero_point, "sum", 1.0)
            made = self._run_adding(given, added, gives, (*adds, *last))
        if after.gives is not None and after.gives.high < _TOP:
            made.clamp_(max=after.gives.high)  # kernels round to all of uint8
        return made

    def _shaped(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def _pack(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def _run(self, given: tuple[Any, ...], then: tuple[Any, ...]) -> Tensor:
        raise NotImplementedError

    def _run_adding(self, given: tuple[Any, ...], other: Tensor, gives: tuple[Any, ...],
                    then: tuple[Any, ...]) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The weight's shape and what follows the product."""
        steps = ["add"] * (self.after.adds is not None) + [self.after.activation] * (self.after.activation != "none")
        return ", ".join([str(self.shape), *steps, "gives u8" if self.after.gives else "gives f32"])


class IntConv2d(_Product):
    """A convolution of uint8 images [N, C, H, W] with int8 filters [out, in / groups, kH, kW]."""

    fxc_kind: ClassVar[str] = "int_conv2d"

    def __init__(self, shape: Sequence[int], has_bias: bool, reads: Grid, after: After, stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
        """`shape` is that of the filters; the other settings as in `torch.nn.Conv2d`, each of two numbers."""
        super().__init__(shape, has_bias, reads, after)
        self.stride, self.padding, self.dilation, self.groups = tuple(stride), tuple(padding), tuple(dilation), groups

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def _shaped(self, q: Tensor) -> Tensor:
        return nn.functional.conv2d(q.to(torch.float32), self.weight.to(torch.float32), None, *self._settings)

    def _pack(self, q: Tensor) -> Tensor:
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            self.weight, self.weight_scale, self.reads.scale, self.reads.zero_point, *self._settings, q.shape)
        return packed

    def _run(self, given: tuple[Any, ...], then: tuple[Any, ...]) -> Tensor:
        made: Tensor = torch.ops.onednn.qconv2d_pointwise(*given, self.bias, *self._settings, *then)
        return made

    def _run_adding(self, given: tuple[Any, ...], other: Tensor, gives: tuple[Any, ...],
                    then: tuple[Any, ...]) -> Tensor:
        other = other.contiguous(memory_format=torch.channels_last)
        made: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            *given, other, self.bias, *self._settings, *gives, *then)
        return made


class IntLinear(_Product):
    """A linear layer on uint8 rows [..., in] with int8 weights [out, in]."""

    fxc_kind: ClassVar[str] = "int_linear"

    def _shaped(self, q: Tensor) -> Tensor:
        return nn.functional.linear(q.to(torch.float32), self.weight.to(torch.float32))

    def _pack(self, q: Tensor) -> Tensor:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(self.weight, q.shape)
        return packed

    def _run(self, given: tuple[Any, ...], then: tuple[Any, ...]) -> Tensor:
        made: Tensor = torch.ops.onednn.qlinear_pointwise(*given, self.bias, *then)
        return made

    def _run_adding(self, given: tuple[Any, ...], other: Tensor, gives: tuple[Any, ...],
                    then: tuple[Any, ...]) -> Tensor:
        made: Tensor = torch.ops.onednn.qlinear_pointwise.binary(*given, other, self.bias, *gives, *then)
        return made


def _is_fake(q: Tensor) -> bool:
    """Whether only the shape is asked for."""
    return q.device.type == "meta" or isinstance(q, FakeTensor)
