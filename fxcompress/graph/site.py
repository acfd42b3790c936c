"""What a pass is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

from ..policy.values import Duration, Ramp
from ..source import Span

UNKNOWN_WEIGHTS = "(known after weights)"


@dataclass(frozen=True)
class Site:
    """Where a pass works: the nodes its selector bound to, in graph order, and where the policy says so."""

    nodes: tuple[fx.Node, ...]
    what: str | None = None
    span: Span | None = None  # None for a pass applied from Python
    phase: str = "(start)"
    selection: str = ""  # the selector's text, for messages
    seed: int = 0


@dataclass(frozen=True)
class Change:
    """One layer of a plan: `path` is the module path (or node name); before and after are short texts."""

    path: str
    kind: str
    what: str  # "out_channels", "sparsity"
    before: str
    after: str  # may be UNKNOWN_WEIGHTS
    why: str = ""  # "selected", "coupled by add at resnet.py:102", ...


@dataclass(frozen=True)
class Scheduled:
    """A number that moves in training: the engine evaluates `ramp` and calls `write(value)` at the times of `every`.

    `write` says whether it could do so; False (no gradients have been seen yet) is tried again at the next step.
    """

    name: str
    ramp: Ramp | float
    write: Callable[[float], bool]
    every: Duration | None = None  # None: every step for a ramp, once for a constant
    rewind: Literal["initial"] | Duration | None = None  # where all weights go back to after each write
    written: bool = False  # the rewrite has written the first value itself


@dataclass(frozen=True)
class Outcome:
    """What a rewrite did. `notes` are shown by `plan` (barriers met, inexact components, ratios not reached)."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()  # what `plan` prints as known after weights
    scheduled: tuple[Scheduled, ...] = ()
    resized: Mapping[Tensor, tuple[tuple[int, Tensor], ...]] = field(default_factory=dict)
    """For each parameter that got smaller in place: its (dimension, kept indices), so that optimizer state follows."""
