"""The types of values that are numbers: percentages, plain and whole numbers, bits, stretches of training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ..diagnostics import nearest
from . import ast
from .typebase import OUT_OF_RANGE, UNKNOWN_NAME, Mismatch, ValueType, describe, in_range, is_number, show, span_text
from .units import EXAMPLES, UNITS, Measure, canonical, show_number, show_percent, to_base
from .values import RAMPS, Duration, Ramp, SteadyRamp
from .words import listed, quoted


def _no_ramp_name(expr: ast.Call) -> Mismatch:
    known = nearest(expr.name.text, RAMPS, 1)
    return Mismatch(f"unknown ramp `{expr.name.text}`", code=UNKNOWN_NAME, at=expr.name,
                    fix=known[0] if known else None,
                    help=f"did you mean `{known[0]}`?" if known else f"the ramps are {quoted(RAMPS, 'and')}")


@dataclass(frozen=True)
class _Scalar(ValueType):
    """A number that may be a `Ramp` where `ramp` is set."""

    def _scalar(self, expr: ast.Expr) -> float:
        raise NotImplementedError

    def _shown(self, value: float) -> str:
        raise NotImplementedError

    def _check(self, value: object) -> float:
        raise NotImplementedError

    def _read(self, expr: ast.Expr) -> object:
        if not isinstance(expr, ast.Call):
            return self._scalar(expr)
        if not getattr(self, "ramp", False):
            raise Mismatch(f"expected {self.describe()}, found {describe(expr)}", at=expr,
                           help="this value can't move during training; write one value")
        if expr.name.text not in RAMPS:
            raise _no_ramp_name(expr)
        arrow, rate = expr.args[0] if expr.args else None, expr.args[1] if len(expr.args) == 2 else None
        if not isinstance(arrow, ast.Arrow) or len(expr.args) > 2 or not isinstance(rate, ast.Rate | None):
            raise Mismatch(f"the ramp `{expr.name.text}` wants its start and its end", at=expr,
                           help=f"write both, as in `{expr.name.text}({self._shown(0)} -> {self.example})`")
        start, end = self._scalar(arrow.start), self._scalar(arrow.end)
        return Ramp(expr.name.text, start, end) if rate is None else self._steady(expr, rate, start, end)

    def _steady(self, expr: ast.Call, rate: ast.Rate, start: float, end: float) -> SteadyRamp:
        example = f"linear({self._shown(start)} -> {self._shown(end)}, by {rate.amount.span.text} per step)"
        if expr.name.text != "linear":
            raise Mismatch(f"`{expr.name.text}` takes no rate: only `linear` moves evenly", at=rate,
                           help=f"write `{example}`, or leave the rate out")
        if (rate.by.text, rate.per.text) != ("by", "per") or rate.unit.text not in ("step", "epoch"):
            raise Mismatch(f"`{rate.span.text}` is no rate", at=rate, help=f"write it as in `{example}`")
        amount = self._scalar(rate.amount)
        if amount <= 0:
            raise Mismatch("a rate is more than 0", code=OUT_OF_RANGE, at=rate.amount,
                           help="the direction is that from the start to the end of the ramp")
        return SteadyRamp("linear", start, end, amount, "steps" if rate.unit.text == "step" else "epochs")

    def _accept(self, value: object) -> object:
        if isinstance(value, Ramp) and getattr(self, "ramp", False):
            if value.shape not in RAMPS:
                raise Mismatch(f"unknown ramp `{value.shape}`", code=UNKNOWN_NAME)
            if isinstance(value, SteadyRamp) and not (value.rate > 0 and value.shape == "linear"):
                raise Mismatch("a steady ramp is `linear`, at a rate of more than 0", code=OUT_OF_RANGE)
            return replace(value, start=self._check(value.start), end=self._check(value.end))
        return self._check(value)

    def _show(self, value: object) -> str:
        if isinstance(value, Ramp):
            rate = f", by {self._shown(value.rate)} per {value.per[:-1]}" if isinstance(value, SteadyRamp) else ""
            return f"{value.shape}({self._shown(value.start)} -> {self._shown(value.end)}{rate})"
        return self._shown(value) if isinstance(value, int | float) and not isinstance(value, bool) else show(value)


@dataclass(frozen=True)
class Percent(_Scalar):
    """`60%` -> 0.6. With `ramp`, a `Ramp` too."""

    low: float = 0.0
    high: float = 1.0
    ramp: bool = False
    name: ClassVar[str] = "percent"
    example: ClassVar[str] = "60%"

    def _describe(self) -> str:
        return f"a percentage{span_text(self.low, self.high, show_percent)}{' or a ramp' if self.ramp else ''}"

    def _shown(self, value: float) -> str:
        return show_percent(value) if math.isfinite(value) else str(value)

    def _scalar(self, expr: ast.Expr) -> float:
        if isinstance(expr, ast.Quantity) and expr.unit == "%":
            return float(to_base(expr.value, "%"))
        if isinstance(expr, ast.Number):
            percent = expr.value if abs(expr.value) > 1 or expr.value == 0 else round(expr.value * 100, 10)
            raise Mismatch(f"expected {self.describe()}, found {describe(expr)}", at=expr,
                           fix=f"{show_number(percent)}%")
        raise self.wrong(expr)

    def _check(self, value: object) -> float:
        if not isinstance(value, int | float) or not is_number(value):
            raise self.wrong(value)
        in_range(value, self.low, self.high, self._shown)
        return float(value)


@dataclass(frozen=True)
class Number(_Scalar):
    """`0.5`, `-2` -> float. With `ramp`, a `Ramp` too."""

    low: float | None = None
    high: float | None = None
    ramp: bool = False
    name: ClassVar[str] = "number"
    example: ClassVar[str] = "0.5"

    def _describe(self) -> str:
        return f"a number{span_text(self.low, self.high, show)}{' or a ramp' if self.ramp else ''}"

    def _shown(self, value: float) -> str:
        return show(value)

    def _scalar(self, expr: ast.Expr) -> float:
        if isinstance(expr, ast.Number):
            return float(expr.value)
        if isinstance(expr, ast.Quantity) and UNITS[canonical(expr.unit)].measure == "count":
            return float(to_base(expr.value, expr.unit))
        if isinstance(expr, ast.Quantity) and expr.unit == "%":
            raise Mismatch(f"expected {self.describe()}, found {describe(expr)}", at=expr,
                           fix=show_number(float(to_base(expr.value, "%"))))
        raise self.wrong(expr)

    def _check(self, value: object) -> float:
        if not isinstance(value, int | float) or not is_number(value):
            raise self.wrong(value)
        in_range(value, self.low, self.high, show)
        return float(value)


@dataclass(frozen=True)
class _Whole(ValueType):
    """A whole number in some unit; `low` and `high` are fields of the subclasses."""

    measure: ClassVar[Measure]

    def _bounds(self) -> tuple[int | None, int | None]:
        raise NotImplementedError

    def _read(self, expr: ast.Expr) -> object:
        value: float | None = None
        if isinstance(expr, ast.Number) and self.measure == "count":
            value = expr.value
        elif isinstance(expr, ast.Number):
            raise Mismatch(f"expected {self.describe()}, found {describe(expr)}", at=expr,
                           fix=f"{show_number(expr.value)} {self.measure}")
        elif isinstance(expr, ast.Quantity) and UNITS[canonical(expr.unit)].measure == self.measure:
            value = to_base(expr.value, expr.unit)
        if value is None or not math.isfinite(value) or value != int(value):
            raise self.wrong(expr)
        return int(value)

    def _accept(self, value: object) -> object:
        if not isinstance(value, int | float) or not is_number(value) or math.isinf(value) or value != int(value):
            raise self.wrong(value)
        in_range(value, *self._bounds(), show)
        return int(value)


@dataclass(frozen=True)
class Integer(_Whole):
    """`8`, `1.5M` -> int."""

    low: int | None = None
    high: int | None = None
    name: ClassVar[str] = "int"
    example: ClassVar[str] = "8"
    measure: ClassVar[Measure] = "count"

    def _bounds(self) -> tuple[int | None, int | None]:
        return self.low, self.high

    def _describe(self) -> str:
        return f"a whole number{span_text(self.low, self.high, show)}"


@dataclass(frozen=True)
class Bits(_Whole):
    """`4 bits` -> int."""

    low: int = 1
    high: int = 32
    name: ClassVar[str] = "bits"
    example: ClassVar[str] = "4 bits"
    measure: ClassVar[Measure] = "bits"

    def _bounds(self) -> tuple[int | None, int | None]:
        return self.low, self.high

    def _describe(self) -> str:
        return f"a number of bits{span_text(self.low, self.high, show)}"

    def _show(self, value: object) -> str:
        return f"{show(value)} bits"


@dataclass(frozen=True)
class Time(ValueType):
    """`100 steps`, `2 epochs`, `256 samples` -> Duration; `units` says which are allowed."""

    units: tuple[str, ...] = ("steps", "epochs")
    name: ClassVar[str] = "time"
    example: ClassVar[str] = "100 steps"

    def _describe(self) -> str:
        return f"a number of {listed(list(self.units))}"

    def _read(self, expr: ast.Expr) -> object:
        if isinstance(expr, ast.Quantity) and canonical(expr.unit) in self.units:
            return Duration(expr.value, canonical(expr.unit))  # type: ignore[arg-type]
        if isinstance(expr, ast.Number):
            raise Mismatch(f"expected {self.describe()}, found {describe(expr)}", at=expr,
                           fix=f"{show_number(expr.value)} {self.units[0]}")
        raise Mismatch(f"expected {self.describe()}, found {describe(expr)}", at=expr,
                       help=f"write it as in `{EXAMPLES[self.units[0]]}`")  # type: ignore[index]

    def _accept(self, value: object) -> object:
        if not isinstance(value, Duration) or value.unit not in self.units:
            raise self.wrong(value)
        if not value.count > 0:
            raise Mismatch(f"{value} is out of range", code=OUT_OF_RANGE, help="write more than 0")
        return value
