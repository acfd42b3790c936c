"""Models from wherever they are, and what travels with them: the plan, the policy, what the engine measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..backends.artifact import META, load
from ..backends.artifact_json import Cursor
from ..graph.captured import Captured
from ..plan.model import Plan
from .layers import Sizes, Snapshot

Model = Captured | fx.GraphModule | str | os.PathLike[str]


def open_model(model: Model) -> Captured | fx.GraphModule:
    """`model` itself, or the artifact in the folder that it names. Raises ArtifactError for a damaged one."""
    return model if isinstance(model, Captured | fx.GraphModule) else load(model)


def name_of(model: Captured | fx.GraphModule) -> str:
    """What the model's class is called."""
    return (model.model_name if isinstance(model, Captured) else "") or type(model).__name__


def meta_of(model: Captured | fx.GraphModule) -> Mapping[str, Any]:
    """What `fxcompress.save` keeps beside the graph: policy, plan, report; empty for a model that has none."""
    module = model.module if isinstance(model, Captured) else model
    meta: Mapping[str, Any] = module.meta.get(META, {})
    return meta


def plan_of(model: Captured | fx.GraphModule) -> Plan | None:
    """The plan that `model` was made by, None if it carries none. Raises PlanError (FXC0332) for one that can't be
    read."""
    data = meta_of(model).get("plan")
    return None if data is None else Plan.from_json(json.dumps(data))


@dataclass(frozen=True)
class Figures:
    """Parameters, MACs of one sample and bytes of one layer."""

    params: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Dense:
    """The model before: its totals, and (kind, figures) of each layer that has parameters or MACs, by label."""

    sizes: Sizes
    layers: Mapping[str, tuple[str, Figures]]

    @staticmethod
    def of_plan(plan: Plan) -> Dense:
        """The dense model that `plan` was made for. How many zeros it had isn't known."""
        layers = {row.path: (row.kind, Figures(row.before.params, row.before.macs, row.before.bytes))
                  for row in plan.layers if row.before is not None}
        before = plan.before
        return Dense(Sizes(before.params, 0, None, before.macs, before.bytes), layers)

    @staticmethod
    def of_model(model: Captured | fx.GraphModule) -> Dense:
        """The dense model itself."""
        snapshot = Snapshot.of(model)
        layers = {row.label: (row.kind, Figures(row.params, row.macs, row.bytes))
                  for row in snapshot.layers if row.params or row.macs}
        return Dense(snapshot.sizes, layers)


@dataclass(frozen=True)
class Run:
    """What the engine says of the run: how long was trained, (statement, measured, whether it holds) of each `expect`,
    notes and warnings."""

    steps: int = 0
    epochs: int = 0
    expects: tuple[tuple[str, str, bool], ...] = ()
    notes: tuple[str, ...] = ()


def run_of(model: Captured | fx.GraphModule) -> Run | None:
    """What the engine says of the run that made `model`, None if nothing. Raises ArtifactError (FXC0604) for a report
    that isn't one."""
    data = meta_of(model).get("report")
    if data is None:
        return None
    fields = dict(Cursor(data, "report.json").pairs())
    empty = Cursor([], "report.json")
    trained = dict(fields["trained"].pairs()) if "trained" in fields else {}
    expects = [dict(item.pairs()) for item in fields.get("expects", empty).items()]
    warnings = [dict(item.pairs()) for item in fields.get("warnings", empty).items()]
    absent = Cursor(None, "report.json")
    none = Cursor(0, "report.json")
    return Run(
        trained.get("steps", none).integer(0), trained.get("epochs", none).integer(0),
        expects=tuple((item.get("text", absent).text(), item.get("shown", absent).text(),
                       item.get("holds", absent).boolean()) for item in expects),
        notes=(*(f"warning: {item.get('message', absent).text()}" for item in warnings),
               *(f"note: {item.text()}" for item in fields.get("notes", empty).items())))
