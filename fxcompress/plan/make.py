"""The public function `plan`, and how policies are given from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..graph import Captured, capture
from ..graph.teacher import Teachers
from ..policy import instantiate, load_policy, parse
from ..policy.model import Policy
from .build import build
from .model import Plan

Teaching = nn.Module | Captured | str  # a model to learn from; `original` is the model before it is rewritten


def read_policy(policy: Policy | str | Path, params: Mapping[str, object] | None = None,
                teacher: Teaching | None = None) -> Policy:
    """The checked policy: as it is, of a text (anything with a brace in it), or of a file; with `params` for its
    parameters, and `teacher` for those that its actions name behind `from`.

    Raises PolicyError, for a parameter without a value too.
    """
    given = dict(params or {})
    if isinstance(policy, str) and "{" in policy:
        policy = parse(policy, given)
    elif isinstance(policy, str | Path):
        policy = load_policy(policy, given)
    else:
        policy = instantiate(policy, given) if given else policy
    if teacher is not None:
        names = {action.teacher for phase in policy.phases for action in phase.actions if action.teacher}
        models = {name: teacher for name in names if name in policy.missing}
        policy = instantiate(policy, models) if models else policy
    return instantiate(policy)


def plan(policy: Policy | str | Path, model: nn.Module | Captured, example_inputs: Any = None,
         teacher: Teaching | None = None, params: Mapping[str, object] | None = None) -> Plan:
    """What `policy` will do to `model`: each action in its order, before and after, conflicts, budgets. It does no work
    on weights; a model on the `meta` device will do.

    `policy` is a checked policy, a text or a path; `example_inputs` (a tensor, a tuple, or a dict for keyword inputs)
    is needed unless `model` was captured before; `teacher` is the model that its actions learn from. Raises
    PolicyError, CaptureError and PlanError with all diagnostics of the first level where something is wrong.
    """
    checked = read_policy(policy, params, teacher)
    captured = model if isinstance(model, Captured) else capture(model, example_inputs)
    return build(checked, learning(checked, captured, model))


def learning(policy: Policy, captured: Captured, model: nn.Module | Captured | None = None) -> Captured:
    """`captured`, which comes from `model`, with the teachers that `policy` names; `captured` itself where there are
    none."""
    source = model.module if isinstance(model, Captured) else model
    teachers = Teachers.for_policy(policy, captured, source)
    return captured if teachers is None else replace(captured, teachers=teachers)
