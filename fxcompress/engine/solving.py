"""Shares that a policy leaves out and that depend on weights: solved for its budgets when the step is carried out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..diagnostics import Diagnostic, Label, PlanError
from ..graph.captured import Example
from ..graph.timing import latency
from ..plan import Binder, Plan, Step
from ..plan.budgets import METRICS
from ..plan.solve import CLOSE, Solver, can_be_timed
from ..plan.trial import Dress
from ..policy.model import Policy


def solved_now(step: Step, steps: Sequence[Step], binder: Binder, plan: Plan, dense_seconds: float,
               dress: Dress) -> tuple[Step, tuple[str, ...]]:
    """`step` with the share that meets the budgets, and what to note.

    What the plan found holds where shapes alone decide how much leaves. Else it is tried on the weights as they are,
    with all steps that are still to come, and where it doesn't hold another is looked for. Raises PlanError: FXC0320
    where none meets the budgets, FXC0321 where no budget can be judged.
    """
    if step.solved is None or (step.solved.share is not None and _by_shapes(steps)):
        return step, ()
    known, rest = step.solved, [other for other in steps if other.number >= step.number]
    solver = _solver(step, rest, binder, plan, dense_seconds, dress)
    if known.share is not None and 1 - 2 * CLOSE <= solver.load(known.share, known.spread) <= 1:
        return step, ()
    point = solver.search()
    if not point.met:
        raise PlanError([solver.refusal(point)])
    solved = solver.settled(point)[step.number]
    note = (f"`{solved.name} = {100 * point.share:.4g}%` (line {step.action.span.line}) is solved for {solved.why}, "
            "with the weights as they are")
    return step.with_solved(solved), (note,)


def _by_shapes(steps: Sequence[Step]) -> bool:
    return all(step.pass_.sizes_from() == "shapes" for step in steps)


def _solver(step: Step, rest: Sequence[Step], binder: Binder, plan: Plan, dense_seconds: float, dress: Dress) -> Solver:
    policy: Policy = binder.policy
    timed = can_be_timed(policy, binder.captured)
    budgets = tuple(budget for budget in policy.budgets if budget.metric in METRICS or timed)
    if not budgets:
        raise PlanError([Diagnostic(
            "FXC0321", f"`{step.pass_.lever}` can't be found: no budget can be judged before the model is finished",
            Label(step.action.span, "how much?"), notes=(f"the target is `{policy.target}`, and times are measured for "
                                                         "models and targets on the CPU",),
            help=f"give `{step.pass_.lever}`, or a budget of `macs`, `params` or `size`")])
    free = frozenset(other.number for other in rest if other.solved is not None)
    weighed = max(other.number for other in rest if other is step or other.pass_.sizes_from() != "shapes")

    def clock(modules: Sequence[nn.Module], example: Example) -> tuple[float, ...]:
        return dense_seconds, latency(modules[1], example)

    return Solver(binder, tuple(rest), budgets, plan.before, free, weighed, dress, clock if timed else None)
