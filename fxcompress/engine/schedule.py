"""Numbers that move in training: each is written at its times, and at the end of its phase to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..graph.site import Scheduled
from ..plan import Step
from ..policy.values import Ramp, SteadyRamp, Window
from .clock import Clock, Ticker


@dataclass
class Schedule:
    """One `Scheduled` of a running phase. `window` is None for a phase that happens at once: a constant then."""

    step: Step
    what: Scheduled
    window: Window | None
    ticker: Ticker | None = None
    value: float | None = None  # the last that was written
    began: float = 0.0  # when, in the unit of a steady ramp
    waits: bool = field(init=False)  # it was due, but could not be written yet

    def __post_init__(self) -> None:
        self.waits = not self.what.written
        if self.what.written:
            self.value = self.target(1.0)

    @property
    def end(self) -> float:
        """The value it has to reach."""
        return self.target(1.0)

    def target(self, progress: float) -> float:
        """The value for `progress` in [0, 1] of the phase."""
        ramp = self.what.ramp
        return ramp.at(progress) if isinstance(ramp, Ramp) else float(ramp)

    def start(self, clock: Clock) -> bool:
        """Begin: the times of `every` count from here. Returns whether a value was written, now or by the rewrite."""
        if self.what.every is not None:
            self.ticker = Ticker(self.what.every, clock.now(self.what.every.unit))
        if isinstance(self.what.ramp, SteadyRamp):
            self.began = clock.now(self.what.ramp.per)
        return not self.waits or self._write(self._at(clock))

    def update(self, clock: Clock, *, last: bool) -> bool:
        """Write what is due now, the end value if the phase is at its `last` moment; returns whether it was written."""
        due = self.ticker is not None and self.ticker.due(clock)
        if last:
            return (due or self.waits or self.value != self.end) and self._write(self.end)
        value = self._at(clock)
        each_step = self.what.every is None and value != self.value
        return (due or self.waits or each_step) and self._write(value)

    def _at(self, clock: Clock) -> float:
        if isinstance(self.what.ramp, SteadyRamp):
            return self.what.ramp.after(clock.now(self.what.ramp.per) - self.began)
        return self.end if self.window is None else self.target(clock.progress(self.window))

    def _write(self, value: float) -> bool:
        self.waits = not self.what.write(value)
        if not self.waits:
            self.value = value
        return not self.waits

    def trained(self, rate: Callable[[Tensor], float]) -> None:
        """A training step was done, with these learning rates."""
        if self.what.companion is not None:
            self.what.companion.trained(self.ticker.count if self.ticker is not None else 0, rate)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "waits": self.waits, "began": self.began,
                "ticker": None if self.ticker is None else (self.ticker.began, self.ticker.count),
                "companion": None if self.what.companion is None else self.what.companion.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's."""
        self.value, self.waits, self.began = state["value"], bool(state["waits"]), float(state["began"])
        if state["ticker"] is not None and self.what.every is not None:
            self.ticker = Ticker(self.what.every, *state["ticker"])
        if self.what.companion is not None:
            self.what.companion.load(state["companion"])
