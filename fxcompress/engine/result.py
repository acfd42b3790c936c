"""`Result`: a compressed model in training. Its module stays one object from `compile` to `finalize`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, overload

from torch import fx
from torch.optim import Optimizer

from ..backends.auto import Deployed
from ..backends.compiled import compile_in_place
from ..diagnostics import Diagnostic, Label, PlanError
from ..graph.calibration import Calibration
from ..graph.captured import Captured
from ..graph.distilled import distillations
from ..nn.distillation import Distillation
from ..passbase import Facet
from ..passes.shared.calibrating import calibrate
from ..plan import Plan, policy_hash
from ..policy.model import Phase, Policy
from ..policy.phases import show_window
from ..policy.values import Duration, Ramp
from .auto import choose
from .clock import Clock
from .execute import Executor
from .finish import Finished, device_for, finish, take_masks_off
from .follow import Followers
from .integers import is_quantized
from .log import Entry, follows, other_graph
from .measure import Baseline, Measuring
from .progress import Progress, watcher
from .report import report, table
from .rewind import INITIAL, Snapshots, rewind_times
from .schedule import Schedule
from .training import Training

FORMAT = 3  # of `state_dict`


class Result:
    """What `compile` gives. Train `module` with any loop; call `step()` after each training step and `epoch_end()`
    after each epoch, then `finalize()`.

    * `module`: the rewritten `torch.fx.GraphModule`; later phases rewrite it in place, and its parameters stay
      the same objects, so that an optimizer made from `module.parameters()` stays valid
    * `plan`, `policy`: what is carried out
    * `captured`: the graph with its facts and provenance
    * `notes`, `warnings`: what the passes had to say; what was asked for and not reached
    """

    def __init__(self, policy: Policy, plan: Plan, captured: Captured, clock: Clock, seed: int,
                 calibration: Calibration | None = None, resume: Mapping[str, Any] | None = None) -> None:
        """Carries out at once what begins at time zero, or what `resume` says was carried out. Use `compile`."""
        self.policy, self.plan, self.captured, self.clock = policy, plan, captured, clock
        self.warnings: list[Diagnostic] = []
        self._notes = _timing_notes(policy, clock)
        self._baseline = Baseline.of(captured, policy)
        values = (action.values.get("rewind") for phase in policy.phases for action in phase.actions)
        self._snapshots = Snapshots(captured.module, rewind_times(values))
        self._snapshots.take(INITIAL)
        self._followers = Followers(captured.module)
        self._executor = Executor(policy, plan, captured, snapshots=self._snapshots, followers=self._followers,
                                  seed=seed, calibration=calibration, dense_seconds=self._baseline.latency)
        self._training = Training(policy.phases, clock, self._executor.begin, self._wrote, self._end)
        if resume is not None:
            self.load_state_dict(resume)
        else:
            self._snapshots.look(clock)
            self._training.tick()
        self._executor.careful = True

    @property
    def module(self) -> fx.GraphModule:
        """The rewritten module, trainable."""
        return self.captured.module

    @property
    def notes(self) -> tuple[str, ...]:
        """What the passes and the engine had to say, in order."""
        return tuple(dict.fromkeys([*self.captured.notes, *self._notes, *self._executor.notes]))

    @property
    def done(self) -> bool:
        """Whether every phase has ended, and every number has reached its end."""
        return self._training.done

    @property
    def settled(self) -> bool:
        """Whether the graph and its masks stay as they are from here on: at most loss terms still move. Weights of
        later steps can then be held against each other, and the best of them kept."""
        return self._training.settled

    @property
    def numbers(self) -> dict[str, float]:
        """What ramps have written last: `phase: name` -> value."""
        return self._training.numbers

    @property
    def progress(self) -> dict[str, float]:
        """How far each phase is, in [0, 1]."""
        return {run.phase.name: run.progress(self.clock) for run in self._training.runs}

    def step(self) -> None:
        """One training step is done: act on weights that are regularised, move ramps, begin and end phases. Raises what
        the passes of a phase that begins raise; the module is then as it was before the pass that failed."""
        self.clock.advance()
        self._training.trained(self._followers.rates)
        self._tick()

    def epoch_end(self) -> None:
        """One epoch is done, after the last `step()` of it."""
        self.clock.end_epoch()
        self._tick()

    def _tick(self) -> None:
        self._snapshots.look(self.clock)
        self._training.tick()

    def calibrate(self, batches: object, progress: Progress = False) -> None:
        """Give every quantizer its range from `batches`, as `calibration` of `compile` does; ranges that are there are
        found anew. `progress=True` draws a bar on a terminal (stderr; nothing elsewhere); a function is called with
        (batches done, how many there are or None) behind each batch.

        Raises PlanError: FXC0570 for batches that don't fit, FXC0571 where a layer gives no finite number, FXC0574
        where nothing is quantized.
        """
        data = Calibration.of(batches, self.captured)
        if not is_quantized(self.captured):
            raise PlanError([Diagnostic("FXC0574", "there is nothing to calibrate: no layer is quantized now",
                                        help="calibrate once the phase has begun that quantizes")])
        self._notes += calibrate(self.captured, replace(data, watch=watcher(progress)))
        self._executor.calibration = data

    def follow(self, optimizer: Optimizer) -> Optimizer:
        """Let the state of `optimizer` (momentum, second moments) follow when parameters are cut; returns it."""
        if optimizer not in self._followers.optimizers:
            self._followers.optimizers.append(optimizer)
        return optimizer

    def _end(self, phase: Phase) -> None:
        """The window of a phase has passed: what only acts in it goes."""
        ended = self._executor.end(phase=phase)
        self._training.drop(lambda step: step.number in ended)

    def _repeat(self, entry: Entry) -> None:
        self._executor.repeat(entry)
        if entry.ended:
            self._training.drop(lambda step: step.number == entry.step)

    def _wrote(self, schedule: Schedule) -> None:
        """A number was written; lottery tickets go back to their early weights then."""
        when = schedule.what.rewind
        if when is None or not schedule.value or not self.clock.steps + self.clock.epochs:
            return
        if str(when) in self._snapshots.taken:
            self.rewind(when)
        else:
            self._notes.append(f"not rewound at step {self.clock.steps}: the weights of {when} come later")

    def rewind(self, to: str | Duration = INITIAL) -> None:
        """Set all parameters to what they were at the start, or at a time that the policy names in `rewind`; masks
        stay. The state of optimizers that follow begins anew. Running statistics of norms stay: training renews them.

        Raises PlanError (FXC0526) for a time that was not kept.
        """
        if str(to) not in self._snapshots.taken:
            kept = ", ".join(f"`{when}`" for when in self._snapshots.taken)
            raise PlanError([Diagnostic("FXC0526", f"the weights of `{to}` weren't kept", notes=(f"kept: {kept}",),
                                        help="name the time in the policy, `rewind = 2 epochs`, and pass it by")])
        new = self._snapshots.back(to)
        if new:
            self._notes.append(f"not rewound, since they came later: {', '.join(new)}")
        self._followers.forget()

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the loss terms that `module(*inputs, targets=labels, losses=True)` gives now; empty where
        nothing is learned from a teacher."""
        return tuple(name for found in self._distillations() for name in found.terms)

    @property
    def weights(self) -> dict[str, float]:
        """What each term is multiplied by in the total, as it is now."""
        return {name: value for found in self._distillations() for name, value in found.numbers("weights").items()}

    @property
    def temperatures(self) -> dict[str, float]:
        """The temperature of each term that has one, as it is now; one that adapts, or is learned, as it was last."""
        return {name: value for found in self._distillations()
                for name, value in found.numbers("temperatures").items()}

    def _distillations(self) -> list[Distillation]:
        return [found for node in distillations(self.captured.graph)
                if isinstance(found := self.captured.module_of(node), Distillation)]

    def strip(self) -> fx.GraphModule:
        """Take teachers, adapters and loss terms out of `module`, in place, and give it: the plain student, with its
        own keys and results. Phases that have not begun still teach."""
        ended = self._executor.end()
        self._training.drop(lambda step: step.number in ended)
        return self.module

    def lift(self) -> fx.GraphModule:
        """Take the masks off `module`, in place: every weight has its dense value again (as trained: a masked weight
        gets no gradient from the loss, but weight decay moves it). Ramps of masks stop; phases that have not begun
        still will."""
        self._training.drop(lambda step: step.pass_.facet is Facet.MASK)
        take_masks_off(self.captured, fold=False)
        return self.module

    @overload
    def finalize(self, target: str | None = None, *, compile: bool = False,
                 pack: bool | None = None) -> fx.GraphModule: ...

    @overload
    def finalize(self, target: str | None = None, *, data: object) -> Deployed: ...

    def finalize(self, target: str | None = None, *, data: object = None, compile: bool = False,
                 pack: bool | None = None) -> fx.GraphModule | Deployed:
        """A new GraphModule for `target` (that of the policy by default) with nothing left of training: masks are
        zeros in the weights, quantized layers compute in integers, `state_dict` has the model's keys, and it is in
        evaluation mode. `module` stays as it is.

        With `pack`, which is the default where layers are quantized, what stays in float is made ready for the CPU:
        norms are folded into the layers before them (their keys leave `state_dict`) and convolutions packed; the result
        is faster, and not for training or another policy. With `compile` calls are compiled by Inductor, at the first
        one with inputs of a shape.

        A ramp that is short of its end is applied as far as it came; that is a warning (FXC0524), issued and kept in
        `warnings`.

        With the target `auto` and `data`, a batch of inputs, all engines that are installed are measured on it (this
        GraphModule, compiled, ONNX Runtime, OpenVINO, each in floats and in integers, on the CPU, with torch's number
        of threads), and the fastest that keeps the policy's expectations and budgets is given, as a `Deployed`; its
        `table` shows all of them, and so do `notes`. Without `data`, `auto` is `cuda` where there is a GPU, else `cpu`.

        Raises PlanError: FXC0523 for a phase that has not begun, FXC0527 for a target this machine has not, FXC0530 for
        an `expect` that doesn't hold, FXC0320 and FXC0531 for a budget that isn't met; FXC0722 where no engine keeps
        them, FXC0723 for `data` with another target.
        """
        unbegun = [Diagnostic(
            "FXC0523", f"phase `{phase.name}` has not begun", Label(phase.span, "is still to come"),
            notes=(f"{self.clock.steps} steps and {self.clock.epochs} epochs have been trained",),
            help="train until `result.done`, calling `step()` and `epoch_end()`") for phase in self._training.unbegun()]
        if unbegun:
            raise PlanError(unbegun)
        wanted = target or self.policy.target
        device = device_for(wanted)
        if data is not None and wanted != "auto":
            raise PlanError([Diagnostic("FXC0723", f"`data` is for choosing an engine, and the target is `{wanted}`",
                                        help='say `finalize(target="auto", data=batch)`, or leave `data` away')])
        for found in map(_unreached, self._training.unreached()):
            if found not in self.warnings:
                self.warnings.append(found)
                warnings.warn(found.message, stacklevel=2)
        if data is None:
            finished = self._finished(self.captured, self.policy, device, pack)
            module = self._with_report(finished, finished.notes, {})
            return compile_in_place(module) if compile else module
        choice = choose(self.captured, self.policy, self._baseline, partial(self._finished, device="cpu", pack=True),
                        lambda captured: Measuring(captured, self._baseline, self._executor.first_lets), data)
        assert choice.deployed.table is not None
        self._with_report(choice.finished, (*choice.finished.notes, *choice.notes),
                          {"auto": choice.deployed.table.to_json()})
        return choice.deployed

    def _finished(self, captured: Captured, policy: Policy, device: str, pack: bool | None = None) -> Finished:
        return finish(captured, policy, self._baseline, self._executor.first_lets, device, self._executor.calibration,
                      pack)

    def _with_report(self, finished: Finished, notes: tuple[str, ...], more: Mapping[str, Any]) -> fx.GraphModule:
        """The module of `finished`, with the policy, the plan and a report."""
        self._notes += notes
        module = finished.captured.module
        module.meta["fxcompress"] = {
            "policy": self.policy.source.text, "plan": json.loads(self.plan.to_json()),
            "report": {**report(self, finished), **more}}
        return module

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, what was rewritten so far and what stayed of each tensor then, and weights kept
        for rewinding: with `module.state_dict()` and the optimizer's, all that a checkpoint needs."""
        return {"format": FORMAT, "policy": policy_hash(self.policy), "graph": self.captured.fingerprint(),
                **self._training.state(), "rewrites": [entry.state() for entry in self._executor.log],
                "snapshots": self._snapshots.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint, on a fresh result of the same policy and model: what was rewritten by then is rewritten
        here, each removal taking what it took then. Load `module.state_dict()` after this, when the module has its
        shape, and then the state of an optimizer made from its parameters.

        Raises PlanError: FXC0525 for the state of another policy; FXC0528 where `compile` has removed other channels at
        once, from other weights, than the checkpoint's run had (`compile(..., resume=state)` doesn't), or where
        the graph comes out another; the result is of no use after that.
        """
        if state.get("format") != FORMAT or state.get("policy") != policy_hash(self.policy):
            raise PlanError([Diagnostic(
                "FXC0525", "this checkpoint belongs to another policy, or to other parameters of it",
                help="compile the policy that it was saved with")])
        past = [Entry.of(entry) for entry in state["rewrites"]]
        done, names = len(self._executor.log), {step.number: step.phase.name for step in self._executor.steps}
        if not follows(self._executor.log, past):
            raise other_graph()
        self._executor.careful = False
        self._executor.past = {entry.step: entry for entry in past[done:]
                               if entry.value is None and not entry.ended}
        self._training.load(state, [(names[entry.step], entry) for entry in past[done:]], self._repeat)
        self._executor.careful = True
        if self.captured.fingerprint() != state["graph"]:
            raise other_graph()
        self._snapshots.load(state["snapshots"])

    def _repr_html_(self) -> str:
        return table(self)

    def __repr__(self) -> str:
        phases = ", ".join(f"{name} {100 * part:.0f}%" for name, part in self.progress.items())
        return f"Result(policy {self.policy.name!r} on {self.captured.model_name}: {phases or 'no phases'})"


def _timing_notes(policy: Policy, clock: Clock) -> list[str]:
    """A note where a ramp stands still while the length of an epoch isn't known."""
    return [f"phase `{phase.name}` runs over {show_window(phase.window)}, and how many steps an epoch has is learned "
            "from the first: until then its ramps stand still; give `steps_per_epoch=` to move them"
            for phase in policy.phases if phase.window is not None and phase.window.unit != "steps" and clock.learns
            and any(isinstance(value, Ramp) for action in phase.actions
                    for given in (action.values, *(pair.values for pair in action.pairs)) for value in given.values())]


def _unreached(schedule: Schedule) -> Diagnostic:
    def shown(value: float) -> str:
        return f"{100 * value:.4g}%" if schedule.what.percent else f"{value:.4g}"

    reached = "was never written" if schedule.value is None else f"stopped at {shown(schedule.value)}"
    action, phase = schedule.step.action, schedule.step.phase
    why = ("its weights have seen no gradients",) if schedule.waits else ()
    return Diagnostic(
        "FXC0524", f"the {schedule.what.name} {reached}, short of {shown(schedule.end)}", Label(action.span),
        (Label(phase.span, "has not ended"),), why, "train until `result.done`, calling `step()` and `epoch_end()`",
        severity="warning")
