"""How much, where a policy leaves it out: the one share of all actions without one with which every budget is just met.

docs/adr/one-share-is-solved-from-budgets.md says why one share, and how it comes close.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..diagnostics import Diagnostic
from ..graph.captured import Captured, Example
from ..graph.timing import TOLERANCE, latencies
from ..policy.model import Budget, Policy
from .bind import Binder
from .budgets import METRICS, Reached, load_of, unreachable
from .lower import Step
from .materialise import materialised
from .model import Solved, Totals
from .search import Point, Search
from .totals import totals_of
from .trial import Dress, attempt

CLOSE = 0.005  # of a limit that is counted: how near below it the search is content
TRIES, TIMED_TRIES = 40, 8
UNGUIDED = 0.5  # the share that a plan goes on with where nothing can be known before the step is carried out

Clock = Callable[[Sequence[nn.Module], Example], tuple[float, ...]]  # seconds a forward pass of each module


@dataclass(frozen=True)
class Solution:
    """What was found: `solved` by the numbers of steps, `reached` with it (None where that is known only when the steps
    are carried out, or nothing was to be solved), or why nothing was found."""

    solved: Mapping[int, Solved]
    reached: Reached | None = None
    captured: Captured | None = None  # the model as it comes out, where weights decide that
    counts: bool = True  # whether totals can be known before the steps are carried out
    refusals: tuple[Diagnostic, ...] = ()


@dataclass
class Solver:
    """Looks for the share of those of `steps` with the numbers `free`, on the model that `binder` is bound to."""

    binder: Binder
    steps: tuple[Step, ...]
    budgets: tuple[Budget, ...]
    dense: Totals
    free: frozenset[int]
    weights_until: int = 0
    dress: Dress = field(default=lambda site: site)
    clock: Clock | None = None  # None where no budget has to be timed
    seen: dict[tuple[float, float], Reached] = field(default_factory=dict)

    def search(self) -> Point:
        """The best share; one with a load above 1 where none meets the budgets."""
        if self.clock is not None:
            return Search(self.load, TOLERANCE, TIMED_TRIES).run((0.0,))
        return Search(self.load, CLOSE, TRIES).run()

    def load(self, share: float, spread: float) -> float:
        """The load (see `search.py`) of the tightest budget; infinite where the steps can't be carried out so."""
        reached = self.reach(share, spread)
        return math.inf if reached is None else max(load_of(budget, self.dense, reached) for budget in self.budgets)

    def reach(self, share: float, spread: float) -> Reached | None:
        """What is left of the model with this share, None where the steps can't be carried out so."""
        made = attempt(self.binder, self.at(share, spread), self.weights_until, self.dress)
        if made is None:
            return None
        seconds = None
        if self.clock is not None:
            whole, small = self.binder.captured, materialised(made.captured, self.binder.captured)
            seconds = self.clock([whole.module, small.module], whole.example)
        reached = Reached(totals_of(made.captured), seconds, made.notes)
        self.seen[share, spread] = reached
        return reached

    def at(self, share: float, spread: float) -> tuple[Step, ...]:
        """All steps, the free ones with this share."""
        return tuple(step.with_solved(Solved(step.pass_.lever, share, spread, "", share))
                     if step.number in self.free else step for step in self.steps)

    def tightest(self, point: Point) -> Budget:
        """The budget that decides at `point`."""
        reached = self.seen.get((point.share, point.spread))
        if reached is None:
            return self.budgets[0]
        return max(self.budgets, key=lambda budget: load_of(budget, self.dense, reached))

    def settled(self, point: Point, known: bool = True) -> dict[int, Solved]:
        """What is solved at `point`, for each free step."""
        why = cause(self.tightest(point))
        return {step.number: Solved(step.pass_.lever, point.share if known else None, point.spread, why, point.share)
                for step in self.steps if step.number in self.free}

    def refusal(self, point: Point) -> Diagnostic:
        """Why no share will do, where `point` is the furthest."""
        free = [step for step in self.steps if step.number in self.free]
        return unreachable(self.tightest(point), self.dense, self.seen.get((point.share, point.spread)), free)


def cause(budget: Budget) -> str:
    """`budget macs <= 50% of dense, line 14`."""
    return f"{' '.join(budget.span.text.split())}, line {budget.span.line}"


def solve(policy: Policy, captured: Captured, steps: tuple[Step, ...], dense: Totals,
          clock: Clock = latencies) -> Solution:
    """The share of every free step of a plan on `captured`; nothing where there is none."""
    free = frozenset(step.number for step in steps if step.pass_.free)
    if not free:
        return Solution({})
    needs = {step.number: step.pass_.sizes_from() for step in steps}
    counts = "training" not in needs.values() and (captured.concrete or "weights" not in needs.values())
    weighed = max((number for number, need in needs.items() if need == "weights"), default=0) if counts else 0
    timed = counts and can_be_timed(policy, captured)
    budgets = tuple(budget for budget in policy.budgets if budget.metric in METRICS or timed)
    if not budgets:
        return Solution({step.number: Solved(step.pass_.lever, None, 0.0, cause(policy.budgets[0]), UNGUIDED)
                         for step in steps if step.number in free}, counts=False)
    solver = Solver(Binder(policy, captured), steps, budgets, dense, free, weighed, clock=clock if timed else None)
    point = solver.search()
    if counts and not point.met:
        return Solution({}, refusals=(solver.refusal(point),))
    if not counts or len(budgets) < len(policy.budgets):
        return Solution(solver.settled(point, known=False), counts=counts)
    made = attempt(solver.binder, solver.at(point.share, point.spread), weighed, solver.dress) if weighed else None
    return Solution(solver.settled(point), solver.seen[point.share, point.spread],
                    made.captured if made is not None else None, counts)


def can_be_timed(policy: Policy, captured: Captured) -> bool:
    """Whether there is a budget of time, this machine is the target, and the model is there to be run."""
    if not any(budget.metric == "latency" for budget in policy.budgets):
        return False
    tensors = [*captured.example.tensors(), *captured.module.parameters()]
    return captured.concrete and policy.target == "cpu" and all(tensor.device.type == "cpu" for tensor in tensors)
