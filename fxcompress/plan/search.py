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
_NARROWINGS, _RETRIES = 16, 5  # trials that close in on the limit: with the first spread, with each further one
_REACH = 0.02  # how far from the best share so far further spreads look
_LEAPS = 4  # extrapolations, before the whole is tried
_TINY = 1e-9


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
    def left(self) -> float:
        """The logarithm of what the share leaves. Costs of a network are near a power of that, most near its square, so
        that `cost` is nearly linear in it."""
        return math.log(1.0 - self.share + GRID)

    @property
    def cost(self) -> float:
        """The logarithm of the load."""
        return math.log(min(max(self.load, _TINY), 1 / _TINY))


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
        share = 1.0 - math.exp(-low.cost / 2)
        for leap in range(_LEAPS):
            point = self._at(max(share, low.share + GRID), low.spread)
            if point.met or point.share >= 1.0:
                return low, point
            power = (low.cost - point.cost) / (low.left - point.left)
            share = 1.0 - math.exp(point.left - (1 + leap) * (point.cost / power + GRID)) if power > 0 else 1.0
            low = point
        return low, self._at(1.0, low.spread)

    def _narrow(self, low: Point, high: Point, trials: int) -> None:
        """Close in on the limit between two points: by false position on logarithms, by halves every third time."""
        aim = math.log(1.0 - self.tolerance / 2)
        for number in range(trials):
            if self._enough() or high.share - low.share < 1.5 * GRID:
                return
            part = (low.cost - aim) / (low.cost - high.cost)
            share = 1.0 + GRID - math.exp(low.left + part * (high.left - low.left))
            if number % 3 == 2 or math.isinf(low.load):
                share = (low.share + high.share) / 2
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
