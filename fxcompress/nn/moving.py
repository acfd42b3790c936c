"""What brings numbers to integers and back, and what moves, pools and averages integers. On plain uint8 tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import quantized_dtypes
from .integer import Grid, is_fake

_VECTOR = 32  # bytes that AVX2 takes at a time
_EXACT = 2**24 // 255  # so many bytes float32 sums exactly


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
        if _written_out(x) or x.dtype != torch.float32:
            q = ((x * self._inverse).round() + gives.zero_point).clamp(gives.low, gives.high)
            return q.to(torch.uint8).contiguous(memory_format=layout)
        q = quantized_dtypes.to_bytes(x, gives.scale, gives.zero_point, layout)
        return q if (gives.low, gives.high) == (0, 255) else q.clamp_(gives.low, gives.high)

    def extra_repr(self) -> str:
        """The grid."""
        return _shown(self.gives)


class ToFloat(nn.Module):
    """uint8 to float32."""

    fxc_kind: ClassVar[str] = "to_float"

    def __init__(self, reads: Grid) -> None:
        """Reads integers of the grid `reads`."""
        super().__init__()
        self.reads = reads

    def forward(self, q: Tensor) -> Tensor:
        """float32, of the shape of `q`."""
        if _written_out(q):
            return (q.to(torch.float32) - self.reads.zero_point) * self.reads.scale
        return quantized_dtypes.to_floats(q, self.reads.scale, self.reads.zero_point)

    def extra_repr(self) -> str:
        """The grid."""
        return _shown(self.reads)


class IntMaxPool2d(nn.Module):
    """The maximum over windows of uint8 images: by torch's operator where channels fill its vectors (beside them it
    takes six times as long), else first down the columns, then along the rows (`F.max_pool2d` refuses large images).
    Padding is zero, the least of integers."""

    fxc_kind: ClassVar[str] = "int_max_pool2d"

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], ceil_mode: bool) -> None:
        """The settings of `torch.nn.MaxPool2d`, each of two numbers."""
        super().__init__()
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding, self.dilation, self.ceil_mode = tuple(padding), tuple(dilation), ceil_mode

    def forward(self, q: Tensor) -> Tensor:
        """uint8 [N, C, H', W']."""
        if q.shape[1] % _VECTOR == 0 and not is_fake(q) and not torch.compiler.is_exporting():
            made: Tensor = torch.ops.quantized.max_pool2d(
                q.contiguous(memory_format=torch.channels_last), self.kernel_size, self.stride, self.padding,
                self.dilation, self.ceil_mode)
            return made
        return self._by_slices(q)

    def _by_slices(self, q: Tensor) -> Tensor:
        sizes = [self._size(q.shape[2 + axis], axis) for axis in (0, 1)]
        missing = [self._reach(size, axis) - q.shape[2 + axis] - self.padding[axis] for axis, size in enumerate(sizes)]
        if any(self.padding) or max(missing) > 0:
            below, right = (max(0, number) for number in missing)
            q = nn.functional.pad(q, (self.padding[1], right, self.padding[0], below))
        for axis in (0, 1):
            stride, reach = self.stride[axis], (sizes[axis] - 1) * self.stride[axis] + 1
            taps = [q[:, :, start : start + reach : stride] if axis == 0 else q[:, :, :, start : start + reach : stride]
                    for start in range(0, self.kernel_size[axis] * self.dilation[axis], self.dilation[axis])]
            q = taps[0]
            for tap in taps[1:]:
                q = torch.maximum(q, tap)
        return q

    def _size(self, size: int, axis: int) -> int:
        """The size of the result, as `torch.nn.MaxPool2d` has it: no window begins behind the image and its padding."""
        spare = size + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1
        stride = self.stride[axis]
        found = -(-spare // stride) + 1 if self.ceil_mode else spare // stride + 1
        return found - ((found - 1) * stride >= size + self.padding[axis])

    def _reach(self, size: int, axis: int) -> int:
        """How many places, padding on the left included, `size` windows reach over."""
        return (size - 1) * self.stride[axis] + self.dilation[axis] * (self.kernel_size[axis] - 1) + 1


class IntMean(nn.Module):
    """The mean over the places of uint8 images, float32: exact sums of integers, scaled once."""

    fxc_kind: ClassVar[str] = "int_mean"

    def __init__(self, reads: Grid, keepdim: bool) -> None:
        """Reads integers of the grid `reads`; `keepdim` leaves two dimensions of size 1."""
        super().__init__()
        self.reads, self.keepdim = reads, keepdim

    def forward(self, q: Tensor) -> Tensor:
        """float32 [N, C], or [N, C, 1, 1]."""
        count, channels, places = q.shape[0], q.shape[1], q.shape[2] * q.shape[3]
        if places <= _EXACT:  # rows of floats are summed faster, and as exactly
            total = q.permute(0, 2, 3, 1).reshape(count, places, channels).to(torch.float32).sum(1)
        else:
            total = q.sum((2, 3), dtype=torch.int32).to(torch.float32)
        made = total.mul_(self.reads.scale / places)
        if self.reads.zero_point:
            made = made.sub_(self.reads.zero_point * self.reads.scale)
        return made[:, :, None, None] if self.keepdim else made

    def extra_repr(self) -> str:
        """The grid."""
        return _shown(self.reads)


class IntAdaptiveMean(nn.Module):
    """The means over windows of uint8 images, as `torch.nn.AdaptiveAvgPool2d` has them, on the grid of the images.
    Images that have as many places already come out as they are."""

    fxc_kind: ClassVar[str] = "int_adaptive_mean"

    def __init__(self, output_size: Sequence[int]) -> None:
        """`output_size` has two numbers."""
        super().__init__()
        high, wide = output_size
        self.output_size = (high, wide)

    def forward(self, q: Tensor) -> Tensor:
        """uint8 [N, C, *output_size]."""
        if tuple(q.shape[2:]) == self.output_size:
            return q
        return nn.functional.adaptive_avg_pool2d(q.to(torch.float32), self.output_size).round().to(torch.uint8)


class Interleave(nn.Module):
    """Two images of uint8 with equally many channels, their channels in turn: a channel shuffle of two groups. Pairs of
    bytes are written as 16-bit numbers, the first one low (every CPU with these kernels is little-endian)."""

    fxc_kind: ClassVar[str] = "interleave"

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """uint8 [N, 2C, H, W], channels-last."""
        if torch.compiler.is_compiling() or is_fake(first):
            return torch.stack([first, second], 2).flatten(1, 2)
        pairs = second.to(torch.int16, memory_format=torch.channels_last).mul_(256).add_(first)
        return pairs.permute(0, 2, 3, 1).view(torch.uint8).permute(0, 3, 1, 2)


def _written_out(x: Tensor) -> bool:
    """Whether `x` has to be computed on by operators of plain tensors."""
    return torch.compiler.is_compiling() or is_fake(x) or not quantized_dtypes.available("fbgemm")


def _shown(grid: Grid) -> str:
    return f"scale={grid.scale:.4g}, zero_point={grid.zero_point}"
