"""The types of the policy language's values. Each says its name, describes itself, reads its syntax (`convert`) and
checks a Python value (`accept`), so that a policy text and a call from Python are held to the same rules.

Frozen dataclasses, no torch. A verb declares its parameters with these; schema, docs, completion and did-you-mean all
come from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..diagnostics import nearest
from . import ast, schema
from .numeric import Bits, Integer, Number, Percent, Time
from .typebase import OUT_OF_RANGE, UNKNOWN_NAME, Mismatch, ValueType, describe, show
from .values import Call, NofM
from .words import listed, quoted

__all__ = ["Bits", "Boolean", "CallOf", "Choice", "Integer", "Mismatch", "Number", "OneOf", "Percent", "Ratio",
           "Registered",
           "Text", "Time", "ValueType"]


@dataclass(frozen=True)
class Boolean(ValueType):
    """`true` or `false`."""

    name: ClassVar[str] = "bool"
    example: ClassVar[str] = "true"

    def _describe(self) -> str:
        return "`true` or `false`"

    def _read(self, expr: ast.Expr) -> object:
        if isinstance(expr, ast.Name) and expr.text in ("true", "false"):
            return expr.text == "true"
        if isinstance(expr, ast.Name) and expr.text.lower() in ("true", "false", "yes", "no", "on", "off"):
            raise Mismatch(f"expected `true` or `false`, found {describe(expr)}", at=expr,
                           fix="true" if expr.text.lower() in ("true", "yes", "on") else "false")
        raise self.wrong(expr)

    def _accept(self, value: object) -> object:
        if not isinstance(value, bool):
            raise self.wrong(value)
        return value


@dataclass(frozen=True)
class _Named(ValueType):
    """One of several bare words."""

    def _names(self) -> Iterable[str]:
        raise NotImplementedError

    def _known(self, word: str) -> bool:
        return word in self._names()

    def _describe(self) -> str:
        return quoted(self._names())

    def _read(self, expr: ast.Expr) -> object:
        if isinstance(expr, ast.Name):
            return expr.text
        if isinstance(expr, ast.String) and not expr.span.text.startswith('"'):
            return expr.value  # the value of a policy parameter of type text
        if isinstance(expr, ast.String) and self._known(expr.value):
            raise Mismatch(f"expected a bare word, found {describe(expr)}", at=expr, fix=expr.value)
        raise self.wrong(expr)

    def _accept(self, value: object) -> object:
        if not isinstance(value, str):
            raise self.wrong(value)
        if self._known(value):
            return value
        known = nearest(value, self._names(), 1)
        raise Mismatch(f"expected {self.describe()}, found `{value}`", code=UNKNOWN_NAME,
                       fix=known[0] if known else None,
                       help=f"did you mean `{known[0]}`?" if known else f"write {self.describe()}")


@dataclass(frozen=True)
class Choice(_Named):
    """One of a fixed set of names -> str."""

    names: tuple[str, ...]
    name: ClassVar[str] = "choice"

    @property
    def example(self) -> str:  # type: ignore[override]
        """The first of the names."""
        return self.names[0]

    def _names(self) -> Iterable[str]:
        return self.names


@dataclass(frozen=True)
class Registered(_Named):
    """A name in one of passbase's registries (`SCORES`, `CRITERIA`) -> str; others can add names."""

    registry: str
    name: ClassVar[str] = "name"

    @property
    def example(self) -> str:  # type: ignore[override]
        """The first of the names, by the alphabet."""
        return next(iter(self._names()), "name")

    def _names(self) -> Iterable[str]:
        return schema.registered(self.registry)

    def _known(self, word: str) -> bool:
        return schema.is_registered(self.registry, word)


@dataclass(frozen=True)
class Ratio(ValueType):
    """`2:4` -> NofM."""

    name: ClassVar[str] = "n:m"
    example: ClassVar[str] = "2:4"

    def _describe(self) -> str:
        return "a ratio such as `2:4`"

    def _read(self, expr: ast.Expr) -> object:
        if not isinstance(expr, ast.Ratio) or isinstance(expr.n, float) or isinstance(expr.m, float):
            raise self.wrong(expr)
        return NofM(expr.n, expr.m)

    def _accept(self, value: object) -> object:
        if not isinstance(value, NofM):
            raise self.wrong(value)
        if not 0 < value.n < value.m:
            raise Mismatch(f"{value} is out of range", code=OUT_OF_RANGE,
                           help="of `n:m`, n are kept of every m: 0 < n < m, as in `2:4`")
        return value


