"""The types of the policy language's values. Each says its name, what it accepts and converts; messages in `check`.

Frozen dataclasses, no torch. A verb declares its parameters with these; schema, docs, completion and did-you-mean come
from them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ValueType:
    """Base of all value types (placeholder: the language's owner completes this file)."""


@dataclass(frozen=True)
class Percent(ValueType):
    """`60%` -> 0.6. With `ramp`, a `Ramp` too."""

    low: float = 0.0
    high: float = 1.0
    ramp: bool = False


@dataclass(frozen=True)
class Number(ValueType):
    """`0.5`, `-2` -> float. With `ramp`, a `Ramp` too."""

    low: float | None = None
    high: float | None = None
    ramp: bool = False


@dataclass(frozen=True)
class Integer(ValueType):
    """`8`, `1.5M` -> int."""

    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class Boolean(ValueType):
    """`true` or `false`."""


@dataclass(frozen=True)
class Bits(ValueType):
    """`4 bits` -> int."""

    low: int = 1
    high: int = 32


@dataclass(frozen=True)
class Time(ValueType):
    """`100 steps`, `2 epochs`, `256 samples` -> Duration; `units` says which are allowed."""

    units: tuple[str, ...] = ("steps", "epochs")


@dataclass(frozen=True)
class Choice(ValueType):
    """One of a fixed set of names -> str."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Registered(ValueType):
    """A name in one of passbase's registries (`SCORES`, `CRITERIA`) -> str; others can add names."""

    registry: str


@dataclass(frozen=True)
class Ratio(ValueType):
    """`2:4` -> NofM."""


@dataclass(frozen=True)
class CallOf(ValueType):
    """`block(4, 4)` -> Call: a name and the types of its positional arguments."""

    name: str
    args: tuple[ValueType, ...]


@dataclass(frozen=True)
class OneOf(ValueType):
    """The first of several types that accepts the value."""

    types: tuple[ValueType, ...]


@dataclass(frozen=True)
class Text(ValueType):
    """`"..."` -> str."""
