"""Selectors as frozen data: what a policy's `conv2d[name ~ "layer*.**", out_channels >= 64]` parses to.

They know no torch; `graph/select.py` evaluates them on a captured graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..source import Span


@dataclass(frozen=True)
class Everything:
    """`*`: every operator."""

    span: Span = field(compare=False)


@dataclass(frozen=True)
class Kind:
    """An operator kind by its canonical name: `conv2d`, `linear`, `relu`."""

    name: str
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Ref:
    """The name of a `let`."""

    name: str
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Path:
    """A string where a selector stands: a glob on module paths, `"layer3"` or `"layer*.conv1"`."""

    glob: str
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Predicate:
    """One condition in `[...]`. `key` is `name` or a fact (`out_channels`, `params`, ...); `value` is a plain
    number in base units (fractions, bytes, counts), a bool, or a string; `is_regex` says that it was `re"..."`."""

    key: str
    op: Literal["~", "==", "!=", "<", "<=", ">", ">="]
    value: float | bool | str
    span: Span = field(compare=False)
    is_regex: bool = False


@dataclass(frozen=True)
class Where:
    """`base[predicate, ...]`: all of the predicates hold."""

    base: Selector
    predicates: tuple[Predicate, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Flow:
    """`a >> b >> c`: `a` whose only consumer is `b`, and so on. It selects the node of `a`."""

    parts: tuple[Selector, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True)
class SetOp:
    """`a | b | c`, `a & b`, `a - b - c`, left to right; one operator only, mixing wants parentheses."""

    op: Literal["|", "&", "-"]
    parts: tuple[Selector, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Helper:
    """`first(s)`, `last(s)`, `inside("layer1")`, `inputs_of(s)`, `coupled(s)`; `first` and `last` take a count too."""

    name: str
    args: tuple[Selector | int, ...]
    span: Span = field(compare=False)


Selector = Everything | Kind | Ref | Path | Where | Flow | SetOp | Helper
