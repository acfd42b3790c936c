"""Trials: the steps of a plan carried out on a copy that is thrown away, to see what would be left of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..diagnostics import FxcError
from ..graph.apply import at_end, carry_gradients
from ..graph.captured import Captured
from ..graph.site import Site
from .bind import Binder
from .lower import Step

Dress = Callable[[Site], Site]  # gives a site what the one who carries the steps out knows: seed, calibration data


@dataclass(frozen=True)
class Trial:
    """What came out: the model, and what the passes whose share is looked for had to say."""

    captured: Captured
    notes: tuple[str, ...]


def attempt(binder: Binder, steps: Sequence[Step], weights_until: int, dress: Dress) -> Trial | None:
    """`steps` carried out, without checks, on a copy of what `binder` is bound to; None where one can't be.

    Steps up to the number `weights_until` see the weights of a captured model that has them; all others, and all
    steps on a skeleton, shapes alone. Ramps are at their ends.
    """
    source, notes = binder.captured, list[str]()
    weights_until = weights_until if source.concrete else 0
    on = binder.on(source.skeleton() if not steps or steps[0].number > weights_until else _whole(source))
    for step in steps:
        if step.number > weights_until and on.captured.concrete:
            on = on.on(on.captured.skeleton())
        site = on.site(step.phase, step.action, step.leaves)
        if on.sink.items:
            return None
        if site is None:
            continue
        try:
            outcome = on.carry_out(replace(step, pass_=at_end(step.pass_.untested())), dress(site), checked=False)
        except FxcError:
            return None
        if step.solved is not None:
            notes += outcome.notes
    return Trial(on.captured, tuple(notes))


def _whole(captured: Captured) -> Captured:
    """A copy with weights and gradients."""
    made = captured.copy()
    carry_gradients(captured.module, made.module)
    return made
