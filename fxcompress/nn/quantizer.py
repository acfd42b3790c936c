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

    def outputs(self, weight: Tensor) -> Tensor:
        """`weight` as [out, in, ...]: neighbours along `in` are multiplied one after the other."""
        return weight.detach().movedim(self.axis or 0, 0)

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


class WeightQuantizer(Quantizer):
    """Rounds a weight whose layer reads floats, or rounds what it reads when it runs. With `group` each `group`
    neighbours along the inputs of an output share a scale (the last of a row may be fewer); `rows` counts all scales.
    `weight` is [out, ...]: what follows the outputs is taken in order, as the layer multiplies it."""

    def __init__(self, scheme: Scheme, rows: int = 1, axis: int | None = None, observer: str = "minmax",
                 arguments: tuple[float, ...] = (), on: bool = False, group: int = 0,
                 device: torch.device | None = None) -> None:
        """`group` is 0 for none; with one, `axis` is 0."""
        super().__init__(scheme, rows, axis, observer, arguments, on, device)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded, of the same shape and dtype."""
        if not self.group or not self.on:
            return super().forward(x)
        rounded = torch.fake_quantize_per_channel_affine(
            in_groups(x, self.group).flatten(0, 1), self.scale, self.zero_point, 0, self.scheme.low, self.scheme.high)
        return rounded.reshape(len(x), -1)[:, : x[0].numel()].reshape(x.shape)

    def in_rows(self, x: Tensor) -> Tensor:
        """`x` as [rows, n]: one row for each scale; zeros fill up the last group of an output."""
        return in_groups(x.detach(), self.group).flatten(0, 1) if self.group else super().in_rows(x)

    def outputs(self, weight: Tensor) -> Tensor:
        """`weight` as [out, in, ...]; with groups as [rows, group]."""
        return self.in_rows(weight) if self.group else super().outputs(weight)

    def extra_repr(self) -> str:
        """The integers, the axis or the group, and whether it has a range."""
        return super().extra_repr() + (f", group={self.group}" if self.group else "")


def in_groups(weight: Tensor, group: int) -> Tensor:
    """`weight` [out, ...] as [out, groups, group], filled up with zeros."""
    rows = weight.flatten(1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).reshape(len(rows), -1, group)


def groups_of(inputs: int, group: int) -> int:
    """How many groups there are of `inputs` weights of an output; 1 without groups."""
    return -(-inputs // group) if group else 1
