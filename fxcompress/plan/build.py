"""Making a plan: the policy carried out on a skeleton of the model, step by step, verified after each.

No real weight is read: a skeleton's weights are on the `meta` device. All errors of the level are reported in one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import fx

from ..diagnostics import FxcError, PlanError, PolicyError, RewriteError, Sink
from ..graph.captured import Captured
from ..graph.ops import ON_WEIGHTS, kind_of
from ..graph.predicates import held, macs
from ..graph.select import label
from ..graph.site import Outcome, Site
from ..graph.timing import latencies
from ..policy import instantiate
from ..policy.model import Policy
from ..policy.phases import show_window
from ..policy.units import show_percent
from .bind import Binder
from .budgets import METRICS, judge, later, timed, way_out
from .check import check_model
from .conflicts import Ledger
from .lower import Step, lower
from .model import (
    Change,
    Figures,
    Layer,
    Plan,
    PlannedBudget,
    PlannedExpect,
    PlannedPhase,
    PlannedStep,
    Solved,
    Totals,
    policy_hash,
)
from .solve import UNGUIDED, Clock, Solution, solve
from .text import settings
from .totals import totals_of

SOME = Solved("", None, 0.0, "", UNGUIDED)  # for the first run, which finds conflicts: what a share is makes none


@dataclass
class DryRun:
    """One way through all steps on one skeleton."""

    policy: Policy
    steps: tuple[Step, ...]
    captured: Captured
    sink: Sink
    leaves: Mapping[int, frozenset[str]] = field(default_factory=dict)  # as in `lower`
    planned: list[PlannedStep] = field(default_factory=list)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.policy, self.sink)

    def run(self) -> None:
        """Carry out every step that can be; what is wrong goes to the sink.

        Raises RewriteError for a pass that breaks an invariant, unless that may be in the wake of an error before it.
        """
        binder = Binder(self.policy, self.captured, self.sink)
        try:
            self._run(binder)
        except RewriteError:
            if not self.sink.items:
                raise

    def _run(self, binder: Binder) -> None:
        for step in self.steps:
            before = len(self.sink.items)
            left = tuple(label(node) for node in self.captured.graph.nodes if node.name in step.leaves)
            bound = binder.site(step.phase, step.action, step.leaves)
            site = self.ledger.claim(step, bound) if bound is not None else None
            if len(self.sink.items) > before:
                continue
            if site is None or (step.action.selector is not None and not site.nodes):
                self.planned.append(replace(self._planned(step, None, Outcome(())), left=left))
                continue
            kinds = _census(site.nodes)
            names = tuple(node.name for node in site.nodes)
            outcome = self._carried_out(binder, step, site)
            if outcome is not None:
                self.ledger.enter(step, site, outcome, self.captured)
                self.planned.append(replace(self._planned(step, site, outcome), kinds=kinds, nodes=names, left=left))

    def _carried_out(self, binder: Binder, step: Step, site: Site) -> Outcome | None:
        """None where the pass refuses: that is reported, and the rest of the plan goes on for its own errors."""
        try:
            return binder.carry_out(step, site)
        except RewriteError:
            raise
        except FxcError as error:
            self.sink.items.extend(error.diagnostics)
            return None

    def _planned(self, step: Step, site: Site | None, outcome: Outcome) -> PlannedStep:
        action = step.action
        notes = list(outcome.notes)
        if site is None:
            notes.append("nothing is left to it" if step.leaves else "selects nothing, and is optional")
        elif step.solved is not None and step.solved.share == 0:
            notes.append(f"does nothing: {step.solved.why} is met without it")
        return PlannedStep(
            number=step.number, phase=step.phase.name, verb=action.verb, facet=str(step.pass_.facet), what=action.what,
            override=action.override,
            selection=action.selector.span.text if action.selector is not None else "", settings=settings(step),
            place=str(action.span), line=action.span.source.line(action.span.line).strip(), kinds=(), nodes=(),
            leaves=tuple(sorted(step.leaves)), left=(),
            changes=tuple(Change(c.path, c.kind, c.what, c.before, c.after, c.why) for c in outcome.changes),
            notes=tuple(notes), unknown=outcome.unknown, after=totals_of(self.captured), solved=step.solved)


def _census(nodes: tuple[fx.Node, ...]) -> tuple[tuple[str, int], ...]:
    """How many nodes of each kind."""
    kinds = [kind_of(node) for node in nodes]
    return tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds))


def build(policy: Policy, captured: Captured, clock: Clock = latencies) -> Plan:
    """The plan of `policy` on `captured`, which stays as it is. `clock` measures for budgets of time.

    Raises PolicyError for what `check --model` finds (FXC02xx), PlanError for conflicts (FXC0301, FXC0302), what a pass
    refuses and budgets that aren't met (FXC0320), and RewriteError for a pass that breaks an invariant.
    """
    policy = instantiate(policy)
    sink = Sink(check_model(policy, captured))
    sink.raise_if_errors(PolicyError)
    before = totals_of(captured)
    run, overrode = _settled(policy, captured, sink, None)
    sink.raise_if_errors(PlanError)
    solution = solve(policy, captured, lower(policy, run.leaves), before, clock)
    sink.items.extend(solution.refusals)
    sink.raise_if_errors(PlanError)
    if solution.solved:
        run, overrode = _settled(policy, captured, sink, solution)
        sink.raise_if_errors(PlanError)
    made = run.captured if solution.captured is None else solution.captured
    after = totals_of(made)
    budgets = _budgets(policy, captured, run, (before, after), solution, sink)
    sink.raise_if_errors(PlanError)
    return Plan(
        policy=policy.name, policy_hash=policy_hash(policy), source=policy.source.name, model=captured.model_name,
        graph_hash=captured.fingerprint(), target=policy.target, before=before, after=after,
        phases=tuple(PlannedPhase(phase.name, show_window(phase.window) if phase.window else "", phase.after)
                     for phase in policy.phases),
        steps=tuple(run.planned), layers=_layers(captured, made), budgets=budgets,
        expects=tuple(PlannedExpect(_statement(e.span.text), str(e.span), e.why) for e in policy.expects),
        notes=(*captured.notes, *_idle(run, overrode), *_forecasts(run)))


def _settled(policy: Policy, captured: Captured, sink: Sink, solution: Solution | None) -> tuple[DryRun, set[int]]:
    """A dry run in which overridden actions leave alone what others override, and the steps that override something.
    Shares that are left out are what `solution` says, or some share before there is one.

    A run can find further overlaps, for it binds what the one before it could not; they only grow, so that this ends.
    Only the errors of the last run count: what a pass refuses may be what another action overrides.
    """
    leaves: dict[int, frozenset[str]] = {}
    overrode: set[int] = set()
    while True:
        steps = lower(policy, leaves, solution.solved if solution is not None else None)
        steps = tuple(step.with_solved(SOME) if step.pass_.free else step for step in steps)
        run = DryRun(policy, steps, captured.skeleton(), Sink(), leaves)
        run.run()
        overrode |= run.ledger.overrode
        more = {number: leaves.get(number, frozenset()) | names for number, names in run.ledger.leaves.items()}
        if more.items() <= leaves.items():
            sink.items.extend(run.sink.items)
            return run, overrode
        leaves.update(more)


def _forecasts(run: DryRun) -> list[str]:
    """A note on each share that the plan has to do without."""
    return [f"`{found.name}` of line {step.action.span.line} is known only when it is carried out; the figures above "
            f"are those of {show_percent(found.forecast)}"
            for step in run.steps if (found := step.solved) is not None and found.share is None]


def _idle(run: DryRun, overrode: set[int]) -> list[str]:
    """A note on each `override` that overrides nothing."""
    return [f"`override` in line {step.action.span.line} overrides nothing" for step in run.steps
            if step.action.override and step.number not in overrode]


def _budgets(policy: Policy, captured: Captured, run: DryRun, totals: tuple[Totals, Totals], solution: Solution,
             sink: Sink) -> tuple[PlannedBudget, ...]:
    """Every budget as it is met, by the `totals` before and after; refusals go to the sink."""
    planned, before = [], totals[0]
    for budget in policy.budgets:
        met, refusal = judge(budget, *totals)
        if not solution.counts and budget.metric in METRICS:
            met, refusal = later(budget, before), None
        elif budget.metric not in METRICS and solution.reached is not None and solution.reached.seconds is not None:
            met = timed(budget, solution.reached.seconds)
        if met is not None:
            planned.append(met)
        if refusal is not None:
            sink.items.append(way_out(refusal, budget, run.steps, before, partial(_trial, policy, captured)))
    return tuple(planned)


def _trial(policy: Policy, captured: Captured, steps: tuple[Step, ...]) -> Totals | None:
    """Totals after other settings, None where they can't be carried out."""
    run = DryRun(policy, steps, captured.skeleton(), Sink())
    run.run()
    return totals_of(run.captured) if not run.sink.items else None


def _layers(before: Captured, after: Captured) -> tuple[Layer, ...]:
    """Every layer with parameters or multiply-accumulates, in graph order; new ones behind those that were."""
    old, new = _figures(before), _figures(after)
    return tuple(Layer(path, (old.get(path) or new[path])[0], old[path][1] if path in old else None,
                       new[path][1] if path in new else None) for path in dict.fromkeys([*old, *new]))


def _figures(captured: Captured) -> Mapping[str, tuple[str, Figures]]:
    each = macs(captured)
    found: dict[str, tuple[str, Figures]] = {}
    for node in captured.graph.nodes:
        kind, params = kind_of(node), held(node, "params")
        if node.op in ("call_module", "call_function") and kind not in ON_WEIGHTS and (params or each[node]):
            shape = _shape(node.meta["fxc"].shape)
            found.setdefault(label(node), (kind, Figures(shape, params, each[node], held(node, "bytes"))))
    return found


def _shape(shape: object) -> str:
    if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape):
        return "×".join(map(str, shape))
    return str(shape)


def _statement(text: str) -> str:
    """A statement on one line."""
    return " ".join(text.split())
