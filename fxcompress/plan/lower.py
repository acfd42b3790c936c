"""From a policy to ordered steps: what the dry run and the engine carry out, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..passbase import FACET_ORDER, VERBS, Pass
from ..policy.model import Action, Phase, Policy
from .model import Plan, Solved


@dataclass(frozen=True)
class Step:
    """One action in its turn. `number` counts from 1 through the whole plan; `leaves` are the names of nodes that it
    leaves to an overriding action."""

    number: int
    phase: Phase
    action: Action
    pass_: Pass
    leaves: frozenset[str] = frozenset()
    solved: Solved | None = None

    def with_solved(self, solved: Solved) -> Step:
        """This step with what was solved for it; with the forecast where that isn't known yet."""
        share = solved.forecast if solved.share is None else solved.share
        return replace(self, pass_=self.pass_.with_share(share, solved.spread), solved=solved)


def ordered(policy: Policy) -> list[tuple[Phase, Action]]:
    """The actions of `policy` in the order they run: phase by phase, in each phase by the facet they write (topology,
    shape, mask, loss, numeric), and those of one facet as they are written."""
    return [(phase, action) for phase in policy.phases for action in sorted(phase.actions, key=_rank)]


def _rank(action: Action) -> int:
    return FACET_ORDER.index(VERBS[action.verb].facet)


def pass_of(action: Action) -> Pass:
    """The pass that carries `action` out."""
    return VERBS[action.verb](**action.values).with_pairs(action.pairs)


def lower(policy: Policy, plan: Plan | Mapping[int, frozenset[str]] | None = None,
          solved: Mapping[int, Solved] | None = None) -> tuple[Step, ...]:
    """The steps of a policy whose parameters are all given. `plan` (or mappings from step numbers) says what overridden
    actions leave alone, by names of nodes, and what was solved; the engine hands in the plan it carries out."""
    if isinstance(plan, Plan):
        solved = {step.number: step.solved for step in plan.steps if step.solved is not None}
        plan = {step.number: frozenset(step.leaves) for step in plan.steps}
    leaves, known = plan or {}, solved or {}
    steps = [Step(number, phase, action, pass_of(action), leaves.get(number, frozenset()))
             for number, (phase, action) in enumerate(ordered(policy), 1)]
    return tuple(step.with_solved(known[step.number]) if step.number in known else step for step in steps)
