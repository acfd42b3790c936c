"""What a pass is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, fx

from ..policy.values import Duration, Ramp, Window
from ..source import Span

if TYPE_CHECKING:
    from ..passbase import Pass
    from .calibration import Calibration
    from .teacher import Teacher

Cuts = tuple[tuple[int, Tensor], ...]  # what a removal left of a tensor: (dimension, kept indices) of each it took from

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
    window: Window | None = None  # when the phase runs, if the policy says so
    teacher: Teacher | None = None  # what the action learns from
    calibration: Calibration | None = None  # inputs to run the graph on; None in a plan, and where none are given
    kept: Mapping[str, Cuts] | None = None
    """What stayed of each parameter and buffer, by name, when the same was carried out before: a pass repeats that
    choice instead of making its own."""


@dataclass(frozen=True)
class Change:
    """One layer of a plan: `path` is the module path (or node name); before and after are short texts."""

    path: str
    kind: str
    what: str  # "out_channels", "sparsity"
    before: str
    after: str  # may be UNKNOWN_WEIGHTS
    why: str = ""  # "selected", "coupled by add at resnet.py:102", ...


class Companion(Protocol):
    """What goes along with a number that moves: it follows parameters that are cut, and may act on the weights after
    each training step until the number has reached its end."""

    def trained(self, times: int, rate: Callable[[Tensor], float]) -> None:
        """A training step was done; `times` of `every` have passed since the phase began, and `rate` is the learning
        rate of a parameter (0 for one that isn't trained)."""

    def cut(self, resized: Mapping[str, Cuts]) -> None:
        """Parameters and buffers of these names were cut."""

    def state(self) -> Mapping[str, Any]:
        """For a checkpoint."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's."""


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
    companion: Companion | None = None
    percent: bool = True  # whether messages show it as a percentage


@dataclass(frozen=True)
class Rewriting:
    """A number that moves in training by rewriting the graph: at the times of `every` the engine carries out the pass
    that `at(value)` gives, on the nodes of the same site; None says that nothing changes.

    Where `ready` says False (no gradients have been seen yet), it is tried again at the next step.
    """

    name: str
    ramp: Ramp | float
    at: Callable[[float], Pass | None]
    ready: Callable[[], bool]
    every: Duration | None = None
    companion: Companion | None = None


@dataclass(frozen=True)
class Outcome:
    """What a rewrite did. `notes` are shown by `plan` (barriers met, inexact components, ratios not reached)."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()  # what `plan` prints as known after weights
    scheduled: tuple[Scheduled, ...] = ()
    rewriting: tuple[Rewriting, ...] = ()
    resized: Mapping[Tensor, Cuts] = field(default_factory=dict)
    """For each parameter that got smaller in place: its (dimension, kept indices), so that optimizer state follows."""
