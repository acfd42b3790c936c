"""A policy in time: phases begin, their numbers move, they end. What a phase does to the graph is `begin`'s matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..graph.site import Scheduled
from ..passbase import Facet
from ..plan import Step
from ..policy.model import Phase
from .clock import Clock
from .log import Entry
from .schedule import Schedule

Begin = Callable[[Phase], Sequence[tuple[Step, Scheduled]]]
Wrote = Callable[[Schedule], None]
End = Callable[[Phase], None]  # told when the window of a phase has ended
Rates = Callable[[], Callable[[Tensor], float]]  # the learning rate of each parameter, as it is now


@dataclass
class PhaseRun:
    """One phase: where it stands, and what moves in it."""

    phase: Phase
    status: Literal["waiting", "running", "done"] = "waiting"
    schedules: list[Schedule] = field(default_factory=list)

    def progress(self, clock: Clock) -> float:
        """How far it is, in [0, 1]."""
        if self.status != "running":
            return 1.0 if self.status == "done" else 0.0
        return clock.progress(self.phase.window) if self.phase.window is not None else 1.0

    def over(self, clock: Clock) -> bool:
        """Whether its time is up; a phase without a window ends at once."""
        window = self.phase.window
        return window is None or clock.reached(window.end, window.unit)


class Training:
    """All phases of a policy on one clock. `begin` carries out the actions of a phase and says what moves in it;
    `wrote` is told of every number written while training, `end` of every window that has passed."""

    def __init__(self, phases: Sequence[Phase], clock: Clock, begin: Begin, wrote: Wrote, end: End) -> None:
        """Nothing happens before the first `tick`."""
        self.clock, self._begin, self._wrote, self._end = clock, begin, wrote, end
        self.runs = [PhaseRun(phase) for phase in phases]
        self._by_name = {run.phase.name: run for run in self.runs}

    def trained(self, rates: Rates) -> None:
        """A training step was done: let what acts on the weights between rewrites act."""
        running = [schedule for run in self.runs if run.status == "running" for schedule in run.schedules
                   if schedule.what.companion is not None]
        if running:
            rate = rates()
            for schedule in running:
                schedule.trained(rate)

    def tick(self) -> None:
        """Bring everything in line with the clock: end what is over, begin what is due, until nothing changes."""
        for run in self.runs:
            if run.status == "running":
                self._update(run)
        while ready := [run for run in self.runs if self._ready(run)]:
            self._start(ready[0])

    def _ready(self, run: PhaseRun) -> bool:
        window = run.phase.window
        return (run.status == "waiting" and all(self._by_name[name].status == "done" for name in run.phase.after)
                and (window is None or self.clock.reached(window.start, window.unit)))

    def _start(self, run: PhaseRun) -> None:
        self._take_up(run)
        for schedule in run.schedules:
            if schedule.start(self.clock):
                self._wrote(schedule)
        self._update(run)

    def _take_up(self, run: PhaseRun) -> None:
        run.schedules = [Schedule(step, what, run.phase.window) for step, what in self._begin(run.phase)]
        run.status = "running"

    def _update(self, run: PhaseRun) -> None:
        last = run.over(self.clock)
        for schedule in run.schedules:
            if schedule.update(self.clock, last=last):
                self._wrote(schedule)
        if last and not any(schedule.waits for schedule in run.schedules):
            run.status = "done"
            if run.phase.window is not None:
                self._end(run.phase)

    @property
    def done(self) -> bool:
        """Whether every phase has ended."""
        return all(run.status == "done" for run in self.runs)

    @property
    def settled(self) -> bool:
        """Whether nothing will change the graph or a mask any more: no phase is still to come, and in those that run
        only loss terms move."""
        return all(run.status != "waiting" for run in self.runs) and all(
            schedule.step.pass_.facet is Facet.LOSS for run in self.runs if run.status == "running"
            for schedule in run.schedules)

    @property
    def numbers(self) -> dict[str, float]:
        """What moves and what has moved, as it is now: `phase: name` -> value, with the number of the step in the plan
        where that isn't enough."""
        found: dict[str, float] = {}
        for run in self.runs:
            for schedule in run.schedules:
                name = f"{run.phase.name}: {schedule.what.name}"
                if schedule.value is not None:
                    found[name if name not in found else f"{name} ({schedule.step.number})"] = float(schedule.value)
        return found

    def unbegun(self) -> list[Phase]:
        """Phases that have not begun."""
        return [run.phase for run in self.runs if run.status == "waiting"]

    def unreached(self) -> list[Schedule]:
        """Numbers that have not come to their end."""
        return [schedule for run in self.runs for schedule in run.schedules
                if schedule.waits or schedule.value != schedule.end]

    def drop(self, which: Callable[[Step], bool]) -> None:
        """Let the numbers of these steps move no more."""
        for run in self.runs:
            run.schedules = [schedule for schedule in run.schedules if not which(schedule.step)]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the clock, and every phase with its numbers."""
        clock = {key: getattr(self.clock, key) for key in ("steps", "epochs", "in_epoch", "steps_per_epoch")}
        phases = {run.phase.name: {"status": run.status, "schedules": [schedule.state() for schedule in run.schedules]}
                  for run in self.runs}
        return {"clock": clock, "phases": phases}

    def load(self, state: Mapping[str, Any], past: Iterable[tuple[str, Entry]],
             repeat: Callable[[Entry], None]) -> None:
        """Take up a checkpoint's. `past` are the rewrites to carry out here, with the phase of each, in the order they
        were carried out there; those of a phase that began are `begin`'s, those of a number that moved are `repeat`ed.
        """
        for key, value in state["clock"].items():
            setattr(self.clock, key, value)
        for name, entry in past:
            if self._by_name[name].status == "waiting":
                self._take_up(self._by_name[name])
            if entry.value is not None or entry.ended:
                repeat(entry)
        for run in self.runs:
            saved = state["phases"][run.phase.name]
            if run.status == "waiting" and saved["status"] != "waiting":
                self._take_up(run)
            run.status = saved["status"]
            for schedule, values in zip(run.schedules, saved["schedules"], strict=True):
                schedule.load(values)

