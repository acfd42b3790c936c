"""Why a layer is as it is: each rule that touched it, with the policy's line and the model's source line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from typing import Any

from ..diagnostics import ArtifactError, Diagnostic, nearest
from ..graph.captured import Left, Origin
from ..plan.model import Plan
from ..render import clean
from .layers import Layer, Snapshot
from .rows import Model, open_model, plan_of
from .text import count, macs, ranges


@dataclass(frozen=True)
class Explanation:
    """A layer as it is (None for one that is gone), the rules that touched it, oldest first, and the layers that came
    of it."""

    label: str
    kind: str
    layer: Layer | None
    origins: tuple[Origin, ...]
    successors: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As `show()`."""
        return self.show()

    def show(self) -> str:
        """The explanation as plain text."""
        lines = [f"{self.label}: {self.kind}, {self._state()}"]
        if self.layer is not None and self.layer.source:
            lines.append(f"  the model: {self.layer.source}")
        if self.successors:
            lines.append(f"  it became: {', '.join(self.successors)}")
        if not self.origins:
            lines.append("  no rule touched it")
        for number, rule in enumerate(self.rules(), 1):
            first = rule[0]
            lines += ["", f"  {number}. {first.verb}, phase {first.phase}, {first.place}", f"     {first.line}",
                      *(line for origin in rule for line in _told(origin))]
            own = self.layer.name if self.layer is not None else ""
            was = dict.fromkeys(name for origin in rule for name in origin.was if name != own)
            if was:
                lines.append(f"     made from {', '.join(was)}")
        return "".join(f"{clean(line)}\n" for line in lines)

    def _state(self) -> str:
        if self.layer is None:
            return "gone"
        return f"{count(self.layer.params)} parameters, {macs(self.layer.macs)} MACs, shape {self.layer.shape}"

    def rules(self) -> list[list[Origin]]:
        """The entries of the provenance, those of one rule after the other together."""
        def rule(origin: Origin) -> tuple[str, ...]:
            return origin.verb, origin.place, origin.line, origin.phase

        return [list(entries) for _, entries in groupby(self.origins, rule)]

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return {"label": self.label, "kind": self.kind, "layer": self.layer.to_json() if self.layer else None,
                "successors": list(self.successors), "rules": [asdict(origin) for origin in self.origins]}

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.show())}</pre>"


def _told(origin: Origin) -> list[str]:
    """What one entry did; for a removal which indices left, why, and what they scored beside those that stay."""
    left = origin.left
    if left is None:
        return [f"     {origin.detail}"]
    lines = [f"     {origin.detail}, {left.why}", f"       gone of the first {left.size:,}: {ranges(left.indices)}"]
    if left.scores:
        beside = f"; what stays scores {left.least_kept:.4g} or more" if left.least_kept is not None else ""
        lines.append(f"       by {left.by} they score {min(left.scores):.4g} to {max(left.scores):.4g}{beside}")
    return lines


def removed(model: Model, layer: str) -> tuple[Left, ...]:
    """Which indices of `layer` left, one entry for each removal and dimension ("out_channels", "in_features"), oldest
    first, in the numbering of the model as it was captured, with what the criterion gave each and why it left. Raises
    as `explain`."""
    return tuple(origin.left for origin in explain(model, layer).origins if origin.left is not None)


def explain(model: Model, layer: str) -> Explanation:
    """The explanation of `layer`, a module's path or a node's name, in a captured or loaded graph or an artifact's
    folder. Raises ArtifactError: FXC0613 with the nearest names for a layer that isn't there, and for a damaged
    folder."""
    opened = open_model(model)
    now = Snapshot.of(opened).layers
    found = _find(now, layer)
    if found is not None:
        return Explanation(found.label, found.kind, found, found.origins)
    plan = plan_of(opened)
    old = {row.path: row for row in plan.layers} if plan is not None else {}
    if layer in old:
        name = layer.replace(".", "_")
        heirs = [row for row in now if any(name in origin.was for origin in row.origins)]
        origins = dict.fromkeys(o for row in heirs for o in row.origins if name in o.was)
        left = () if plan is None or heirs else _left_with(plan, layer)
        return Explanation(layer, old[layer].kind, None, (*origins, *left), tuple(row.label for row in heirs))
    raise _unknown(layer, [*(row.label for row in now), *old])


def _left_with(plan: Plan, layer: str) -> tuple[Origin, ...]:
    """The rule that took the block out which `layer`, gone without an heir, was part of."""
    return tuple(Origin(step.verb, step.place, step.line, step.phase, f"left with the block {change.path}")
                 for step in plan.steps for change in step.changes
                 if change.what == "block" and layer.startswith(f"{change.path}."))[:1]


def _find(rows: Sequence[Layer], name: str) -> Layer | None:
    """The row of this label or node name; else the one function called in the module of this path."""
    for row in rows:
        if name in (row.label, row.name):
            return row
    inside = [row for row in rows if name and row.path == name]
    return inside[0] if len(inside) == 1 else None


def _unknown(name: str, labels: Iterable[str]) -> ArtifactError:
    known = list(dict.fromkeys(labels))
    close = nearest(name, known)
    inside = [label for label in known if label.startswith(f"{name}.")]
    if inside:
        help_ = f"`{name}` holds {len(inside)} layers; name one of them, such as `{inside[0]}`"
    else:
        help_ = f"did you mean {' or '.join(f'`{word}`' for word in close)}?" if close else \
            "`fxcompress inspect DIR` lists the layers"
    return ArtifactError([Diagnostic("FXC0613", f"there is no layer `{clean(name)}`", help=help_)])
