"""What a checked parameter holds: plain Python numbers where possible, and small frozen classes where not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

TimeUnit = Literal["steps", "epochs", "samples"]


@dataclass(frozen=True)
class Duration:
    """A stretch of training: `100 steps`, `2 epochs`, `256 samples`."""

    count: float
    unit: TimeUnit

    def __str__(self) -> str:
        return f"{self.count:g} {self.unit}"


@dataclass(frozen=True)
class Window:
    """When a phase runs: `over epochs 0..12`, or `over 0%..40% of training` (unit `training`, fractions)."""

    start: float
    end: float
    unit: Literal["steps", "epochs", "training"]


@dataclass(frozen=True)
class NofM:
    """`2:4`: of every `m` weights in a row of inputs, `n` are kept."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Call:
    """A named value with arguments, such as `block(4, 4)` or `percentile(99.9%)`."""

    name: str
    args: tuple[object, ...] = ()
    kwargs: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        words = [str(arg) for arg in self.args] + [f"{key} = {value}" for key, value in self.kwargs]
        return f"{self.name}({', '.join(words)})"


# The cubic is the gradual pruning schedule of Zhu and Gupta, "To prune, or not to prune", 2017, equation (1).
RAMPS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cubic": lambda t: 1.0 - (1.0 - t) ** 3,
    "cosine": lambda t: (1.0 - math.cos(math.pi * t)) / 2.0,
    "step": lambda t: 1.0 if t >= 1.0 else 0.0,
}


@dataclass(frozen=True)
class Ramp:
    """A value that moves from `start` to `end` over its phase: `cubic(0% -> 60%)`. `shape` is a key of `RAMPS`."""

    shape: str
    start: float
    end: float

    def at(self, progress: float) -> float:
        """The value at `progress` in [0, 1] of the phase; outside it the ends hold."""
        moved = RAMPS[self.shape](min(1.0, max(0.0, progress)))
        return self.start + (self.end - self.start) * moved


@dataclass(frozen=True)
class SteadyRamp(Ramp):
    """A value that moves by the same amount every step or epoch until it has reached `end`, however long its phase is:
    `linear(10 -> 1, by 0.07 per step)`. The end is its floor (or its ceiling); at the end of the phase it is written,
    as that of any ramp."""

    rate: float = 0.0  # more than 0
    per: Literal["steps", "epochs"] = "steps"

    def after(self, elapsed: float) -> float:
        """The value when `elapsed` steps or epochs have passed since the phase began; parts of one don't count."""
        moved = self.rate * max(0, math.floor(elapsed + 1e-9))
        return min(self.end, self.start + moved) if self.end >= self.start else max(self.end, self.start - moved)


@dataclass(frozen=True)
class Unset:
    """The value of a parameter that rests on policy parameters not given yet: checked by their declared types only."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"(needs {', '.join(self.names)})"
