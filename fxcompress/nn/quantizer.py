"""A quantizer on an edge of the graph: what a model computes once its numbers are rounded to integers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .scheme import Scheme


class Quantizer(nn.Module):
    """Rounds a tensor to the grid of its integers and gives floats back (a fake quantizer): (q − zero_point)·scale.

    Until it has a range it gives its input back. Values inside of the range pass their gradient on, values outside of
    it don't (the straight-through estimate). `axis` is the dimension with a scale for each of its `rows` indices, None
    for one scale. `observer` names how a range is found, with its arguments.
    """

    fxc_kind: ClassVar[str] = "quantizer"
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: Scheme, rows: int = 1, axis: int | None = None, observer: str = "minmax",
                 arguments: tuple[float, ...] = (), on: bool = False, device: torch.device | None = None) -> None:
        """A quantizer with `rows` scales."""
        super().__init__()
        self.scheme, self.rows, self.axis = scheme, rows, axis
        self.observer, self.arguments = observer, arguments
        self.on = on
        self.register_buffer("scale", torch.ones(rows, device=device))
        self.register_buffer("zero_point", torch.zeros(rows, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded, of the same shape and dtype."""
        if not self.on:
            return x
        low, high = self.scheme.low, self.scheme.high
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, low, high)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, low, high)

    def in_rows(self, x: Tensor) -> Tensor:
        """`x` as [rows, n]: one row for each scale."""
        return x.detach().reshape(1, -1) if self.axis is None else x.detach().movedim(self.axis, 0).flatten(1)

    def cover(self, low: Tensor, high: Tensor) -> None:
        """Cover `low` to `high`, each [rows], and round from now on."""
        scale, zero_point = self.scheme.parameters(low, high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.on = True

    def extra_repr(self) -> str:
        """The integers, the axis, and whether it has a range."""
        sign = "qint" if self.scheme.signed else "quint"
        return f"{sign}{self.scheme.bits}" + (f", axis={self.axis}" if self.axis is not None else "") + (
            "" if self.on else ", without a range")
