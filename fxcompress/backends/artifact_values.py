"""Constant arguments of a graph as tagged JSON, and back.

None, truth values, whole numbers, finite floats, texts and lists stand for themselves; everything else is an object
with one key, the tag: `{"tuple": [1, 2]}`, `{"node": "conv1"}`, `{"dtype": "float32"}`, `{"slice": [null, 3, null]}`.
No tag makes a Python object that can do more than a number can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType
from typing import Any

import torch
from torch import fx

from .artifact_json import MAX_DEPTH, MAX_NUMBER, Cursor, fail, printable

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
                 "complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
}
MEMORY_FORMATS: Mapping[str, torch.memory_format] = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
LAYOUTS: Mapping[str, torch.layout] = {"strided": torch.strided}
DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu", "meta")
MAIN_DEVICE = "weights"  # the device that the weights are on, wherever they are loaded to


class UnsaveableError(Exception):
    """A value that has no place in an artifact; the caller says where it stands."""


def encode(value: object, main_device: torch.device) -> Any:
    """`value` as plain JSON data; a named tuple becomes a plain one, a device equal to `main_device` the device of the
    weights. Raises UnsaveableError for what has no encoding."""

    def inner(item: object) -> Any:
        return encode(item, main_device)

    def device(item: torch.device) -> Any:
        same = item.type == main_device.type and item.index in (None, main_device.index)
        return {"device": MAIN_DEVICE if same else str(item)}

    ways: list[tuple[type | tuple[type, ...], Callable[[Any], Any]]] = [
        ((type(None), bool), lambda v: v),
        (str, _text),
        (int, _whole),
        (float, lambda v: v if math.isfinite(v) else {"float": repr(v)}),
        (complex, lambda v: {"complex": [inner(v.real), inner(v.imag)]}),
        (fx.Node, lambda v: {"node": v.name}),
        (list, lambda v: [inner(item) for item in v]),
        (tuple, lambda v: {"tuple": [inner(item) for item in v]}),
        (dict, lambda v: {"dict": [[_key(key), inner(item)] for key, item in v.items()]}),
        (slice, lambda v: {"slice": [inner(part) for part in (v.start, v.stop, v.step)]}),
        (range, lambda v: {"range": [v.start, v.stop, v.step]}),
        (EllipsisType, lambda v: {"ellipsis": True}),
        (torch.device, device),
        ((torch.dtype, torch.memory_format, torch.layout), _named),
    ]
    for kind, way in ways:
        if isinstance(value, kind):
            return way(value)
    raise UnsaveableError(f"a value of type {type(value).__name__}")


def _text(value: str) -> str:
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise UnsaveableError("a text that is not Unicode")
    return str(value)


def _whole(value: int) -> int:
    if not -MAX_NUMBER <= value < MAX_NUMBER:
        raise UnsaveableError(f"the number {value}, which has more than 64 bits,")
    return int(value)


def _key(value: object) -> str | int:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _whole(value)
    raise UnsaveableError(f"a dict key of type {type(value).__name__}")


def _named(value: torch.dtype | torch.memory_format | torch.layout) -> dict[str, str]:
    for tag, table in (("dtype", DTYPES), ("memory_format", MEMORY_FORMATS), ("layout", LAYOUTS)):
        for name, known in table.items():
            if known is value:
                return {tag: name}
    raise UnsaveableError(f"the value {value}")


@dataclass(frozen=True)
class Decoder:
    """Turns tagged JSON into values. `nodes` are those already made: a graph can't refer to a later one, so it has no
    cycle. `device` is where the weights go."""

    nodes: Mapping[str, fx.Node]
    device: torch.device

    @cached_property
    def tags(self) -> Mapping[str, Callable[[Cursor], Any]]:
        """How the value of each tag is read."""
        return {
            "node": self._node,
            "tuple": lambda c: tuple(self.value(item) for item in c.items()),
            "dict": self._dict,
            "slice": lambda c: slice(*self._parts(c, 3)),
            "range": lambda c: range(*(part.integer() for part in self._exactly(c, 3))),
            "ellipsis": lambda c: ... if c.boolean() else c.wrong("true"),
            "float": lambda c: float(c.choice(("inf", "-inf", "nan"))),
            "complex": lambda c: complex(*self._parts(c, 2)),
            "dtype": lambda c: DTYPES[c.choice(tuple(DTYPES))],
            "memory_format": lambda c: MEMORY_FORMATS[c.choice(tuple(MEMORY_FORMATS))],
            "layout": lambda c: LAYOUTS[c.choice(tuple(LAYOUTS))],
            "device": self._device,
        }

    def value(self, cursor: Cursor) -> Any:
        """The value that `cursor` stands at. Depth is bounded by `artifact_json.MAX_DEPTH`."""
        if isinstance(cursor.value, list):
            return [self.value(item) for item in cursor.items()]
        if not isinstance(cursor.value, dict):
            return cursor.value
        fields = list(cursor.pairs())
        if len(fields) != 1 or fields[0][0] not in self.tags:
            fail("FXC0604", f"{cursor.place}: an object with one known tag was expected")
        tag, inner = fields[0]
        return self.tags[tag](inner)

    def _node(self, cursor: Cursor) -> fx.Node:
        name = cursor.text()
        if name not in self.nodes:
            fail("FXC0609", f"{cursor.place}: no node {printable(name)} stands before this one",
                 "a node may use only the nodes above it")
        return self.nodes[name]

    def _dict(self, cursor: Cursor) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for item in cursor.items():
            key, value = self._exactly(item, 2)
            if not isinstance(key.value, str | int):
                key.wrong("a text or a whole number")
            if key.value in found:
                fail("FXC0604", f"{key.place}: the key {printable(str(key.value))} stands twice")
            found[key.value] = self.value(value)
        return found

    def _parts(self, cursor: Cursor, count: int) -> list[Any]:
        parts = [self.value(item) for item in self._exactly(cursor, count)]
        plain = (int, float, type(None), fx.Node)
        if not all(isinstance(part, plain) for part in parts):
            cursor.wrong("numbers")
        if count == 2 and not all(isinstance(part, int | float) for part in parts):
            cursor.wrong("two numbers")
        return parts

    def _exactly(self, cursor: Cursor, count: int) -> list[Cursor]:
        items = cursor.items(MAX_DEPTH * 1024)
        if len(items) != count:
            fail("FXC0604", f"{cursor.place}: {count} elements were expected, {len(items)} stand there")
        return items

    def _device(self, cursor: Cursor) -> torch.device:
        text = cursor.text(32)
        if text == MAIN_DEVICE:
            return self.device
        kind, _, index = text.partition(":")
        if kind not in DEVICE_TYPES or (index and not (index.isascii() and index.isdigit() and len(index) < 4)):
            fail("FXC0604", f"{cursor.place}: {printable(text)} is not a device")
        return torch.device(text)
