"""The clock of a training: steps and epochs, and how far a phase's window has gone."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..policy.values import Duration, Window

_CLOSE = 1e-9  # of an epoch: sums of fractions such as 0.1 must not miss their mark


@dataclass
class Clock:
    """`advance()` once a training step, `end_epoch()` once an epoch.

    Inside an epoch time runs on only where `steps_per_epoch` is known: given, or learned from the first whole epoch.
    """

    steps: int = 0
    epochs: int = 0
    in_epoch: int = 0  # steps since the last epoch ended
    steps_per_epoch: int | None = None
    total_epochs: float | None = None  # of the whole training, for windows in percent
    learns: bool = field(init=False)

    def __post_init__(self) -> None:
        self.learns = self.steps_per_epoch is None

    def advance(self) -> None:
        """One training step is done."""
        self.steps += 1
        self.in_epoch += 1

    def end_epoch(self) -> None:
        """One epoch is done."""
        if self.learns and self.in_epoch:
            self.steps_per_epoch = self.in_epoch
        self.epochs += 1
        self.in_epoch = 0

    @property
    def epoch(self) -> float:
        """Epochs done, with the part of the one that runs; an epoch longer than known waits at its end."""
        part = self.in_epoch / self.steps_per_epoch if self.steps_per_epoch else 0.0
        return self.epochs + (min(part, 1.0) if self.learns else part)

    def now(self, unit: str) -> float:
        """The time in `steps`, in `epochs`, or in `training` (a fraction of `total_epochs`, which must be known)."""
        if unit == "steps":
            return float(self.steps)
        if unit == "epochs":
            return self.epoch
        assert self.total_epochs, "windows in percent of a training of unknown length are refused at compile"
        return self.epoch / self.total_epochs

    def reached(self, time: float, unit: str) -> bool:
        """Whether `time` has come."""
        return self.now(unit) >= time - _CLOSE

    def progress(self, window: Window) -> float:
        """How far `window` has gone, in [0, 1]."""
        length = window.end - window.start
        if length <= 0:
            return 1.0 if self.reached(window.end, window.unit) else 0.0
        return min(1.0, max(0.0, (self.now(window.unit) - window.start) / length))


@dataclass
class Ticker:
    """The times of `every = 100 steps`, counted from when its phase began."""

    every: Duration
    began: float
    count: int = 0  # how many times have come

    def due(self, clock: Clock) -> bool:
        """Whether the next time has come; if so, it and all before it are past."""
        passed = int((clock.now(self.every.unit) - self.began) / self.every.count + _CLOSE)
        if passed <= self.count:
            return False
        self.count = passed
        return True
