"""Carrying out the steps of a phase on the model that trains: in place, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..graph.apply import carry_out
from ..graph.captured import Captured
from ..graph.site import Outcome, Scheduled, Site
from ..plan import Binder, Plan, Step, lower
from ..policy.model import Phase, Policy
from .follow import Followers
from .rewind import Snapshots


class Executor:
    """The steps of one plan on one captured model. The module and its parameters stay the same objects throughout."""

    def __init__(self, policy: Policy, plan: Plan, captured: Captured, *, snapshots: Snapshots, followers: Followers,
                 seed: int) -> None:
        """Binds the policy's `let`s to the model as it is now."""
        self.captured, self.binder = captured, Binder(policy, captured)
        self.first_lets = dict(self.binder.lets)
        self.steps = lower(policy, plan)
        self.snapshots, self.followers, self.seed = snapshots, followers, seed
        self.notes: list[str] = []
        self.careful = False  # rehearse each step on a copy: once the module is in use it must not break

    def begin(self, phase: Phase) -> Sequence[tuple[Step, Scheduled]]:
        """Carry out the steps of `phase`; returns what moves in it. Raises what its passes raise; outside of `compile`
        the step that failed has then changed nothing."""
        moving: list[tuple[Step, Scheduled]] = []
        for step in self.steps:
            if step.phase.name != phase.name:
                continue
            site = self.binder.site(step.phase, step.action, step.leaves)
            if site is not None:
                outcome = self._carry_out(step, replace(site, seed=self.seed))
                moving.extend((step, scheduled) for scheduled in outcome.scheduled)
        return moving

    def _carry_out(self, step: Step, site: Site) -> Outcome:
        if self.careful:
            trial = self.captured.copy()
            carry_gradients(self.captured.module, trial.module)
            carry_out(trial, step.pass_, replace(site, nodes=trial.nodes_named(node.name for node in site.nodes)))
        self.followers.look()
        outcome = self.binder.carry_out(step, site)
        self.snapshots.cut(outcome.resized)
        self.notes += [*outcome.notes, *self.followers.update(outcome.resized)]
        return outcome


def carry_gradients(source: nn.Module, copy: nn.Module) -> None:
    """Give the parameters of `copy` the gradients that those of the same names have in `source`."""
    found = dict(source.named_parameters())
    for name, parameter in copy.named_parameters():
        if name in found and found[name].grad is not None:
            parameter.grad = found[name].grad.detach().clone()  # type: ignore[union-attr]
