"""The checked policy: what plan, engine and Python users consume. No torch, no raw text, every name resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..diagnostics import Diagnostic
from ..source import Source, Span
from .selector import Selector
from .values import Unset, Window


@dataclass(frozen=True)
class InputSpec:
    """`input x: f32[N, 3, 224, 224]`: names are dynamic dimensions, numbers fixed ones."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Pair:
    """`pair student <- teacher { ... }` inside an action. An endpoint is `output` or a path string; that of the
    teacher may be `targets`, the labels."""

    student: str
    teacher: str
    values: Mapping[str, object]
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Action:
    """One `verb what(selector) { key = value }`, with presets merged, parameters of the policy filled in and every
    value checked and converted to what the verb's dataclass takes (see `policy/values.py`)."""

    verb: str
    selector: Selector | None
    values: Mapping[str, object]
    span: Span = field(compare=False)  # the head: from the verb to the end of its selector
    what: str | None = None  # `channels` in `remove channels(body)`
    preset: str | None = None  # `as NAME`
    teacher: str | None = None  # `from NAME`
    pairs: tuple[Pair, ...] = ()
    override: bool = False
    optional: bool = False
    value_spans: Mapping[str, Span] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Phase:
    """A stretch of the work. `window` is None for one that happens at once when its turn comes."""

    name: str
    window: Window | None
    after: tuple[str, ...]
    actions: tuple[Action, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Budget:
    """`budget macs <= 55% of dense`: a constraint the planner meets or refuses. `limit` is a fraction if `relative`,
    else in base units (MACs, parameters, bytes, seconds)."""

    metric: Literal["macs", "params", "size", "latency"]
    op: Literal["<", "<="]
    limit: float
    relative: bool
    span: Span = field(compare=False)


@dataclass(frozen=True)
class Expect:
    """`expect drift(output) < 5% else "why"`: measured on the result. `argument` is a selector, `output` or None."""

    metric: str  # count, drift, unchanged, sparsity, macs, params, size
    argument: Selector | Literal["output"] | None
    op: Literal["==", "!=", "<", "<=", ">", ">="] | None
    limit: float | None
    span: Span = field(compare=False)
    why: str | None = None
    relative: bool = False


@dataclass(frozen=True)
class Policy:
    """A policy that passed `check`, with its parameters given. Phases are in running order (`after` respected);
    actions outside any phase form the first phase, named `(start)`."""

    name: str
    source: Source = field(compare=False)
    target: str = "cpu"
    precision: str | None = None  # that `fxcompress train` trains in: a name of `kinds.PRECISIONS`
    inputs: tuple[InputSpec, ...] = ()
    lets: Mapping[str, Selector] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    budgets: tuple[Budget, ...] = ()
    expects: tuple[Expect, ...] = ()
    params: Mapping[str, object] = field(default_factory=dict)  # `Unset` for one without a default that was not given
    warnings: tuple[Diagnostic, ...] = field(default=(), compare=False)

    @property
    def missing(self) -> tuple[str, ...]:
        """The parameters that must still be given before the policy can be planned; see `policy.instantiate`."""
        return tuple(name for name, value in self.params.items() if isinstance(value, Unset))
