"""Before the first step: Accelerate as the policy wants it, and what of a policy the training can't give."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..diagnostics import Diagnostic, Label, PlanError
from ..passbase import Facet
from ..plan import lower
from ..policy.model import Policy
from ..policy.phases import show_window
from ..policy.values import Duration
from .data import Data, Inputs
from .settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

_MIXED = {None: None, "fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU")  # of Accelerate's `DistributedType`


def accelerator_for(policy: Policy, settings: Settings) -> Accelerator:
    """The Accelerator of this process, in the precision of the policy (else in that of `accelerate launch`).

    A batch is cut over the processes, so that their number changes nothing of what is learned. Raises PlanError:
    FXC0807 where Accelerate isn't installed or can't do it, FXC0803 for a batch that can't be cut.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration
    except ImportError as error:
        raise PlanError([Diagnostic("FXC0807", "training needs Accelerate, which isn't installed",
                                    help="pip install 'fxcompress[train]'")]) from error
    loading = DataLoaderConfiguration(split_batches=True, dispatch_batches=False, even_batches=True,
                                      use_seedable_sampler=False)
    # Without a GPU it has to be told, or the processes of a launcher would know nothing of each other.
    on_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
    wanted = policy.precision or os.environ.get("ACCELERATE_MIXED_PRECISION")  # the launcher's
    if on_cpu and wanted == "fp16":
        raise PlanError([Diagnostic("FXC0807", "`fp16` needs a GPU, and this trains on the CPU",
                                    help="take bf16, which both have: `precision = bf16`")])
    try:
        made = Accelerator(mixed_precision=_MIXED[policy.precision], cpu=on_cpu, dataloader_config=loading,
                           rng_types=[])
    except ValueError as error:
        raise PlanError([Diagnostic(
            "FXC0807", f"Accelerate can't train so: {str(error).splitlines()[0]}",
            notes=(f"the policy's precision is {policy.precision or 'not said'}, the device `{settings.device}`",),
            help="one process trains in one precision and on one device: begin a new process for another")]) from error
    if made.distributed_type.name not in _KINDS:
        raise PlanError([Diagnostic(
            "FXC0807", f"a policy can't be trained under {made.distributed_type.name}",
            notes=("passes rewrite the whole module in place, which sharded parameters don't allow",),
            help="launch it on several GPUs or CPUs without sharding: `accelerate launch --multi_gpu`")])
    _leave_at_exit()
    pieces = settings.accumulate * made.num_processes
    if settings.batch % pieces:
        raise PlanError([Diagnostic(
            "FXC0803", f"a batch of {settings.batch} can't be cut into {pieces} equal pieces",
            notes=(f"{made.num_processes} processes, {settings.accumulate} parts each",),
            help="`batch` counts the samples of a step over all processes: take a multiple")])
    return made


@cache
def _leave_at_exit() -> None:
    """Have this process leave its group before it ends: with the group's threads still there it aborts now and then."""
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def require_time(policy: Policy, epochs: int, steps_per_epoch: int) -> None:
    """Raise PlanError (FXC0808) for every phase that ends behind the training."""
    lengths = {"epochs": float(epochs), "steps": float(epochs * steps_per_epoch), "training": 1.0}
    problems = [Diagnostic(
        "FXC0808", f"the training ends before phase `{phase.name}` does",
        Label(phase.span, f"runs over {show_window(phase.window)}"),
        notes=(f"{epochs} epochs of {steps_per_epoch} steps are trained",),
        help="train for longer: `--epochs`, or let the phase end earlier") for phase in policy.phases
        if phase.window is not None and phase.window.end > lengths[phase.window.unit] + 1e-9]
    if problems:
        raise PlanError(problems)


def calibration_for(policy: Policy, data: Data, settings: Settings) -> Inputs | None:
    """Training inputs for what is measured on data; None where the policy has no such action."""
    steps = lower(policy)
    if not any(step.pass_.data_need() or step.pass_.facet is Facet.NUMERIC for step in steps):
        return None
    asked: Sequence[Duration] = [value for step in steps if isinstance(value := step.action.values.get("calibrate"),
                                                                       Duration)]
    samples = max([settings.calibration, *(int(value.count) for value in asked)])
    return Inputs(data, samples, settings.batch, settings.seed)
