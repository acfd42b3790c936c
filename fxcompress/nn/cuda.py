"""Layers for the GPU: int8 products by `torch._int_mm`, 2:4 sparse weights by cuSPARSELt, half precision around them.

Only the one product differs by device; on the CPU the same modules run too (slowly), so that what they compute can be
checked in exact arithmetic where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .held import HeldTensor
from .integer import Grid, is_fake

_BLOCK = 8  # `torch._int_mm` takes multiples of it, of inputs and of outputs
_LEAST_ROWS = 32  # it wants more than 16 rows; tensor cores take them by 32
_HALF_OF_BYTES = 128  # what turns uint8 into int8
KEPT, OF = 2, 4  # of each four neighbours at most two aren't zero


def _up(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _shift(grid: Grid) -> int:
    """What is taken off the integers of `grid` so that they fit int8."""
    return _HALF_OF_BYTES if grid.high > torch.iinfo(torch.int8).max else 0


class ToInt8(nn.Module):
    """Floats to int8: integers of the grid `gives`, less 128 where it reaches beyond 127."""

    fxc_kind: ClassVar[str] = "to_int8"

    def __init__(self, gives: Grid) -> None:
        """Rounds to the grid `gives`."""
        super().__init__()
        self.gives = gives
        # In float32, as the simulation has it; on the CPU, whatever device modules are being made on.
        self._inverse = float(1.0 / torch.tensor(gives.scale, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """int8, of the shape of `x`."""
        gives, shift = self.gives, _shift(self.gives)
        counted = (x.to(torch.float32) * self._inverse).round_().add_(gives.zero_point - shift)
        return counted.clamp_(gives.low - shift, gives.high - shift).to(torch.int8)

    def extra_repr(self) -> str:
        """The grid."""
        return f"scale={self.gives.scale:.4g}, zero_point={self.gives.zero_point}"


class CudaInt8Linear(nn.Module):
    """A linear layer on int8 rows [..., in], as `ToInt8` makes them, that gives float16 [..., out].

    With a = q − s as it reads (s is 128 or 0) and the zero point z of the grid `reads`, Σ (q − z)·w is
    Σ a·w + (s − z)·Σ w; the second term and the layer's bias are one number an output, `offset`. `weight` is int8,
    filled up with zeros to multiples of 8 in both sizes; `scale` and `offset` are float32 [out].
    """

    fxc_kind: ClassVar[str] = "cuda_int8_linear"
    fxc_frozen: ClassVar[bool] = True  # its parameters are constants, whatever they were before
    weight: nn.Parameter
    scale: Tensor
    offset: Tensor

    def __init__(self, shape: Sequence[int], reads: Grid) -> None:
        """`shape` is [out, in]."""
        super().__init__()
        self.shape, self.reads = tuple(shape), reads
        padded = torch.zeros(*map(_up, self.shape), dtype=torch.int8)
        self.weight = nn.Parameter(padded, requires_grad=False)
        self.register_buffer("scale", torch.ones(self.shape[0]))
        self.register_buffer("offset", torch.zeros(self.shape[0]))

    def fill(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Set the weights: int8 [out, in], the scale of each output's, float [out] (or one), float [out]."""
        rows, columns = (padded - size for padded, size in zip(self.weight.shape, self.shape, strict=True))
        self.weight = nn.Parameter(F.pad(weight, (0, columns, 0, rows)), requires_grad=False)
        both = scale.to(torch.float64).expand(self.shape[0]) * self.reads.scale
        moved = (_shift(self.reads) - self.reads.zero_point) * weight.sum(1, dtype=torch.int64) * both
        self.scale = both.to(torch.float32)
        self.offset = (moved if bias is None else moved + bias).to(torch.float32)

    def forward(self, q: Tensor) -> Tensor:
        """float16 [..., out]."""
        out, inputs = self.shape
        rows = q.reshape(-1, inputs)
        count = rows.shape[0]
        fill = (0, self.weight.shape[1] - inputs, 0, max(0, _LEAST_ROWS - count))
        total = torch._int_mm(F.pad(rows, fill) if any(fill) else rows, self.weight.t())
        made = torch.addcmul(self.offset, total[:count, :out].to(torch.float32), self.scale)
        return made.to(torch.float16).reshape(*q.shape[:-1], out)

    def extra_repr(self) -> str:
        """The weight's shape."""
        return str(self.shape)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether of each four neighbours in a row of `weight` [out, in] at most two aren't zero."""
    if weight.dim() != 2 or weight.shape[1] % OF:
        return False
    return bool(((weight != 0).reshape(len(weight), -1, OF).sum(-1) <= KEPT).all())


class Sparse24Linear(nn.Module):
    """A linear layer in float16 whose weight [out, in] has the 2:4 pattern that sparse tensor cores multiply.

    The weight is kept dense, zeros and all, so that it is copied and saved like any other; it is compressed at the
    first call on a GPU.
    """

    fxc_kind: ClassVar[str] = "sparse24_linear"
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, shape: Sequence[int], has_bias: bool) -> None:
        """`shape` is [out, in]."""
        super().__init__()
        self.shape, self.has_bias = tuple(shape), has_bias
        self.weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(self.shape[0], dtype=torch.float16)) if has_bias else None
        self._compressed = HeldTensor()

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set the weights, [out, in] and [out], and whether they are trained: as those that are given."""
        def half(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.detach().to(torch.float16), tensor.requires_grad)

        self.weight, self.bias = half(weight), None if bias is None else half(bias)
        self._compressed = HeldTensor()

    def forward(self, x: Tensor) -> Tensor:
        """float16 [..., out]."""
        if not x.is_cuda or is_fake(x):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.shape[1]).contiguous()
        return F.linear(rows, self._compress(), self.bias).reshape(*x.shape[:-1], self.shape[0])

    def _compress(self) -> Tensor:
        """The compressed weight. Raises ValueError where the weight isn't 2:4 any more: numbers would be lost."""
        if self._compressed.tensor is None:
            if not is_two_of_four(self.weight):
                raise ValueError("the weight has more than two entries of four neighbours that aren't zero")
            self._compressed.tensor = torch.sparse.to_sparse_semi_structured(self.weight.detach().contiguous())
        return self._compressed.tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Sparse24Linear:
        self._compressed = HeldTensor()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._compressed = HeldTensor()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The weight's shape."""
        return str(self.shape)
