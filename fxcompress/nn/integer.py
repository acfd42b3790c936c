"""Layers that multiply integers on the CPU, on plain uint8 and int8 tensors.

u8 activations times s8 weights are summed in 32 bits; scale, bias, addition and activation are applied to the sum,
which is then rounded to u8, or left in float. Which library computes it is chosen by shape (`engines.py`). Weights are
kept as int8 and packed at the first call: what is packed can neither be copied nor saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import engines
from .held import Held
from .pairs import SATURATES, fit, saturates

if TYPE_CHECKING:
    from .quantizer import Quantizer


@dataclass(frozen=True)
class Grid:
    """What an integer of a tensor stands for, (q − zero_point)·scale, and between what integers it lies."""

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255

    @classmethod
    def of(cls, quantizer: Quantizer) -> Grid:
        """That of a quantizer with one scale."""
        return cls(float(quantizer.scale), int(quantizer.zero_point), quantizer.scheme.low, quantizer.scheme.high)

    @property
    def floats(self) -> tuple[float, float]:
        """The numbers that the lowest and the highest integer stand for."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale


FLOATS = Grid(1.0, 0)  # a tensor of floats, where a kernel wants a grid


def is_fake(q: Tensor) -> bool:
    """Whether only the shape is asked for."""
    return q.is_meta or isinstance(q, FakeTensor)


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

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Between what numbers the activation and the grid keep the result; None where the activation does more than
        that."""
        if self.activation not in ("none", "relu", "hardtanh"):
            return None
        low, high = self.gives.floats if self.gives is not None else (float("-inf"), float("inf"))
        if self.activation == "hardtanh":
            return max(low, self.numbers[0]), min(high, self.numbers[1])
        return (low if self.activation == "none" else max(low, 0.0)), high


class _Packed(Held):
    """Kernels with their packed weights, by the shape of what they read."""

    def __init__(self) -> None:
        self.kernels: dict[torch.Size, engines.Kernel] = {}
        self.exact: bool | None = None


class Product(nn.Module):
    """Base of the products. `weight` is int8, `weight_scale` float [out], `bias` float [out]."""

    fxc_frozen: ClassVar[bool] = True  # its parameters are constants, whatever they were before
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(self, shape: Sequence[int], has_bias: bool, reads: Grid, after: After) -> None:
        super().__init__()
        self.shape, self.has_bias, self.reads, self.after = tuple(shape), has_bias, reads, after
        self.weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(self.shape[0]), requires_grad=False) if has_bias else None
        self.register_buffer("weight_scale", torch.ones(self.shape[0]))
        self.register_buffer("weight_zero", torch.zeros(self.shape[0], dtype=torch.int64), persistent=False)
        self._packed = _Packed()

    def fill(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Set the weights: int8, float [out], float [out]."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight_scale, self._packed = scale, _Packed()

    def forward(self, q: Tensor, other: Tensor | None = None) -> Tensor:
        """The product of `q` (uint8), uint8 or float32; with `after.adds`, `other` is added to it."""
        if torch.compiler.is_compiling():
            return self._traced(q, other) if self._packed.exact is not False else engines.in_floats(self, q, other)
        if is_fake(q):
            made = self.shaped(q)
            return made if self.after.gives is None else made.to(torch.uint8)
        kernel = self._packed.kernels.get(q.shape)
        if kernel is None:
            kernel = self._packed.kernels[q.shape] = (
                self._kernel(q.shape) if self.check() else engines.Kernel("floats", SATURATES, self._floats))
        return kernel.run(q, other)

    def check(self) -> bool:
        """Whether its kernels compute it exactly on this CPU; else it is computed in floats. Looked at once, and not
        while a graph is traced: there it has to be known."""
        if self._packed.exact is None:
            self._packed.exact = not saturates() or fit(self.weight, self.reads.high)
        return self._packed.exact

    def _floats(self, q: Tensor, other: Tensor | None) -> Tensor:
        return engines.in_floats(self, q, other)

    @property
    def engine(self) -> str:
        """The library that computes it, for inputs of the shape it saw first; empty before its first call."""
        return next((kernel.engine for kernel in self._packed.kernels.values()), "")

    @property
    def why(self) -> str:
        """Why that library does; empty before its first call."""
        return next((kernel.why for kernel in self._packed.kernels.values()), "")

    def shaped(self, q: Tensor) -> Tensor:
        """A float tensor of the result's shape, on any device."""
        return self.summed(q.to(torch.float32))

    def summed(self, x: Tensor) -> Tensor:
        """The sums of products of float numbers with the weights, as floats."""
        raise NotImplementedError

    def _kernel(self, shape: torch.Size) -> engines.Kernel:
        raise NotImplementedError

    def _traced(self, q: Tensor, other: Tensor | None) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The weight's shape and what follows the product."""
        steps = ["add"] * (self.after.adds is not None) + [self.after.activation] * (self.after.activation != "none")
        return ", ".join([str(self.shape), *steps, "gives u8" if self.after.gives else "gives f32"])


class IntConv2d(Product):
    """A convolution of uint8 images [N, C, H, W] with int8 filters [out, in / groups, kH, kW]."""

    fxc_kind: ClassVar[str] = "int_conv2d"

    def __init__(self, shape: Sequence[int], has_bias: bool, reads: Grid, after: After, stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
        """`shape` is that of the filters; the other settings as in `torch.nn.Conv2d`, each of two numbers."""
        super().__init__(shape, has_bias, reads, after)
        self.stride, self.padding, self.dilation, self.groups = tuple(stride), tuple(padding), tuple(dilation), groups

    @property
    def settings(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups

    def summed(self, x: Tensor) -> Tensor:
        """The sums of products of float numbers with the weights, as floats."""
        return nn.functional.conv2d(x, self.weight.to(torch.float32), None, *self.settings)

    def _kernel(self, shape: torch.Size) -> engines.Kernel:
        return engines.conv2d(self, shape)

    def _traced(self, q: Tensor, other: Tensor | None) -> Tensor:
        return engines.traced_conv2d(self, q, other)


class IntLinear(Product):
    """A linear layer on uint8 rows [..., in] with int8 weights [out, in]."""

    fxc_kind: ClassVar[str] = "int_linear"

    def summed(self, x: Tensor) -> Tensor:
        """The sums of products of float numbers with the weights, as floats."""
        return nn.functional.linear(x, self.weight.to(torch.float32))

    def _kernel(self, shape: torch.Size) -> engines.Kernel:
        return engines.linear(self, shape)

    def _traced(self, q: Tensor, other: Tensor | None) -> Tensor:
        return engines.traced_linear(self, q, other)
