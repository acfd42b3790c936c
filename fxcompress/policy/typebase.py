"""What all types of values share: the base class, the mismatch they raise, and how messages call what they found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from . import ast
from .units import UNITS, canonical, show_number

WRONG_TYPE, OUT_OF_RANGE, UNKNOWN_NAME = "FXC0105", "FXC0106", "FXC0116"


class Mismatch(Exception):  # noqa: N818 -- always caught: `check` and `coerce` make a diagnostic of it
    """A value that a type does not take. `at` is the part of the value that is wrong, `fix` the text to put there."""

    def __init__(self, reason: str, *, code: str = WRONG_TYPE, at: ast.Node | None = None, fix: str | None = None,
                 help: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.code, self.at, self.fix = reason, code, at, fix
        self.help = help if help is not None else f"write `{fix}`" if fix is not None else None


@dataclass(frozen=True)
class ValueType:
    """Base of all value types."""

    name: ClassVar[str]  # in tables of the reference: `percent`
    example: ClassVar[str]

    def describe(self) -> str:
        """In a sentence: "a percentage from 0% to 100%"."""
        return self._describe()

    def convert(self, expr: ast.Expr, *, ranges: bool = True) -> object:
        """The checked Python value of `expr`; without `ranges` only its kind is checked. Raises Mismatch."""
        value = self._read(expr)
        return self._accept(value) if ranges else value

    def accept(self, value: object) -> object:
        """`value`, made what the verb's field holds, if it is of this type and in range. Raises Mismatch."""
        return self._accept(value)

    def show(self, value: object) -> str:
        """`value` as the language writes it."""
        return self._show(value)

    # What a type says of itself: its description, the value of a syntax (ranges not checked), the check of a value.

    def _describe(self) -> str:
        raise NotImplementedError

    def _read(self, expr: ast.Expr) -> object:
        raise NotImplementedError

    def _accept(self, value: object) -> object:
        raise NotImplementedError

    def _show(self, value: object) -> str:
        return show(value)

    def wrong(self, found: object) -> Mismatch:
        """The plain mismatch: not of this type."""
        return Mismatch(f"expected {self.describe()}, found {describe(found)}", at=_node(found),
                        help=f"write it as in `{self.example}`")


def _node(found: object) -> ast.Node | None:
    return found if isinstance(found, ast.Node) else None


#: what each kind of syntax is called in messages
_NOUNS: dict[type, str] = {
    ast.String: "the text", ast.Regex: "the regular expression", ast.Ratio: "the ratio", ast.Star: "the selector",
    ast.Where: "the selector", ast.SetOf: "the selector", ast.FlowOf: "the selector", ast.Compare: "the comparison",
    ast.Share: "the share", ast.Rate: "the rate", ast.Arrow: "the range",
    ast.Group: "the group", ast.Name: "the name", ast.Call: "the call",
    ast.Number: "the number", ast.Quantity: "the quantity",
}


def describe(found: object) -> str:
    """What `found`, syntax or a Python value, is called in messages."""
    text = found.span.text if isinstance(found, ast.Node) else show(found)
    text = " ".join(text.split())
    shown = f"`{text if len(text) <= 40 else text[:37] + '...'}`"
    if not isinstance(found, ast.Node):
        return shown
    if isinstance(found, ast.Number | ast.Quantity | ast.String) and text.isidentifier():
        return f"the parameter {shown}"
    if isinstance(found, ast.Quantity):
        measure = UNITS[canonical(found.unit)].measure
        return {"percent": "the percentage", "count": "the number", "seconds": "the time"}.get(
            measure, f"the number of {measure}") + f" {shown}"
    return f"{_NOUNS[type(found)]} {shown}"


def show(value: object) -> str:
    """A checked value as the language writes it; fractions look like the numbers they are."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return show_number(value) if math.isfinite(value) else str(value)
    return str(value)


def is_number(value: object) -> bool:
    """Whether a Python value is a real number: a bool is none, nor is a NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def span_text(low: float | None, high: float | None, shown: Callable[[float], str]) -> str:
    """The words for a range: " from 0% to 100%", " of at least 1", or none."""
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        return f" from {shown(low)} to {shown(high)}"
    if low is not None and math.isfinite(low):
        return f" of at least {shown(low)}"
    return f" of at most {shown(high)}" if high is not None and math.isfinite(high) else ""


def in_range(value: float, low: float | None, high: float | None, shown: Callable[[float], str]) -> None:
    """Raise Mismatch where `value` is outside."""
    if (low is not None and value < low) or (high is not None and value > high):
        raise Mismatch(f"{shown(value)} is out of range", code=OUT_OF_RANGE,
                       help=f"write a value{span_text(low, high, shown)}")
