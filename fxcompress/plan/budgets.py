"""Budgets: judged on the planned model, met or refused with the numbers, what can be reached, and a way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from ..diagnostics import Diagnostic, Label
from ..graph.site import UNKNOWN_WEIGHTS
from ..passbase import Facet, Pass
from ..policy.model import Budget
from ..policy.numeric import Percent
from .lower import Step
from .model import PlannedBudget, Totals
from .text import amount, percent

AFTER_MEASURING = "(known after measuring)"
MOST = 0.95  # of a share: what `reach` tries at most
TRIES = 6  # dry runs that look for a way out
FEW = 4  # notes of passes that a refusal repeats
METRICS: Mapping[str, tuple[str, str]] = {  # metric of a budget -> (field of `Totals`, unit)
    "macs": ("macs", "MACs"), "params": ("params", ""), "size": ("bytes", "B"),
}


@dataclass(frozen=True)
class Reached:
    """What a planned model comes to: its totals, the seconds that one forward pass takes the dense model and it (None
    where that wasn't measured), and what the passes had to say."""

    totals: Totals
    seconds: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


DryRun = Callable[[tuple[Step, ...]], Totals | None]  # totals after these steps, None where they can't be carried out


def judge(budget: Budget, before: Totals, after: Totals) -> tuple[PlannedBudget | None, Diagnostic | None]:
    """The budget as planned if it is met or can't be judged before measuring, else why it is refused."""
    text, place = budget.span.text, str(budget.span)
    if budget.metric not in METRICS:
        return PlannedBudget(text, place, budget.metric, float(budget.limit), None, AFTER_MEASURING, "unknown"), None
    dense, reached = value_of(budget, before), value_of(budget, after)
    limit = float(limit_of(budget, before))
    shown = _shown(budget, reached, dense)
    if is_met(budget, before, after):
        return PlannedBudget(text, place, budget.metric, limit, reached, shown, "met"), None
    unit = METRICS[budget.metric][1]
    return None, Diagnostic(
        "FXC0320", f"the budget is not met: {budget.metric} would be {shown}",
        Label(budget.span, f"{amount(reached - limit, unit)} too much"), notes=(
            f"the limit is {amount(limit, unit)}, the planned model has {amount(reached, unit)}, the dense one "
            f"{amount(dense, unit)}",))


def later(budget: Budget, before: Totals) -> PlannedBudget:
    """A budget on what depends on weights that aren't there yet."""
    limit = float(limit_of(budget, before)) if budget.metric in METRICS else float(budget.limit)
    return PlannedBudget(budget.span.text, str(budget.span), budget.metric, limit, None, UNKNOWN_WEIGHTS, "unknown")


def value_of(budget: Budget, totals: Totals) -> float:
    """What the budget limits, in base units."""
    return float(getattr(totals, METRICS[budget.metric][0]))


def limit_of(budget: Budget, before: Totals) -> float:
    """The limit in base units."""
    return budget.limit * value_of(budget, before) if budget.relative else budget.limit


def is_met(budget: Budget, before: Totals, after: Totals) -> bool:
    """Whether the planned model keeps the budget."""
    reached, limit = value_of(budget, after), limit_of(budget, before)
    return reached < limit if budget.op == "<" else reached <= limit


def load_of(budget: Budget, dense: Totals, reached: Reached) -> float:
    """What is reached as a part of the limit, above 1 where the budget isn't met. 0 for a time that wasn't measured."""
    if budget.metric in METRICS:
        value, limit = value_of(budget, reached.totals), limit_of(budget, dense)
    elif reached.seconds is not None:
        value, limit = reached.seconds[1], budget.limit * (reached.seconds[0] if budget.relative else 1.0)
    else:
        return 0.0
    if value == limit:
        return 1.0 if budget.op == "<=" else 1.0 + 1e-9
    return value / limit if limit else math.inf


def timed(budget: Budget, seconds: tuple[float, ...]) -> PlannedBudget:
    """A budget of time that was solved by measuring."""
    dense, found = seconds
    shown = f"{_time(found)}{_share_of(found, dense)}, as measured here"
    limit = budget.limit * dense if budget.relative else budget.limit
    return PlannedBudget(budget.span.text, str(budget.span), budget.metric, limit, found, shown, "met")


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _share_of(seconds: float, dense: float) -> str:
    return f", {percent(seconds / dense)} of dense" if dense else ""


def unreachable(budget: Budget, dense: Totals, reached: Reached | None, free: Sequence[Step]) -> Diagnostic:
    """Why no share of the steps `free` meets a budget: `reached` is what the whole share comes to."""
    names = " and ".join(f"`{step.pass_.lever} = 100%` (line {step.action.span.line})" for step in free)
    place, help = Label(budget.span, "can't be met"), "select more layers, or raise the limit"
    if reached is None:
        return Diagnostic("FXC0320", f"the budget is not met, whatever is removed: {names} can't be carried out", place,
                          help=help)
    if budget.metric in METRICS:
        value, unit = value_of(budget, reached.totals), METRICS[budget.metric][1]
        shown, limit = _shown(budget, value, value_of(budget, dense)), amount(limit_of(budget, dense), unit)
    else:
        assert reached.seconds is not None, "a time decides only where it was measured"
        before, after = reached.seconds
        shown = f"{_time(after)}{_share_of(after, before)}"
        limit = _time(budget.limit * before if budget.relative else budget.limit)
    notes = [f"the limit is {limit}; that is what is left with {names}", *dict.fromkeys(reached.notes)]
    more = [f"and {len(notes) - 1 - FEW} more notes"] if len(notes) - 1 > FEW else []
    return Diagnostic("FXC0320", f"the budget can't be met: {budget.metric} comes down to {shown} at best", place,
                      notes=(*notes[: 1 + FEW], *more), help=help)


def _shown(budget: Budget, reached: float, dense: float) -> str:
    share = percent(reached / dense) if dense else "0%"
    return f"{share} of dense" if budget.relative else f"{amount(reached, METRICS[budget.metric][1])}, {share} of dense"


def way_out(refusal: Diagnostic, budget: Budget, steps: tuple[Step, ...], before: Totals,
            dry_run: DryRun) -> Diagnostic:
    """`refusal` with what can be reached, and the settings that would meet the budget: found by dry runs that move
    every share of the shrinking actions together from what the policy says towards `MOST`."""
    levers = {step.number: names for step in steps if (names := _levers(step.pass_))}
    if not levers:
        return replace(refusal, notes=(*refusal.notes, "no action of this policy makes the model smaller"),
                       help=_no_lever(budget))

    def run(share: float) -> Totals | None:
        return dry_run(tuple(_moved(step, levers.get(step.number, ()), share) for step in steps))

    furthest = run(1.0)
    if furthest is None or not is_met(budget, before, furthest):
        reached = f": {_shown(budget, value_of(budget, furthest), value_of(budget, before))}" if furthest else ""
        note = f"even with {_settings(steps, levers, 1.0)} it is not met{reached}"
        return replace(refusal, notes=(*refusal.notes, note), help="select more layers, or raise the limit")
    low, high, best = 0.0, 1.0, furthest
    for _ in range(TRIES):
        middle = (low + high) / 2
        found = run(middle)
        if found is not None and is_met(budget, before, found):
            high, best = middle, found
        else:
            low = middle
    shown = _shown(budget, value_of(budget, best), value_of(budget, before))
    return replace(refusal, help=f"{_settings(steps, levers, high)} would meet it: {shown}; or raise the limit")


def _no_lever(budget: Budget) -> str:
    masks = "; masks don't: they leave the weights in place" if budget.metric == "macs" else ""
    return f"add an action that takes channels away (`remove channels(...)`){masks}; or raise the limit"


def _levers(pass_: Pass) -> tuple[str, ...]:
    """The parameters of a shrinking pass that are shares: more of them leaves less of the model. A share that is all by
    default (`max_ratio`) is a limit that somebody set, and not turned."""
    if pass_.facet not in (Facet.SHAPE, Facet.TOPOLOGY):
        return ()
    return tuple(p.name for p in pass_.parameters()
                 if isinstance(p.type, Percent) and p.default != p.type.high
                 and isinstance(getattr(pass_, p.name), float))


def _value(pass_: Pass, name: str, share: float) -> float:
    """The setting moved by `share` of the way to `MOST`, rounded up to a percent."""
    now = float(getattr(pass_, name))
    moved = now + share * max(0.0, MOST - now)
    return min(1.0, -(-round(moved * 1e6) // 10_000) / 100)


def _moved(step: Step, names: tuple[str, ...], share: float) -> Step:
    known = {f.name for f in fields(step.pass_)}
    values = {name: _value(step.pass_, name, share) for name in names if name in known}
    return replace(step, pass_=replace(step.pass_, **values)) if values else step


def _settings(steps: tuple[Step, ...], levers: Mapping[int, tuple[str, ...]], share: float) -> str:
    """`` `ratio = 45%` (edge.fxc:14)`` of every action that was moved."""
    found = [f"`{name} = {percent(_value(step.pass_, name, share))}` (line {step.action.span.line})"
             for step in steps for name in levers.get(step.number, ())]
    return " and ".join(found)
