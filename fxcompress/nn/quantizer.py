"""A quantizer on an edge of the graph: what training and calibration see of integers."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .observers import Observer
from .scheme import Scheme

State = Literal["off", "observing", "on"]


class Quantizer(nn.Module):
    """Rounds a tensor to the grid of its integers and gives floats back (a fake quantizer): q → (q − zero_point)·scale.

    `state`: `off` gives its input back, `observing` too and shows it to the observer, `on` rounds. Values inside of the
    range pass their gradient on, values outside of it don't (the straight-through estimate). `axis` is the dimension
    with a scale for each index, None for one scale.
    """

    fxc_kind: ClassVar[str] = "quantizer"
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: Scheme, rows: int = 1, axis: int | None = None, observer: Observer | None = None,
                 device: torch.device | None = None) -> None:
        """A quantizer with `rows` scales that is off."""
        super().__init__()
        self.scheme, self.axis = scheme, axis
        self.observer = observer
        self.state: State = "off"
        self.register_buffer("scale", torch.ones(rows, device=device))
        self.register_buffer("zero_point", torch.zeros(rows, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`x`, observed or rounded; of the same shape and dtype."""
        if self.state == "observing" and self.observer is not None:
            self.observer.update(self.rows(x))
        if self.state != "on":
            return x
        low, high = self.scheme.low, self.scheme.high
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, low, high)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, low, high)

    def rows(self, x: Tensor) -> Tensor:
        """`x` as [rows, n]: one row for each scale."""
        return x.detach().reshape(1, -1) if self.axis is None else x.detach().movedim(self.axis, 0).flatten(1)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Cover `low` to `high` (each [rows]), and round from now on."""
        scale, zero_point = self.scheme.parameters(low, high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.state = "on"

    def settle(self) -> bool:
        """Take the range from the observer and round from now on; False where it has seen nothing."""
        if self.observer is None or not self.observer.seen:
            return False
        self.set_range(*self.observer.range(self.scheme))
        return True

    def extra_repr(self) -> str:
        """The scheme, the axis and the state."""
        sign = "qint" if self.scheme.signed else "quint"
        return f"{sign}{self.scheme.bits}, axis={self.axis}, {self.state}"
