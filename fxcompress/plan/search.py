"""The search for one share: the smallest that keeps within all limits, from few trials. No graphs here, only numbers.

A trial of a share gives a load: what is reached as a part of the limit, of the tightest limit if there are several. The
load falls as the share grows, in steps. `spread` sets where the steps lie (`Pass.with_share`), so that another spread
can come closer where one jumps past the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

GRID = 1e-4  # shares are whole multiples of this, a hundredth of a percent: what plans show is what is carried out
SPREADS = tuple(n / 8 for n in range(8))
_NARROWINGS, _RETRIES = 9, 5  # trials that close in on the limit: with the first spread, with each further one
_REACH = 0.02  # how far from the best share so far further spreads look
_LEAPS = 4  # extrapolations, before the whole is tried


@dataclass(frozen=True)
class Point:
    """One trial: a load of at most 1 keeps within the limits."""

    share: float
    spread: float
    load: float

    @property
    def met(self) -> bool:
        """Whether it keeps within the limits."""
        return self.load <= 1.0

    @property
    def width(self) -> float:
        """The root of the load. Most costs of a network grow with the square of its width, so that this is nearly
        linear in the share."""
        return math.sqrt(self.load)


@dataclass
class Search:
    """Looks for a share with `1 - tolerance <= load <= 1`; where steps are too coarse for that, for the load nearest
    below 1. At most `tries` trials."""

    load: Callable[[float, float], float]
    tolerance: float
    tries: int
    best: Point | None = None
    _done: dict[tuple[float, float], Point] = field(default_factory=dict)

    def run(self, spreads: tuple[float, ...] = SPREADS) -> Point:
        """The best point found; where none is within the limits, that of the whole share."""
        low = self._at(0.0, spreads[0])
        if low.met:
            return low
        low, high = self._bracket(low)
        if not high.met:
            return high
        self._narrow(low, high, _NARROWINGS)
        for spread in spreads[1:]:
            if not self._enough():
                self._retry(spread)
        assert self.best is not None
        return self.best

    def _at(self, share: float, spread: float) -> Point:
        share = min(1.0, max(0.0, round(round(share / GRID) * GRID, 6)))
        key = share, spread
        if key not in self._done:
            self.tries -= 1
            self._done[key] = Point(share, spread, self.load(share, spread))
        point = self._done[key]
        if point.met and (self.best is None or point.load > self.best.load):
            self.best = point
        return point

    def _enough(self) -> bool:
        return self.tries <= 0 or (self.best is not None and self.best.load >= 1.0 - self.tolerance)

    def _bracket(self, low: Point) -> tuple[Point, Point]:
        """A point that isn't within the limits, and a further one that is; or the last two before giving up."""
        share = 1.0 - 1.0 / low.width
        for leap in range(_LEAPS):
            point = self._at(share, low.spread)
            if point.met or point.share >= 1.0:
                return low, point
            fall = (low.width - point.width) / max(GRID, point.share - low.share)
            share = point.share + (1 + leap) * ((point.width - 1.0) / fall + GRID) if fall > 0 else 1.0
            low = point
        return low, self._at(1.0, low.spread)

    def _narrow(self, low: Point, high: Point, trials: int) -> None:
        """Close in on the limit between two points: by false position, by halves every third time."""
        aim = math.sqrt(1.0 - self.tolerance / 2)
        for number in range(trials):
            if self._enough() or high.share - low.share < 1.5 * GRID:
                return
            part = (low.width - aim) / (low.width - high.width) if number % 3 < 2 and math.isfinite(low.load) else 0.5
            share = low.share + part * (high.share - low.share)
            point = self._at(min(max(share, low.share + GRID), high.share - GRID), low.spread)
            low, high = (low, point) if point.met else (point, high)

    def _retry(self, spread: float) -> None:
        """Look around the best share with another spread."""
        assert self.best is not None
        middle = self._at(self.best.share, spread)
        other = self._at(middle.share + (-_REACH if middle.met else _REACH), spread)
        if middle.met != other.met:
            low, high = (other, middle) if middle.met else (middle, other)
            self._narrow(low, high, _RETRIES)
