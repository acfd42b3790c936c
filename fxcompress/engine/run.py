"""`compile`: a policy carried out on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..diagnostics import Label, PlanError
from ..graph import Captured, capture
from ..graph.apply import carry_gradients
from ..graph.calibration import Calibration, missing
from ..plan import Plan, Step, lower, read_policy
from ..plan.build import build
from ..plan.make import Teaching, learning
from ..policy.model import Policy
from ..policy.timing import length_problems
from .clock import Clock
from .mixing import require_expectations
from .result import Result


def compile(policy: Policy | str | Path, model: nn.Module | Captured, example_inputs: Any = None,
            teacher: Teaching | None = None, params: Mapping[str, object] | None = None, *,
            plan: Plan | None = None, epochs: float | None = None, steps_per_epoch: int | None = None,
            optimizer: Optimizer | None = None, calibration: object = None, seed: int = 0,
            resume: Mapping[str, Any] | None = None) -> Result:
    """Carry `policy` out on a copy of `model`: at once what begins at time zero, later phases as training reaches them.

    * `policy`: a checked policy, a text (anything with a brace in it) or a path; `params` gives its parameters
    * `example_inputs`: a tensor, a tuple, or a dict for keyword inputs; not needed for a model captured before
    * `teacher`: the model that the policy's actions learn from, on the same inputs: a module, one captured before, or
      the text `original` for `model` as it is now. It is left as it is. Several teachers are given by `params`
    * `plan`: one made before, which must still fit policy and model
    * `epochs`: the length of the training, for phases over a share of it
    * `steps_per_epoch`: lets ramps over epochs move within the first epoch; it is learned otherwise
    * `optimizer`: shorthand for `result.follow(optimizer)`; make it from `result.module.parameters()`
    * `calibration`: inputs like the real ones, for what is measured on them (`by = activation`, `compensate`): an
      iterable of batches, each like `example_inputs` and without labels, or one large tensor. It is iterated anew
      whenever data are needed; what an iterator gives is kept until the last phase has begun, or for `finalize`
      where layers are quantized
    * `seed`: of everything that is drawn
    * `resume`: a checkpoint's `result.state_dict()`, taken up as by `result.load_state_dict`, but from the very
      beginning: what the checkpoint's run removed is removed, whatever the weights here

    Gradients that `model`'s parameters hold count as seen, for scores by gradient. Raises PolicyError, CaptureError,
    PlanError (FXC0521 without `epochs` where they are needed, FXC0346 without calibration data where they are needed,
    FXC0570 where these don't fit) and RewriteError, before anything is touched.
    """
    checked = read_policy(policy, params, teacher)
    problems = length_problems(checked.phases, epochs)
    if problems:
        raise PlanError(problems)
    require_expectations(checked)
    captured = model.copy() if isinstance(model, Captured) else capture(model, example_inputs)
    captured = learning(checked, captured, model)
    carry_gradients(model.module if isinstance(model, Captured) else model, captured.module)
    data = Calibration.of(calibration, captured) if calibration is not None else None
    if data is None:
        _need_no_data(lower(checked))
    if plan is None:
        plan = build(checked, captured)
    else:
        plan.require(checked, captured)
    clock = Clock(steps_per_epoch=steps_per_epoch, total_epochs=epochs)
    result = Result(checked, plan, captured, clock, seed, data, resume)
    if optimizer is not None:
        result.follow(optimizer)
    return result


def _need_no_data(steps: Sequence[Step]) -> None:
    """Refuse every action, of any phase, that needs calibration data."""
    problems = [replace(missing(need), primary=Label(step.action.span)) for step in steps
                if (need := step.pass_.data_need())]
    if problems:
        raise PlanError(problems)
