"""Strict reading of JSON that a stranger wrote: every wrong thing is an `ArtifactError` that says where it is.

`parse` turns bytes into plain Python values within limits; a `Cursor` walks them by field, checks the type of each and
knows its own place ("graph.json: nodes[3].args[0]"), so that decoders read as straight code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from math import isfinite
from typing import Any, NoReturn

from ..diagnostics import ArtifactError, Diagnostic
from ..render import clean

MAX_DEPTH = 64
MAX_NUMBER = 2**63  # what fits a tensor dimension
MAX_JSON_BYTES = 256 * 2**20
HELP = "take the artifact from its source again, or compile it anew"

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
SEGMENT = re.compile(r"[A-Za-z0-9_+:/@ -]{1,255}")  # of a module path: code quotes it, so no quotes and no backslash


def fail(code: str, message: str, *notes: str, help_: str | None = HELP) -> NoReturn:
    """Raise an `ArtifactError` with one diagnostic."""
    raise ArtifactError([Diagnostic(code, message, notes=notes, help=help_)])


def printable(text: str, limit: int = 80) -> str:
    """`text` for a message: quoted, control characters escaped, cut at `limit`."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return ascii(cut) if not cut.isprintable() else f"`{cut}`"


def reason(error: Exception, limit: int = 200) -> str:
    """What `error` says, on one line, fit for a note."""
    text = clean(" ".join(str(error).split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise ValueError(f"the key {printable(key)} stands twice in one object")
        found[key] = value
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse(data: bytes, name: str) -> Cursor:
    """The JSON document in `data`. Raises ArtifactError (FXC0604) for broken JSON, a key that stands twice, NaN and
    infinity, text that isn't UTF-8, numbers beyond 64 bits, and nesting deeper than `MAX_DEPTH`."""
    if len(data) > MAX_JSON_BYTES:
        fail("FXC0608", f"{name} has {len(data)} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
    except RecursionError:
        fail("FXC0604", f"{name} is nested too deeply", f"at most {MAX_DEPTH} levels are read")
    except (ValueError, UnicodeDecodeError) as error:
        fail("FXC0604", f"{name} is not a JSON document", reason(error))
    _check_plain(value, name)
    return Cursor(value, name)


def _check_plain(value: object, name: str) -> None:
    """Bound depth and numbers, without recursion."""
    stack: list[tuple[object, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            fail("FXC0604", f"{name} is nested too deeply", f"at most {MAX_DEPTH} levels are read")
        if isinstance(item, dict):
            stack.extend((inner, depth + 1) for pair in item.items() for inner in pair)
        elif isinstance(item, list):
            stack.extend((inner, depth + 1) for inner in item)
        elif isinstance(item, str):
            if any("\ud800" <= char <= "\udfff" for char in item):
                fail("FXC0604", f"{name} holds text that is not Unicode")
        elif (isinstance(item, float) and not isfinite(item)) or (
                isinstance(item, int) and not -MAX_NUMBER <= item < MAX_NUMBER):
            fail("FXC0604", f"{name} holds a number out of range")


@dataclass(frozen=True)
class Cursor:
    """A value of a document and its place in it. Each method checks a type and raises ArtifactError (FXC0604)."""

    value: Any
    place: str

    def wrong(self, wanted: str) -> NoReturn:
        """Raise: here stands something other than `wanted`."""
        found = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number",
                 float: "a number", type(None): "null"}[type(self.value)]
        fail("FXC0604", f"{self.place}: {wanted} was expected, {found} stands there")

    def text(self, limit: int = 10_000) -> str:
        """A string of at most `limit` characters."""
        if not isinstance(self.value, str):
            self.wrong("a text")
        if len(self.value) > limit:
            fail("FXC0608", f"{self.place}: a text of {len(self.value)} characters; at most {limit} are read")
        return self.value

    def choice(self, names: tuple[str, ...]) -> str:
        """One of `names`."""
        if self.value not in names:
            fail("FXC0604", f"{self.place}: one of {', '.join(names)} was expected, not {printable(str(self.value))}")
        return str(self.value)

    def identifier(self) -> str:
        """A plain Python name. Generated code is made of these, so nothing else may ever pass."""
        name = self.text()
        if not IDENTIFIER.fullmatch(name) or name.startswith("__") or iskeyword(name):
            fail("FXC0606", f"{self.place}: {printable(name)} is not a plain name")
        return name

    def path(self) -> str:
        """A dotted module path: characters of `SEGMENT` between the dots, no dunder names."""
        name = self.text()
        parts = name.split(".")
        if not all(SEGMENT.fullmatch(part) for part in parts) or any(part.startswith("__") for part in parts):
            fail("FXC0606", f"{self.place}: {printable(name)} is not a path of plain names")
        if len(parts) > MAX_DEPTH:
            fail("FXC0608", f"{self.place}: the path has {len(parts)} parts; at most {MAX_DEPTH} are read")
        return name

    def boolean(self) -> bool:
        """A truth value."""
        if not isinstance(self.value, bool):
            self.wrong("a truth value")
        return self.value

    def integer(self, low: int = -MAX_NUMBER, high: int = MAX_NUMBER - 1) -> int:
        """A whole number in `[low, high]`."""
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            self.wrong("a whole number")
        if not low <= self.value <= high:
            fail("FXC0604", f"{self.place}: {self.value} is not between {low} and {high}")
        return self.value

    def number(self) -> float:
        """A number."""
        if not isinstance(self.value, int | float) or isinstance(self.value, bool):
            self.wrong("a number")
        return self.value

    def items(self, limit: int = 1_000_000) -> list[Cursor]:
        """The elements of a list of at most `limit`."""
        if not isinstance(self.value, list):
            self.wrong("a list")
        if len(self.value) > limit:
            fail("FXC0608", f"{self.place} has {len(self.value)} elements; at most {limit} are read")
        return [Cursor(item, f"{self.place}[{index}]") for index, item in enumerate(self.value)]

    def pairs(self, limit: int = 1_000_000) -> Iterator[tuple[str, Cursor]]:
        """The fields of an object, in order, whatever their names."""
        if not isinstance(self.value, dict):
            self.wrong("an object")
        if len(self.value) > limit:
            fail("FXC0608", f"{self.place} has {len(self.value)} fields; at most {limit} are read")
        for key, item in self.value.items():
            yield key, Cursor(item, f"{self.place}.{key if key.isidentifier() else printable(key)}")

    def fields(self, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Cursor]:
        """The fields of an object that has all of `required`, may have `optional`, and no other."""
        found = dict(self.pairs())
        missing = [name for name in required if name not in found]
        if missing:
            fail("FXC0604", f"{self.place}: the field `{missing[0]}` is missing")
        for name in found:
            if name not in required and name not in optional:
                fail("FXC0604", f"{self.place}: no field {printable(name)} is known here")
        return found

    def optional(self) -> Cursor | None:
        """This value, or None for null."""
        return None if self.value is None else self


def dump(value: object) -> bytes:
    """`value` as JSON bytes: stable order of keys as given, no NaN, one trailing newline."""
    return (json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=True)
            + "\n").encode("utf-8")
