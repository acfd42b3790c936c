"""Carrying out the steps of a phase on the model that trains: in place, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..graph.apply import carry_gradients, carry_out
from ..graph.calibration import Calibration
from ..graph.captured import Captured
from ..graph.distilled import distillations
from ..graph.site import Companion, Cuts, Outcome, Rewriting, Scheduled, Site
from ..graph.tree import named_tensors
from ..plan import Binder, Plan, Step, lower
from ..policy.model import Phase, Policy
from .finish import take_teacher_out
from .follow import Followers
from .integers import is_quantized
from .log import Entry, add_missing, other_graph, same_cuts
from .rewind import Snapshots
from .solving import solved_now


class Executor:
    """The steps of one plan on one captured model. The module and its parameters stay the same objects throughout.

    `log` has every rewrite that was carried out; `past` what a checkpoint says of those that are to be repeated, by the
    number of their step.
    """

    def __init__(self, policy: Policy, plan: Plan, captured: Captured, *, snapshots: Snapshots, followers: Followers,
                 seed: int, calibration: Calibration | None = None, dense_seconds: float = 0.0) -> None:
        """Binds the policy's `let`s to the model as it is now. One forward pass of it takes `dense_seconds`, where a
        budget compares with that."""
        self.plan, self.dense_seconds = plan, dense_seconds
        self.captured, self.binder = captured, Binder(policy, captured)
        self.first_lets = dict(self.binder.lets)
        self.steps = lower(policy, plan)
        self.snapshots, self.followers, self.seed = snapshots, followers, seed
        self.calibration, self.to_come = calibration, {phase.name for phase in policy.phases}
        self.notes: list[str] = []
        self.careful = False  # rehearse each step on a copy: once the module is in use it must not break
        self.log: list[Entry] = []
        self.past: dict[int, Entry] = {}
        self._sites: dict[int, Site] = {}  # of the steps whose numbers move by rewriting
        self._companions: list[Companion] = []
        self._teaching: dict[int, str] = {}  # by the number of its step: the call of what the model learns from

    def begin(self, phase: Phase) -> Sequence[tuple[Step, Scheduled]]:
        """Carry out the steps of `phase`; returns what moves in it. Raises what its passes raise; outside of `compile`
        the step that failed has then changed nothing."""
        moving: list[tuple[Step, Scheduled]] = []
        for step in self.steps:
            if step.phase.name != phase.name:
                continue
            site = self.binder.site(step.phase, step.action, step.leaves)
            if site is not None:
                past = self.past.pop(step.number, None)
                turn, site = self._solved(step, past), self._dressed(site)
                outcome = self._carry_out(turn, site, None, past)
                moving.extend((turn, scheduled) for scheduled in self._scheduled(turn, site, outcome))
        self.to_come.discard(phase.name)
        self._forget_teachers()
        if not self.to_come and not is_quantized(self.captured):  # `finalize` measures quantized layers on them
            self.calibration = None  # what still runs on the data holds them itself, in its site
        return moving

    def _dressed(self, site: Site) -> Site:
        """`site` with what only a training has."""
        return replace(site, seed=self.seed, calibration=self.calibration)

    def _solved(self, step: Step, past: Entry | None) -> Step:
        if past is not None:
            if step.solved is None or past.share is None:
                return step
            return step.with_solved(replace(step.solved, share=past.share))
        step, notes = solved_now(step, self.steps, self.binder, self.plan, self.dense_seconds, self._dressed)
        self.notes += notes
        return step

    def _scheduled(self, step: Step, site: Site, outcome: Outcome) -> Iterator[Scheduled]:
        yield from outcome.scheduled
        for moved in outcome.rewriting:
            self._sites[step.number] = site
            if moved.companion is not None:
                self._companions.append(moved.companion)
            yield Scheduled(moved.name, moved.ramp, partial(self._write, step, moved), moved.every,
                            companion=moved.companion)

    def _write(self, step: Step, moved: Rewriting, value: float) -> bool:
        """Rewrite the graph for a number that has come to `value`; False where that can't be done yet."""
        if not moved.ready():
            return False
        pass_ = moved.at(value)
        if pass_ is not None:
            self._carry_out(replace(step, pass_=pass_), self._site(step.number), value)
        return True

    def end(self, number: int | None = None, phase: Phase | None = None) -> list[int]:
        """Take out what only acts while its phase lasts (a teacher): that of step `number`, of `phase`, or all.
        Returns the numbers of the steps."""
        done = []
        for step in self.steps:
            mine = self._teaching.get(step.number)
            if mine is None or (number is not None and step.number != number) or (
                    phase is not None and step.phase.name != phase.name):
                continue
            self.followers.look()
            for node in self.captured.nodes_named((mine,)):
                take_teacher_out(self.captured, node)
            self.notes += self.followers.update({})
            self._teaching.pop(step.number)
            self.log.append(Entry(step.number, None, {}, {}, ended=True))
            done.append(step.number)
        if number is None and phase is None:
            self.followers.look()
            for node in distillations(self.captured.graph):  # those of a model that came with its teacher
                take_teacher_out(self.captured, node)
            self.notes += self.followers.update({})
        self.binder.follow()
        self._forget_teachers()
        return done

    def _forget_teachers(self) -> None:
        """Let go of the models to learn from once no phase is to come that does."""
        if not any(step.action.teacher for step in self.steps if step.phase.name in self.to_come):
            self.captured.teachers = None

    def repeat(self, entry: Entry) -> None:
        """Do again what a checkpoint says was done as a number moved, or as a phase ended. Raises PlanError (FXC0528).
        """
        if entry.ended:
            self.end(entry.step)
            return
        if entry.step not in self._sites:
            raise other_graph()
        step = next(step for step in self.steps if step.number == entry.step)
        self._carry_out(step, self._site(entry.step), entry.value, entry)

    def _site(self, number: int) -> Site:
        """Where a step began to work, in the graph as it is now."""
        site = self._sites[number]
        return replace(site, nodes=self.captured.nodes_named(node.name for node in site.nodes))

    def _carry_out(self, step: Step, site: Site, value: float | None, past: Entry | None = None) -> Outcome:
        if past is not None and past.kept:
            site = replace(site, kept=past.kept)
        if self.careful:
            trial = self.captured.copy()
            carry_gradients(self.captured.module, trial.module)
            carry_out(trial, step.pass_, replace(site, nodes=trial.nodes_named(node.name for node in site.nodes)))
        self.followers.look()
        names = self._names()
        taught = set(distillations(self.captured.graph))
        outcome = self.binder.carry_out(step, site)
        self._teaching.update((step.number, node.name) for node in distillations(self.captured.graph)
                              if node not in taught)
        if past is not None and add_missing(self.captured.module, past.added):
            self.captured.refresh()
        kept = {name: outcome.resized[tensor] for name, tensor in {**names, **self._names()}.items()
                if tensor in outcome.resized}
        if past is not None and not same_cuts(kept, past.kept):
            raise other_graph()
        self._follow(outcome, kept)
        added = {name: tuple(parameter.shape) for name, parameter in self.captured.module.named_parameters()
                 if name not in names}
        share = step.solved.share if step.solved is not None else None
        self.log.append(Entry(step.number, value, kept, added, share))
        return outcome

    def _follow(self, outcome: Outcome, kept: Mapping[str, Cuts]) -> None:
        """Bring everything that stands beside the parameters in line with them."""
        self.snapshots.cut(outcome.resized)
        for companion in self._companions:
            companion.cut(kept)
        self.notes += [*outcome.notes, *self.followers.update(outcome.resized)]

    def _names(self) -> dict[str, Tensor]:
        """Every parameter and buffer under each of its names."""
        return named_tensors(self.captured.module).all