@dataclass(frozen=True)
class CallOf(ValueType):
    """`block(4, 4)` -> Call: a name and the types of its positional arguments."""

    name: str  # type: ignore[misc]
    args: tuple[ValueType, ...]

    @property
    def example(self) -> str:  # type: ignore[override]
        """The call with the examples of its arguments."""
        return f"{self.name}({', '.join(arg.example for arg in self.args)})"

    def _describe(self) -> str:
        return f"`{self.example}`"

    def _read(self, expr: ast.Expr) -> object:
        return self._call(expr, ranges=False)

    def convert(self, expr: ast.Expr, *, ranges: bool = True) -> object:
        """The checked `Call`; each argument is read by its own type. Raises Mismatch."""
        return self._call(expr, ranges=ranges)

    def _call(self, expr: ast.Expr, *, ranges: bool) -> Call:
        if not isinstance(expr, ast.Call) or expr.name.text != self.name:
            raise self.wrong(expr)
        given = [arg for arg in expr.args if not isinstance(arg, ast.Keyword)]
        if len(given) != len(self.args) or len(given) != len(expr.args):
            raise Mismatch(f"`{self.name}` takes {len(self.args)} arguments, found {len(expr.args)}", at=expr,
                           help=f"write it as in `{self.example}`")
        return Call(self.name, tuple(type_.convert(arg, ranges=ranges)
                                     for type_, arg in zip(self.args, given, strict=True)))

    def _accept(self, value: object) -> object:
        if not isinstance(value, Call) or value.name != self.name or len(value.args) != len(self.args) or value.kwargs:
            raise self.wrong(value)
        return Call(self.name, tuple(type_.accept(arg) for type_, arg in zip(self.args, value.args, strict=True)))


@dataclass(frozen=True)
class OneOf(ValueType):
    """The first of several types that accepts the value."""

    types: tuple[ValueType, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the types."""
        return " or ".join(dict.fromkeys(type_.name for type_ in self.types))

    @property
    def example(self) -> str:  # type: ignore[override]
        """The example of the first type."""
        return self.types[0].example

    def _describe(self) -> str:
        return listed([type_.describe() for type_ in self.types])

    def convert(self, expr: ast.Expr, *, ranges: bool = True) -> object:
        """The value by the first type that takes it; else the most telling mismatch: a range or a misspelt name before
        a plain wrong type."""
        return self._first(lambda type_: type_.convert(expr, ranges=ranges), expr)

    def _accept(self, value: object) -> object:
        return self._first(lambda type_: type_.accept(value), value)

    def _show(self, value: object) -> str:
        for type_ in self.types:
            try:
                type_.accept(value)
            except Mismatch:
                continue
            return type_.show(value)
        return show(value)

    def _first(self, attempt: Callable[[ValueType], object], found: object) -> object:
        missed = []
        for type_ in self.types:
            try:
                return attempt(type_)
            except Mismatch as mismatch:
                missed.append(mismatch)
        telling = [mismatch for mismatch in missed if mismatch.code == OUT_OF_RANGE or mismatch.fix is not None]
        if telling:
            raise telling[0]
        inner = [mismatch for mismatch in missed if mismatch.at is not None and mismatch.at is not found]
        raise inner[0] if inner else self.wrong(found)


@dataclass(frozen=True)
class Text(ValueType):
    """`"..."` -> str."""

    name: ClassVar[str] = "text"
    example: ClassVar[str] = '"layer1"'

    def _describe(self) -> str:
        return 'a text in `"`'

    def _read(self, expr: ast.Expr) -> object:
        if isinstance(expr, ast.String):
            return expr.value
        if isinstance(expr, ast.Name):
            raise Mismatch(f"expected {self.describe()}, found {describe(expr)}", at=expr, fix=f'"{expr.text}"')
        raise self.wrong(expr)

    def _accept(self, value: object) -> object:
        if not isinstance(value, str):
            raise self.wrong(value)
        return value

    def _show(self, value: object) -> str:
        return f'"{value}"'
