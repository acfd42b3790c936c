"""Snapshots from wherever they are: a live model, an artifact's folder, a report's JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import fx

from ..backends.artifact import META, load
from ..backends.artifact_json import Cursor
from ..backends.artifact_meta import read_origin
from ..graph.captured import Captured
from ..graph.layers import Layer, Sizes, Snapshot

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


def before_of(model: Captured | fx.GraphModule) -> Snapshot | None:
    """The snapshot of the dense model that `model` was made from, None if it carries none. Raises ArtifactError
    (FXC0604) for a report that isn't one."""
    data = meta_of(model).get("report")
    if data is None:
        return None
    report = Cursor(data, "report.json")
    fields = dict(report.pairs())
    return read_snapshot(fields["before"]) if "before" in fields else None


def read_snapshot(cursor: Cursor) -> Snapshot:
    """The snapshot that `Snapshot.to_json` wrote. Raises ArtifactError (FXC0604)."""
    fields = cursor.fields(("layers", "sizes"))
    return Snapshot(tuple(_layer(item) for item in fields["layers"].items()), _sizes(fields["sizes"]))


def _sizes(cursor: Cursor) -> Sizes:
    fields = cursor.fields(("params", "weights", "zeros", "macs", "bytes"))
    return Sizes(zeros=_maybe(fields["zeros"]), **_whole(fields, "params", "weights", "macs", "bytes"))


def _maybe(cursor: Cursor) -> int | None:
    return None if cursor.value is None else cursor.integer(0)


def _whole(fields: Mapping[str, Cursor], *names: str) -> dict[str, int]:
    return {name: fields[name].integer(0) for name in names}


def _layer(cursor: Cursor) -> Layer:
    fields = cursor.fields(("name", "path", "kind", "settings", "shape", "params", "weights", "zeros", "macs", "bytes",
                            "source", "origins"))
    texts = {name: fields[name].text() for name in ("name", "path", "kind", "shape", "source")}
    return Layer(settings={key: item.text() for key, item in fields["settings"].pairs()}, zeros=_maybe(fields["zeros"]),
                 origins=tuple(read_origin(item) for item in fields["origins"].items()), **texts,
                 **_whole(fields, "params", "weights", "macs", "bytes"))
