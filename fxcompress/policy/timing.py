"""What a policy asks of time that can't be had: found before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..diagnostics import Diagnostic, Label
from .model import Action, Phase
from .values import Duration, Ramp

START = "(start)"  # the phase of the actions that stand in no phase


def timing_problems(phases: Iterable[Phase]) -> list[Diagnostic]:
    """Ramps and repetitions (FXC0520) and regularised training (FXC0509) in a phase that has no window; weights to
    rewind to that aren't there yet when the phase begins (FXC0522)."""
    found: list[Diagnostic] = []
    for phase in phases:
        problems = _without_window if phase.window is None else _rewinds
        found.extend(problem for action in phase.actions for problem in problems(phase, action))
    return found


def length_problems(phases: Iterable[Phase], epochs: float | None) -> list[Diagnostic]:
    """Windows over a share of a training whose length in epochs isn't known (FXC0521)."""
    return [Diagnostic(
        "FXC0521", f"phase `{phase.name}` runs over a share of the training, whose length isn't known",
        Label(phase.span), help="say how long you train: `compile(..., epochs=30)`")
        for phase in phases if phase.window is not None and phase.window.unit == "training" and not epochs]


def _without_window(phase: Phase, action: Action) -> Iterator[Diagnostic]:
    outside = phase.name == START
    why = "what stands in no phase happens at once" if outside else f"phase `{phase.name}` happens at once"
    for pair in action.pairs:
        for name, value in pair.values.items():
            if isinstance(value, Ramp):
                yield Diagnostic(
                    "FXC0520", f"the ramp of `{name}` has no time to run: {why}", Label(pair.span),
                    secondary=() if outside else (Label(phase.span, "has no window"),),
                    help=f"{'put it into a phase with a window' if outside else 'give the phase a window'}: "
                         f"`phase {'learn' if outside else phase.name} over epochs 0..10`")
    for name, value in action.values.items():
        if isinstance(value, Ramp) or (name == "every" and isinstance(value, Duration)):
            what = f"the ramp of `{name}`" if isinstance(value, Ramp) else f"`{name}`"
            yield Diagnostic(
                "FXC0520", f"{what} has no time to run: {why}", Label(action.value_spans.get(name, action.span)),
                secondary=() if outside else (Label(phase.span, "has no window"),),
                help=f"{'put it into a phase with a window' if outside else 'give the phase a window'}: "
                     f"`phase {'sparsify' if outside else phase.name} over epochs 0..10`")
        elif name == "sparsify" and value != "none":
            yield Diagnostic(
                "FXC0509", f"`sparsify` has no time to train: {why}", Label(action.value_spans.get(name, action.span)),
                secondary=() if outside else (Label(phase.span, "has no window"),),
                help=f"{'put it into a phase with a window' if outside else 'give the phase a window'}: "
                     f"`phase {'thin' if outside else phase.name} over epochs 0..10`")


def _rewinds(phase: Phase, action: Action) -> Iterator[Diagnostic]:
    when, window = action.values.get("rewind"), phase.window
    if isinstance(when, Duration) and window is not None and when.unit == window.unit and when.count > window.start:
        yield Diagnostic(
            "FXC0522", f"the weights of {when} aren't known yet when phase `{phase.name}` begins",
            Label(action.value_spans.get("rewind", action.span)), secondary=(Label(phase.span, "begins before"),),
            help="rewind to `initial` or to an earlier time, or let the phase begin later")
