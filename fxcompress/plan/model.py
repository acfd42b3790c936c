"""A plan as data: what each action will touch, in which order and why, before and after. No torch, no live graph.

`Plan.to_json` and `Plan.from_json` are inverse to each other; `show.py` makes the text and the table of a notebook.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..diagnostics import Diagnostic, PlanError
from ..policy.model import Policy

if TYPE_CHECKING:
    from ..graph.captured import Captured

FORMAT = 2  # of the JSON; a plan of another format is refused


@dataclass(frozen=True)
class Totals:
    """Of a whole model: parameters, multiply-accumulates of one sample, bytes of the weights as they are stored."""

    params: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Figures:
    """Of one layer: shape of its result (at the example's batch size), parameters, MACs of one sample, bytes."""

    shape: str
    params: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Layer:
    """One layer before and after; None where it isn't there yet, or any more."""

    path: str
    kind: str
    before: Figures | None
    after: Figures | None


@dataclass(frozen=True)
class Change:
    """One thing that an action changes: as `graph.site.Change`."""

    path: str
    kind: str
    what: str
    before: str
    after: str
    why: str


@dataclass(frozen=True)
class Solved:
    """A setting that the policy leaves to the planner: the share it was solved to, `spread` as in `Pass.with_share`,
    and what for. `share` is None where it is solved only when the step is carried out; `forecast` is the one that the
    plan goes on with until then."""

    name: str
    share: float | None
    spread: float
    why: str
    forecast: float


@dataclass(frozen=True)
class PlannedStep:
    """One action: what it selects, what it does, what is known only later. `solved` is set where the policy leaves out
    how much.

    `nodes` are the names of the nodes it works on, `leaves` those it would and leaves to an overriding action; `left`
    are the layers of the latter.
    """

    number: int
    phase: str
    verb: str
    facet: str
    what: str | None
    override: bool
    selection: str
    settings: tuple[tuple[str, str], ...]
    place: str
    line: str
    kinds: tuple[tuple[str, int], ...]
    nodes: tuple[str, ...]
    leaves: tuple[str, ...]
    left: tuple[str, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    unknown: tuple[str, ...]
    after: Totals
    solved: Solved | None = None


@dataclass(frozen=True)
class PlannedPhase:
    """A phase: its window as text ("" for one that happens at once) and what it comes after."""

    name: str
    window: str
    after: tuple[str, ...]


@dataclass(frozen=True)
class PlannedBudget:
    """A budget and how it is met: `value` is None where it is known only after measuring."""

    text: str
    place: str
    metric: str
    limit: float
    value: float | None
    shown: str
    state: Literal["met", "unknown"]


@dataclass(frozen=True)
class PlannedExpect:
    """An expectation, measured on the result."""

    text: str
    place: str
    why: str | None


@dataclass(frozen=True)
class Plan:
    """A policy bound to a model and run on fake tensors. `show()` is its text; `require` refuses another policy or
    model."""

    policy: str
    policy_hash: str
    source: str  # name of the policy's text
    model: str
    graph_hash: str
    target: str
    before: Totals
    after: Totals
    phases: tuple[PlannedPhase, ...]
    steps: tuple[PlannedStep, ...]
    layers: tuple[Layer, ...]
    budgets: tuple[PlannedBudget, ...]
    expects: tuple[PlannedExpect, ...]
    notes: tuple[str, ...] = ()

    def show(self, verbose: bool = False) -> str:
        """The plan as plain text; with `verbose`, layer by layer."""
        from .show import show

        return show(self, verbose)

    def __str__(self) -> str:
        return self.show()

    def _repr_html_(self) -> str:
        from .show import html

        return html(self)

    def to_json(self) -> str:
        """The plan as JSON text, the same for the same plan."""
        return json.dumps({"fxcompress_plan": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of a JSON text. Raises PlanError (FXC0332) for a text that isn't one of this format."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.pop("fxcompress_plan", None) != FORMAT:
                raise ValueError(f"it is not a plan of format {FORMAT}")
            plan: Plan = _decode(cls, data, "plan")
        except (ValueError, RecursionError) as error:
            help = "write it anew: `fxcompress plan POLICY --model SPEC -o FILE`"
            raise PlanError([Diagnostic("FXC0332", f"this is not a readable plan: {error}", help=help)]) from error
        return plan

    def matches(self, policy: Policy, captured: Captured) -> bool:
        """Whether the plan was made from this policy (what it means, not its comments) and this model (its graph and
        shapes, not its weights)."""
        return not self._drift(policy, captured)

    def require(self, policy: Policy, captured: Captured) -> None:
        """Raise PlanError (FXC0330, FXC0331) where the plan was made from another policy or model."""
        found = self._drift(policy, captured)
        if found:
            raise PlanError(found)

    def _drift(self, policy: Policy, captured: Captured) -> list[Diagnostic]:
        found = []
        help = "plan again, read what changed, and compile the new plan"
        if policy_hash(policy) != self.policy_hash:
            found.append(Diagnostic(
                "FXC0330", f"the policy has changed since this plan was made from `{self.policy}` of {self.source}",
                notes=("comments and formatting don't count; values of the policy's parameters do",), help=help))
        if captured.fingerprint() != self.graph_hash:
            found.append(Diagnostic(
                "FXC0331", "the model is not the one this plan was made for: its graph or its shapes differ",
                notes=(f"planned for {self.model}", "the values of weights don't count"), help=help))
        return found


def policy_hash(policy: Policy) -> str:
    """SHA-256 of what a policy says: neither comments nor formatting nor the file's name count."""
    return hashlib.sha256(json.dumps(_meaning(policy), sort_keys=True).encode()).hexdigest()


def _meaning(value: object) -> object:
    """`value` as plain data: of dataclasses the fields that count in comparisons, with their class."""
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(_meaning(getattr(value, f.name)) for f in fields(value) if f.compare)]
    if isinstance(value, Mapping):
        return {str(key): _meaning(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_meaning(item) for item in value]
    return value if isinstance(value, str | int | float | bool | NoneType) else repr(value)


def _decode(type_: Any, value: object, place: str) -> Any:
    """`value` of JSON as `type_`: a dataclass of this module, a tuple, a union or a plain type. Raises ValueError."""
    origin, inner = get_origin(type_), get_args(type_)
    if is_dataclass(type_) and isinstance(value, dict):
        hints = get_type_hints(type_)
        if value.keys() != hints.keys():
            raise ValueError(f"`{place}` has other fields than expected")
        return type_(**{name: _decode(hint, value[name], f"{place}.{name}") for name, hint in hints.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        items = list(inner) if inner[-1] is not Ellipsis else [inner[0]] * len(value)
        if len(items) == len(value):
            return tuple(_decode(hint, item, place) for hint, item in zip(items, value, strict=True))
    if origin in (UnionType, Union):
        some = next(hint for hint in inner if hint is not NoneType)
        return None if value is None else _decode(some, value, place)
    if type_ is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    if (origin is Literal and value in inner) or (isinstance(type_, type) and type(value) is type_):
        return value
    raise ValueError(f"`{place}` is wrong")
