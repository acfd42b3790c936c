"""From the shape of a student's features to that of the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVS: dict[int, type[nn.Conv2d | nn.Conv3d]] = {4: nn.Conv2d, 5: nn.Conv3d}
_POOLS: dict[int, Callable[..., Tensor]] = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
_MODES = {4: "bilinear", 5: "trilinear"}


class Adapter(nn.Module):
    """Pools, then maps channels by a trained 1×1 convolution or linear layer, then interpolates: each where it is
    asked for.

    * `pool`: the places to average to; empty for one vector a sample
    * `channels`: (in, out), and `rank` the dimensions of what is mapped: 4 and 5 by a convolution, else linear
    * `interpolate`: the places to interpolate to, linearly along each dimension
    """

    def __init__(self, rank: int, channels: tuple[int, int] | None = None, pool: Sequence[int] | None = None,
                 interpolate: Sequence[int] | None = None, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        """`rank` counts the dimensions of what goes in."""
        super().__init__()
        self.rank = rank
        self.pool = None if pool is None else tuple(pool)
        self.places = None if interpolate is None else tuple(interpolate)
        if channels is None:
            self.map: nn.Module | None = None
        elif rank in _CONVS and self.pool != ():
            self.map = _CONVS[rank](*channels, 1, device=device, dtype=dtype)
        else:
            self.map = nn.Linear(*channels, device=device, dtype=dtype)

    def forward(self, value: Tensor) -> Tensor:
        """The features in the teacher's shape."""
        if self.pool is not None:
            value = _POOLS[self.rank](value, self.pool) if self.pool else value.flatten(2).mean(2)
        if self.map is not None:
            value = self.map(value)
        if self.places is not None:
            value = F.interpolate(value, size=self.places, mode=_MODES[self.rank], align_corners=False)
        return value
