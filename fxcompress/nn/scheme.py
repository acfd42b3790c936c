"""How real numbers become integers: bits, sign, symmetry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).eps  # the least scale: that of a tensor of zeros


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a tensor. `symmetric` puts the zero point in the middle; `narrow` leaves out the lowest integer
    of a signed type, so that the range is as long on both sides of zero, as for weights. `pairs` is for weights: two
    neighbours sum to no more than one may be, so that the sum of their products saturates nowhere (`pairs.py`)."""

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    pairs: bool = False

    @property
    def low(self) -> int:
        """The lowest integer."""
        return self.narrow - (1 << self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """The highest integer."""
        return (1 << self.bits - self.signed) - 1

    @property
    def steps(self) -> int:
        """How many steps there are from the lowest integer to the highest."""
        return self.high - self.low

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(scale in float32, zero_point in int64) for values from `low` to `high`, each of any one shape. The range is
        widened to hold zero, so that zero (padding, masked weights) stays exactly zero."""
        low, high = low.to(torch.float32).clamp(max=0), high.to(torch.float32).clamp(min=0)
        if self.symmetric:
            scale = (torch.maximum(-low, high) * 2 / self.steps).clamp(min=_TINY)
            middle = 0 if self.signed else 1 << self.bits - 1
            return scale, torch.full_like(scale, middle, dtype=torch.int64)
        scale = ((high - low) / self.steps).clamp(min=_TINY)
        return scale, (self.low - (low / scale).round()).clamp(self.low, self.high).to(torch.int64)
