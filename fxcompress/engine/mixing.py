"""`mixed = auto`: as few layers in float as the policy's expectations need, found on the finished simulation."""

from __future__ import annotations

from collections.abc import Mapping

from ..diagnostics import Diagnostic, Label, PlanError
from ..graph.calibration import Calibration
from ..graph.captured import Captured
from ..graph.select import Bound
from ..passes.shared.calibrating import leave_in_float
from ..passes.shared.recovery_mixed import drop_left, waiting
from ..policy.model import Policy
from .measure import Baseline, Measuring

METRIC = "drift"  # the only one that rounding changes


def require_expectations(policy: Policy) -> None:
    """Raise PlanError (FXC0576) where layers are to stay in float as expectations need it, and there are none."""
    asking = [action for phase in policy.phases for action in phase.actions if action.values.get("mixed") == "auto"]
    if asking and not any(expect.metric == METRIC for expect in policy.expects):
        raise PlanError([Diagnostic(
            "FXC0576", "`mixed = auto` leaves layers in float until the policy's expectations hold, and there are none",
            Label(action.value_spans.get("mixed", action.span), "up to what?"),
            help="add what the result has to keep, `expect drift(output) < 5%`, or say a share: `mixed = 10%`")
            for action in asking])


def keep_expectations(final: Captured, policy: Policy, baseline: Baseline, lets: Mapping[str, Bound],
                      data: Calibration | None) -> list[str]:
    """Leave layers of `final`, a simulation, in float, in place, until every `expect drift` holds, by bisection over
    how many; all of them where none is enough. Biases are corrected anew on `data`. Returns what to note."""
    order = waiting(final)
    expects = [expect for expect in policy.expects if expect.metric == METRIC]
    if not order or not expects:
        return []

    def holds(count: int) -> bool:
        trial = final.copy()
        leave_in_float(trial, order[:count], data)
        drop_left(trial)
        trial.refresh()
        measuring = Measuring(trial, baseline, lets)
        return all(measuring.measure(expect).holds for expect in expects)

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    rows = leave_in_float(final, order[:low], data)
    named = "; ".join(f"{row.path} ({row.sqnr:.1f} dB, {row.macs:.1%})" for row in rows[:8])
    more = f"; and {len(rows) - 8} more" if len(rows) > 8 else ""
    return [f"mixed: {low} of {len(order)} layers stay in float, {sum(row.macs for row in rows):.1%} of the MACs, so "
            f"that what is expected holds{': ' if rows else ''}{named}{more}"]
