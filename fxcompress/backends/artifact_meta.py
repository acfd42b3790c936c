"""What a node remembers, to plain data and back: its facts, its place in the model's source, its provenance.

Texts are shown by `inspect` and `explain`; nothing is ever computed from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import fx

from ..graph.captured import Left, Origin
from ..graph.facts import NodeFact
from .artifact_json import Cursor, fail
from .artifact_values import DTYPES, UnsaveableError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TEXTS, _FLAGS = ("path", "source"), ("no_grad",)


def save_meta(node: fx.Node) -> dict[str, Any]:
    """What an artifact keeps of `node.meta`; empty if there is nothing."""
    meta: dict[str, Any] = {name: str(node.meta[name]) for name in _TEXTS if node.meta.get(name) is not None}
    meta.update({name: True for name in _FLAGS if node.meta.get(name)})
    fact = node.meta.get("fxc")
    if isinstance(fact, NodeFact):
        meta["fact"] = {field.name: _plain(getattr(fact, field.name)) for field in fields(NodeFact)}
    origins = node.meta.get("origins", ())
    if origins:
        meta["origins"] = [save_origin(entry) for entry in origins]
    return meta


def save_origin(entry: Origin) -> list[Any]:
    """One entry of a provenance as a list of its fields."""
    kept = [entry.verb, entry.place, entry.line, entry.phase, entry.detail, list(entry.was)]
    return kept if entry.left is None else [*kept, _plain(asdict(entry.left))]


def _plain(value: Any) -> Any:
    """Nested tuples as lists; a dtype as `{"dtype": name}`."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        if value not in _DTYPE_NAMES:
            raise UnsaveableError(f"a value of {value}")
        return {"dtype": _DTYPE_NAMES[value]}
    return value


def read_meta(node: fx.Node, cursor: Cursor | None) -> None:
    """Put back what `save_meta` kept. Raises ArtifactError."""
    if cursor is None:
        return
    known = cursor.fields((), (*_TEXTS, *_FLAGS, "fact", "origins"))
    node.meta.update({name: known[name].text() for name in _TEXTS if name in known})
    node.meta.update({name: known[name].boolean() for name in _FLAGS if name in known})
    if "fact" in known:
        node.meta["fxc"] = _fact(known["fact"])
    if "origins" in known:
        node.meta["origins"] = tuple(read_origin(item) for item in known["origins"].items())


def _row(cursor: Cursor, count: int) -> list[Cursor]:
    items = cursor.items(64)
    if len(items) != count:
        fail("FXC0604", f"{cursor.place}: {count} elements were expected, {len(items)} stand there")
    return items


def _fact(cursor: Cursor) -> NodeFact:
    values = cursor.fields(tuple(field.name for field in fields(NodeFact)))
    return NodeFact(
        kind=values["kind"].text(), path=values["path"].text(), source=values["source"].text(),
        shape=_shape(values["shape"]),
        dtype=_nested(values["dtype"], _dtype), dynamic=_nested(values["dynamic"], lambda c: c.boolean()),
        params=values["params"].integer(0), macs=values["macs"].integer(0), bytes=values["bytes"].integer(0),
        value_bytes=values["value_bytes"].integer(0))


def _shape(cursor: Cursor) -> Any:
    """Sizes, a nest of them for a value that is a tuple, or None for what has no shape; never a bare number."""
    if cursor.value is not None and not isinstance(cursor.value, list):
        cursor.wrong("a list of sizes")
    return _nested(cursor, lambda c: None if c.value is None else c.integer(0))


def _nested(cursor: Cursor, leaf: Callable[[Cursor], Any]) -> Any:
    if isinstance(cursor.value, list):
        return tuple(_nested(item, leaf) for item in cursor.items())
    return leaf(cursor)


def _dtype(cursor: Cursor) -> Any:
    if isinstance(cursor.value, dict):
        return DTYPES[cursor.fields(("dtype",))["dtype"].choice(tuple(DTYPES))]
    return None if cursor.value is None else cursor.text(200)


def read_origin(cursor: Cursor) -> Origin:
    """One entry of a provenance, as a list of its fields. Raises ArtifactError (FXC0604)."""
    length = len(cursor.value) if isinstance(cursor.value, list) else 0
    verb, place, line, phase, detail, was, *left = _row(cursor, 7 if length == 7 else 6)
    return Origin(verb.text(), place.text(), line.text(), phase.text(), detail.text(),
                  tuple(item.text() for item in was.items()), _left(left[0]) if left else None)


def _left(cursor: Cursor) -> Left:
    values = cursor.fields(tuple(field.name for field in fields(Left)))
    least = values["least_kept"]
    return Left(
        what=values["what"].text(), size=values["size"].integer(0), why=values["why"].text(), by=values["by"].text(),
        indices=_numbers(values["indices"], (int,)), scores=_numbers(values["scores"], (int, float)),
        least_kept=None if least.value is None else least.number())


def _numbers(cursor: Cursor, types: tuple[type, ...]) -> tuple[Any, ...]:
    """A flat list of numbers, checked at once: there may be a hundred thousand of them."""
    if not isinstance(cursor.value, list) or not all(type(item) in types for item in cursor.value):
        cursor.wrong("a list of numbers")
    return tuple(cursor.value)
