"""Budgets: judged on the planned model, met or refused with the numbers, what can be reached, and a way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

from ..diagnostics import Diagnostic, Label
from ..passbase import Facet, Pass
from ..policy.model import Budget
from ..policy.numeric import Percent
from .lower import Step
from .model import PlannedBudget, Totals
from .text import amount, percent

AFTER_MEASURING = "(known after measuring)"
MOST = 0.95  # of a share: what `reach` tries at most
TRIES = 6  # dry runs that look for a way out
METRICS: Mapping[str, tuple[str, str]] = {  # metric of a budget -> (field of `Totals`, unit)
    "macs": ("macs", "MACs"), "params": ("params", ""), "size": ("bytes", "B"),
}

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
