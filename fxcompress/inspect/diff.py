"""A diff of two graphs that a person can read: which layers changed and how, which came and went, then totals.

    ~ layer1.0.conv1   conv2d   out_channels 64 -> 44, params 36,864 -> 25,344, MACs 115.6 M -> 79.48 M
    - layer1.0.bn1     batchnorm2d
    + fc.0             linear

Layers are the same if they have the same name: the module's path for those with weights, the node's name for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import fx

from ..graph.captured import Captured
from .layers import Layer, Sizes, Snapshot
from .rows import Model, open_model
from .text import Table, count, macs, size, sparsity, totals

_FIGURES: Mapping[str, Callable[[Layer], str]] = {
    "kind": lambda layer: layer.kind,
    "shape": lambda layer: layer.shape,
    "params": lambda layer: count(layer.params),
    "MACs": lambda layer: macs(layer.macs),
    "bytes": lambda layer: size(layer.bytes),
    "sparsity": sparsity,
}
ABSENT = "(none)"


@dataclass(frozen=True)
class LayerChange:
    """A layer in both models, and what differs: name of the setting or figure -> texts before and after."""

    layer: str
    kind: str
    changes: Mapping[str, tuple[str, str]]

    @property
    def follows(self) -> bool:
        """Whether only the shape of its value is another: it follows what was done before it."""
        return self.changes.keys() == {"shape"}

    def line(self) -> str:
        """`out_channels 64 -> 44, params 36,864 -> 25,344`; bytes go with the parameters, if these differ."""
        return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.changes.items()
                         if name != "bytes" or "params" not in self.changes)


@dataclass(frozen=True)
class Diff:
    """What differs between two models. Texts, JSON, and a table in a notebook."""

    names: tuple[str, str]
    changed: tuple[LayerChange, ...]
    added: tuple[Layer, ...]
    removed: tuple[Layer, ...]
    same: int
    before: Sizes
    after: Sizes

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.changed or self.added or self.removed)

    def __str__(self) -> str:
        """As `show()`."""
        return self.show()

    def show(self) -> str:
        """The diff as plain text."""
        following = sum(item.follows for item in self.changed)
        counts = (f"{len(self.changed) - following} changed, {following} only in shape, {len(self.added)} added, "
                  f"{len(self.removed)} removed, {self.same} as they were")
        table = self._table()
        return (f"--- {self.names[0]}\n+++ {self.names[1]}\n\n{table.text()}{chr(10) if table.rows else ''}"
                f"layers: {counts}\n\n{totals(self.before, self.after).text()}")

    def _table(self) -> Table:
        rows = [("~", item.layer, item.kind, item.line()) for item in self.changed if not item.follows]
        rows += [("-", layer.label, layer.kind, _outline(layer)) for layer in self.removed]
        rows += [("+", layer.label, layer.kind, _outline(layer)) for layer in self.added]
        return Table(("", "", "", ""), tuple(rows))

    def to_json(self) -> dict[str, Any]:
        """The diff as plain data."""
        changed = [{"layer": item.layer, "kind": item.kind,
                    "changes": {name: list(pair) for name, pair in item.changes.items()}} for item in self.changed]
        return {
            "before": self.names[0], "after": self.names[1],
            "changed": changed,
            "added": [layer.to_json() for layer in self.added],
            "removed": [layer.to_json() for layer in self.removed],
            "same": self.same,
            "sizes": {"before": self.before.to_json(), "after": self.after.to_json()},
        }

    def _repr_html_(self) -> str:
        heading = " → ".join(escape(name) for name in self.names)
        return f"<h4>{heading}</h4>{self._table().html()}{totals(self.before, self.after).html()}"


def _outline(layer: Layer) -> str:
    parts = [f"{name} {value}" for name, value in layer.settings.items() if name in ("out_channels", "out_features")]
    return ", ".join([*parts, *([f"params {count(layer.params)}"] if layer.params else []), layer.shape])


def diff(before: Model, after: Model, names: tuple[str, str] | None = None) -> Diff:
    """What differs between two models, each a captured or loaded graph or an artifact's folder. `names` are what the
    diff calls them. Raises ArtifactError for a damaged folder."""
    default = tuple(_name(model, word) for model, word in ((before, "before"), (after, "after")))
    return compare(Snapshot.of(open_model(before)), Snapshot.of(open_model(after)), names or (default[0], default[1]))


def _name(model: Model, otherwise: str) -> str:
    return otherwise if isinstance(model, Captured | fx.GraphModule) else str(model)


def compare(before: Snapshot, after: Snapshot, names: tuple[str, str] = ("before", "after")) -> Diff:
    """The diff of two snapshots."""
    old = {layer.label: layer for layer in before.layers}
    new = {layer.label: layer for layer in after.layers}
    found = [change_of(old[label], layer) for label, layer in new.items() if label in old]
    changed = tuple(item for item in found if item.changes)
    return Diff(names, changed, tuple(layer for label, layer in new.items() if label not in old),
                tuple(layer for label, layer in old.items() if label not in new), len(found) - len(changed),
                before.sizes, after.sizes)


def change_of(old: Layer, new: Layer) -> LayerChange:
    """What differs between two rows: settings first, then figures."""
    changes: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys((*old.settings, *new.settings)):
        pair = (old.settings.get(name, ABSENT), new.settings.get(name, ABSENT))
        if pair[0] != pair[1]:
            changes[name] = pair
    for name, show in _FIGURES.items():
        pair = (show(old), show(new))
        if pair[0] != pair[1]:
            changes[name] = pair
    return LayerChange(new.label, new.kind, changes)
