"""Why a layer is as it is: each rule that touched it, with the policy's line and the model's source line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from ..diagnostics import ArtifactError, Diagnostic, nearest
from ..graph.captured import Origin
from ..graph.layers import Layer, Snapshot
from ..render import clean
from .rows import Model, before_of, open_model
from .text import count, macs


@dataclass(frozen=True)
class Explanation:
    """A layer (as it is, or as it was if it is gone), the rules that touched it, oldest first, and the layers that came
    of it."""

    layer: Layer
    origins: tuple[Origin, ...]
    gone: bool = False
    successors: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As `show()`."""
        return self.show()

    def show(self) -> str:
        """The explanation as plain text."""
        layer = self.layer
        state = " (gone)" if self.gone else ""
        lines = [f"{layer.label}: {layer.kind}{state}, {count(layer.params)} parameters, {macs(layer.macs)} MACs"]
        if layer.source:
            lines.append(f"  the model: {layer.source}")
        if self.successors:
            lines.append(f"  it became: {', '.join(self.successors)}")
        if not self.origins:
            lines.append("  no rule touched it")
        for number, rule in enumerate(self.rules(), 1):
            first = rule[0]
            lines += ["", f"  {number}. {first.verb}, phase {first.phase}, {first.place}", f"     {first.line}",
                      *(f"     {origin.detail}" for origin in rule)]
            was = [name for name in dict.fromkeys(n for origin in rule for n in origin.was) if name != layer.name]
            if was:
                lines.append(f"     made from {', '.join(was)}")
        return "".join(f"{clean(line)}\n" for line in lines)

    def rules(self) -> list[list[Origin]]:
        """The entries of the provenance, those of one rule after the other together."""
        def rule(origin: Origin) -> tuple[str, ...]:
            return origin.verb, origin.place, origin.line, origin.phase

        return [list(entries) for _, entries in groupby(self.origins, rule)]

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return {"layer": self.layer.to_json(), "gone": self.gone, "successors": list(self.successors),
                "rules": [{"verb": o.verb, "place": o.place, "line": o.line, "phase": o.phase, "detail": o.detail,
                           "was": list(o.was)} for o in self.origins]}

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.show())}</pre>"


def explain(model: Model, layer: str) -> Explanation:
    """The explanation of `layer`, a module's path or a node's name, in a captured or loaded graph or an artifact's
    folder. Raises ArtifactError: FXC0613 with the nearest names for a layer that isn't there, and for a damaged
    folder."""
    opened = open_model(model)
    now, before = Snapshot.of(opened).layers, before_of(opened)
    found = _find(now, layer)
    if found is not None:
        return Explanation(found, found.origins)
    old = _find(before.layers, layer) if before is not None else None
    if old is not None:
        heirs = [row for row in now if any(old.name in origin.was for origin in row.origins)]
        origins = dict.fromkeys(o for row in heirs for o in row.origins if old.name in o.was)
        return Explanation(old, tuple(origins), gone=True, successors=tuple(row.label for row in heirs))
    raise _unknown(layer, (*now, *(before.layers if before is not None else ())))


def _find(rows: Sequence[Layer], name: str) -> Layer | None:
    """The row of this label or node name; else the one function called in the module of this path."""
    for row in rows:
        if name in (row.label, row.name):
            return row
    inside = [row for row in rows if row.path == name]
    return inside[0] if len(inside) == 1 else None


def _unknown(name: str, rows: Iterable[Layer]) -> ArtifactError:
    known = list(dict.fromkeys(row.label for row in rows))
    close = nearest(name, known)
    inside = [label for label in known if label.startswith(f"{name}.")]
    if inside:
        help_ = f"`{name}` holds {len(inside)} layers; name one of them, such as `{inside[0]}`"
    else:
        help_ = f"did you mean {' or '.join(f'`{word}`' for word in close)}?" if close else \
            "`fxcompress inspect DIR` lists the layers"
    return ArtifactError([Diagnostic("FXC0613", f"there is no layer `{clean(name)}`", help=help_)])
