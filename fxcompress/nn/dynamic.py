"""Linear layers whose inputs are rounded when they run: the range is that of the values themselves.

`DynamicQuantizer` is the simulation, `DynamicLinear` computes the same in integers: u8 times s8, summed in 32 bits by
fbgemm where this torch has it (it also rounds the floats that it reads, and is the faster for few rows), else by
oneDNN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import quantized_dtypes
from .held import Held
from .pairs import fit, saturates
from .quantizer import groups_of
from .scheme import Scheme


def parameters_of(x: Tensor, scheme: Scheme, per_token: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of `x` [..., n] as floats: of each row, [..., 1], or of all, [1]. A row of zeros, and an
    empty `x`, get the least scale."""
    if not x.numel():
        return x.new_ones(1), x.new_zeros(1)
    low, high = torch.aminmax(x, dim=-1, keepdim=True) if per_token else (end.reshape(1) for end in torch.aminmax(x))
    scale, zero = scheme.parameters(low, high)
    if scheme.symmetric:
        scale = scale * (scheme.steps / (scheme.steps - 1))  # the ends on integers, not on halves that any error moves
    return scale, zero.to(scale.dtype)


class DynamicQuantizer(nn.Module):
    """Rounds what a layer reads to a grid of its own values, and gives floats back: one grid for all of them, or with
    `per_token` one for each row (the last dimension). Gradients pass as if nothing were rounded."""

    fxc_kind: ClassVar[str] = "quantizer"

    def __init__(self, scheme: Scheme, per_token: bool = False, on: bool = True) -> None:
        """`scheme` is unsigned."""
        super().__init__()
        self.scheme, self.per_token, self.on = scheme, per_token, on

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded, of the same shape and dtype."""
        if not self.on:
            return x
        values = x.detach().float()
        scale, zero = parameters_of(values, self.scheme, self.per_token)
        integers = torch.addcmul(zero, values, scale.reciprocal()).round_().clamp_(self.scheme.low, self.scheme.high)
        rounded = integers.sub_(zero).mul_(scale).to(x.dtype)
        return x + (rounded - x).detach() if x.requires_grad else rounded

    def extra_repr(self) -> str:
        """The integers, and what has a grid."""
        return f"quint{self.scheme.bits}, {'per token' if self.per_token else 'per tensor'}"


class _Packed(Held):
    """Packed weights, one of each group, and the sums of the weights."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.sums: Tensor | None = None


class DynamicLinear(nn.Module):
    """A linear layer on floats [..., in], which it rounds, with int8 weights [out, in]; it gives floats [..., out].

    With s, z the scale and the zero point of a row, S its sum of products with a column of weights of the scale w and
    the sum c, it gives (S - z·c)·s·w + bias. `weight_scale` is [out, groups]: sums over groups are added as floats.
    """

    fxc_kind: ClassVar[str] = "dynamic_linear"
    fxc_frozen: ClassVar[bool] = True  # its parameters are constants, whatever they were before
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor

    def __init__(self, shape: Sequence[int], has_bias: bool, scheme: Scheme, per_token: bool, group: int = 0) -> None:
        """`shape` is that of the weight; `group` the weights of an output that share a scale, 0 for all."""
        super().__init__()
        self.shape, self.has_bias, self.scheme, self.per_token = tuple(shape), has_bias, scheme, per_token
        self.group = group
        self.weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(self.shape[0]), requires_grad=False) if has_bias else None
        self.register_buffer("weight_scale", torch.ones(self.shape[0], groups_of(self.shape[1], group)))
        self._packed = _Packed()

    def fill(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Set the weights: int8, float [out, groups], float [out]."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight_scale, self._packed = scale, _Packed()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., out]."""
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.shape[0])
        rows = x.reshape(-1, self.shape[1])
        scale, zero = parameters_of(rows, self.scheme, self.per_token)
        counted = torch.addcmul(zero, rows, scale.reciprocal())  # rounded to integers by the kernel
        made = self._products(counted.clamp_(self.scheme.low, self.scheme.high))
        sums = self._sums() if self._packed.sums is None else self._packed.sums
        made = made.sub_(zero * sums) if zero.numel() == 1 else made.addr_(zero[:, 0], sums, alpha=-1)
        made = made.mul_(scale) if self.bias is None else torch.addcmul(self.bias, made, scale)
        return made.reshape(*x.shape[:-1], self.shape[0])

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The weights of each group with their scales: int8 [out, n], float [out]."""
        return zip(torch.split(self.weight, self.group or self.shape[1], 1), self.weight_scale.unbind(1), strict=True)

    def _sums(self) -> Tensor:
        """The sum of each output's weights, scaled, [out]."""
        return torch.stack([part.sum(1, dtype=torch.int32) * scale for part, scale in self._parts()]).sum(0)

    def _products(self, rows: Tensor) -> Tensor:
        """The sums of products of the rows, rounded, with the weights, times the weights' scales: [rows, out]."""
        if torch.compiler.is_compiling():
            library: type[_Part] = _Floats if self._in_floats() else _OneDnn
            made: Sequence[_Part] = [library(part, scale) for part, scale in self._parts()]
        else:
            if not self._packed.parts:
                self._pack()
            made = self._packed.parts
        if len(made) == 1:
            return made[0](rows)
        pieces = torch.split(rows, self.group, 1)
        total = made[0](pieces[0])
        for kernel, piece in zip(made[1:], pieces[1:], strict=True):
            total += kernel(piece.contiguous())
        return total

    def check(self) -> bool:
        """Whether its kernels compute it exactly on this CPU; else it is computed in floats. Looked at once, and not
        while a graph is traced: there it has to be known."""
        if saturates() and not self._packed.parts:
            self._pack()
        return not self._in_floats()

    def _in_floats(self) -> bool:
        return any(isinstance(part, _Floats) for part in self._packed.parts)

    def _pack(self) -> None:
        library: type[_Part] = _Fbgemm if quantized_dtypes.available("fbgemm") else _OneDnn
        if saturates() and not all(fit(part, self.scheme.high) for part, _ in self._parts()):
            library = _Floats
        self._packed.parts = [library(part, scale) for part, scale in self._parts()]
        self._packed.sums = self._sums()

    def extra_repr(self) -> str:
        """The weight's shape, the integers of the values, and what has a grid."""
        return f"{self.shape}, quint{self.scheme.bits}, {'per token' if self.per_token else 'per tensor'}" + (
            f", group={self.group}" if self.group else "")


class _OneDnn:
    """Sums of products on plain bytes."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        self.scale, self.zero = scale.contiguous(), torch.zeros(len(scale), dtype=torch.int64)

    def __call__(self, rows: Tensor) -> Tensor:
        """From floats that count from 0, [rows, in], to scaled sums [rows, out]."""
        made: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows.round().to(torch.uint8), 1.0, 0, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32,
            "none", [], "")
        return made


class _Fbgemm:
    """The same by fbgemm, which rounds the floats as it packs them; it takes weights of torch's quantized type."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.packed = quantized_dtypes.pack_linear(weight, scale, None)

    def __call__(self, rows: Tensor) -> Tensor:
        """From floats that count from 0, [rows, in], to scaled sums [rows, out]."""
        made: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 1.0, 0, self.packed)
        return made


class _Floats:
    """The same in float32, for products of which sums of two would saturate on this CPU."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.weight = weight * scale[:, None]

    def __call__(self, rows: Tensor) -> Tensor:
        """From floats that count from 0, [rows, in], to scaled sums [rows, out]."""
        return nn.functional.linear(rows.round(), self.weight)


_Part = _OneDnn | _Fbgemm | _Floats
