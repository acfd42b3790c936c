"""The syntax tree of a policy text: frozen dataclasses with spans. It says what was written, not what it means.

Two trees are equal when they say the same; spans don't count. Values and selectors share one grammar of expressions:
whether `first(a)` or `cubic(0% -> 60%)` is meant depends on where it stands, which `check` knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..source import Source, Span


@dataclass(frozen=True)
class Node:
    """Anything with a place in the text."""

    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Name(Node):
    """A bare word: an operator kind, a `let`, a parameter, or a choice such as `magnitude`."""

    text: str


@dataclass(frozen=True)
class Number(Node):
    """`0.5`, `-2`, `1e-4`; integral ones hold an int of any size."""

    value: int | float


@dataclass(frozen=True)
class Quantity(Node):
    """A number with a unit: `60%`, `1.5M`, `6 MiB`, `100 steps`."""

    value: int | float
    unit: str


@dataclass(frozen=True)
class Ratio(Node):
    """`2:4`."""

    n: int | float
    m: int | float


@dataclass(frozen=True)
class String(Node):
    """`"..."`, with its escapes resolved."""

    value: str


@dataclass(frozen=True)
class Regex(Node):
    """`re"..."`; only `\\"` is an escape of ours."""

    pattern: str


@dataclass(frozen=True)
class Star(Node):
    """`*`."""


@dataclass(frozen=True)
class Keyword(Node):
    """`name = value` among the arguments of a call."""

    name: Name
    value: Expr


@dataclass(frozen=True)
class Call(Node):
    """`name(argument, ...)`."""

    name: Name
    args: tuple[Expr | Keyword, ...]


@dataclass(frozen=True)
class Group(Node):
    """`( ... )`: kept, because two set operators may only be mixed with it."""

    inner: Expr


@dataclass(frozen=True)
class Where(Node):
    """`base[condition, ...]`."""

    base: Expr
    conditions: tuple[Expr, ...]


@dataclass(frozen=True)
class Share(Node):
    """`55% of dense`."""

    value: Expr
    whole: Name


@dataclass(frozen=True)
class Operator(Node):
    """One of `| & -` between two operands of a `SetOf`, or a comparison."""

    text: str


@dataclass(frozen=True)
class SetOf(Node):
    """`a | b - c`: operands with the operators between them, flat."""

    parts: tuple[Expr, ...]
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class FlowOf(Node):
    """`a >> b >> c`."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True)
class Arrow(Node):
    """`0% -> 60%`, the argument of a ramp."""

    start: Expr
    end: Expr


@dataclass(frozen=True)
class Rate(Node):
    """`by 0.07 per step`, an argument of a ramp: three words and a number, which `check` looks at."""

    by: Name
    amount: Number | Quantity
    per: Name
    unit: Name


@dataclass(frozen=True)
class Compare(Node):
    """`a >= b`."""

    left: Expr
    operator: Operator
    right: Expr


Expr = (Name | Number | Quantity | Ratio | String | Regex | Star | Call | Group | Where | Share | SetOf | FlowOf | Arrow
        | Rate | Compare)


@dataclass(frozen=True)
class Block(Node):
    """`{ ... }`."""

    items: tuple[Statement, ...]


@dataclass(frozen=True)
class Use(Node):
    """`use "path" { names }`; `names` is None without braces: everything."""

    path: String
    names: tuple[Name, ...] | None


@dataclass(frozen=True)
class Parameter(Node):
    """`sparsity: percent = 60%` of a policy."""

    name: Name
    type: Name
    default: Expr | None


@dataclass(frozen=True)
class PolicyDecl(Node):
    """`policy name(parameters) { ... }`."""

    name: Name
    parameters: tuple[Parameter, ...]
    body: Block


@dataclass(frozen=True)
class PresetDecl(Node):
    """`preset name for verb { key = value }`."""

    name: Name
    verb: Name
    body: Block


@dataclass(frozen=True)
class Let(Node):
    """`let name = selector`."""

    name: Name
    value: Expr


@dataclass(frozen=True)
class Target(Node):
    """`target cpu`."""

    name: Name


@dataclass(frozen=True)
class Input(Node):
    """`input x: f32[N, 3, 224, 224]`."""

    name: Name
    dtype: Name
    dims: tuple[Name | Number, ...]


@dataclass(frozen=True)
class Over(Node):
    """`over epochs 0..12`, or `over 0%..40% of training` (then `word` is `training`)."""

    word: Name
    start: Number | Quantity
    end: Number | Quantity


@dataclass(frozen=True)
class After(Node):
    """`after a, b`."""

    names: tuple[Name, ...]


@dataclass(frozen=True)
class Phase(Node):
    """`phase name over ... after ... { ... }`; the clauses as written, in their order."""

    name: Name
    clauses: tuple[Over | After, ...]
    body: Block


@dataclass(frozen=True)
class Clause(Node):
    """`as preset` or `from teacher`."""

    word: Literal["as", "from"]
    name: Name


@dataclass(frozen=True)
class Action(Node):
    """`optional override verb operand as preset from teacher { ... }`. `head` is from the verb to the operand."""

    modifiers: tuple[Name, ...]
    verb: Name
    operand: Expr | None
    clauses: tuple[Clause, ...]
    body: Block | None
    head: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Budget(Node):
    """`budget macs <= 55% of dense`."""

    condition: Expr


@dataclass(frozen=True)
class Expect(Node):
    """`expect drift(output) < 5% else "why"`."""

    condition: Expr
    why: String | None


@dataclass(frozen=True)
class Pair(Node):
    """`pair student <- teacher { ... }`."""

    student: Name | String
    teacher: Name | String
    body: Block | None


@dataclass(frozen=True)
class Setting(Node):
    """`key = value` in a block."""

    key: Name
    value: Expr


@dataclass(frozen=True)
class Broken(Node):
    """What the parser skipped to go on after an error; its block, if any, was read. Equal to nothing useful."""

    body: Block | None


Statement = (Use | PolicyDecl | PresetDecl | Let | Target | Input | Phase | Action | Budget | Expect | Pair | Setting
             | Broken)


@dataclass(frozen=True)
class File:
    """A whole text."""

    source: Source = field(compare=False)
    items: tuple[Statement, ...] = ()
