"""What a policy asks of time that can't be had: found before any work. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from ..diagnostics import Diagnostic, Label
from ..policy.model import Action, Phase, Policy
from ..policy.values import Duration, Ramp


def timing_problems(policy: Policy, epochs: float | None) -> list[Diagnostic]:
    """Windows in percent of a training whose length (`epochs`) isn't known (FXC0521); ramps and repetitions in a phase
    that has no window (FXC0520); weights to rewind to that aren't there yet when the phase begins (FXC0522)."""
    found: list[Diagnostic] = []
    for phase in policy.phases:
        if phase.window is None:
            found.extend(problem for action in phase.actions for problem in _without_window(phase, action))
            continue
        if phase.window.unit == "training" and not epochs:
            found.append(Diagnostic(
                "FXC0521", f"phase `{phase.name}` runs over a share of the training, whose length isn't known",
                Label(phase.span), help="say how long you train: `compile(..., epochs=30)`"))
        found.extend(problem for action in phase.actions for problem in _rewinds(phase, action))
    return found


def _without_window(phase: Phase, action: Action) -> Iterator[Diagnostic]:
    for name, value in action.values.items():
        if not (isinstance(value, Ramp) or (name == "every" and isinstance(value, Duration))):
            continue
        what = f"the ramp of `{name}`" if isinstance(value, Ramp) else f"`{name}`"
        yield Diagnostic(
            "FXC0520", f"{what} has no time to run: phase `{phase.name}` happens at once",
            Label(action.value_spans.get(name, action.span)), secondary=(Label(phase.span, "has no window"),),
            help=f"give the phase one: `phase {phase.name.strip('()')} over epochs 0..10`")


def _rewinds(phase: Phase, action: Action) -> Iterator[Diagnostic]:
    when, window = action.values.get("rewind"), phase.window
    if isinstance(when, Duration) and window is not None and when.unit == window.unit and when.count > window.start:
        yield Diagnostic(
            "FXC0522", f"the weights of {when} aren't known yet when phase `{phase.name}` begins",
            Label(action.value_spans.get("rewind", action.span)), secondary=(Label(phase.span, "begins before"),),
            help=f"rewind to {window.start:g} {window.unit} or earlier, or let the phase begin later")
