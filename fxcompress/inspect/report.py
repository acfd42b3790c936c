"""The report: what was done to a model, layer by layer and in total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from ..graph.layers import Layer, Snapshot
from .diff import change_of
from .rows import Model, before_of, meta_of, name_of, open_model
from .text import NO_FIGURE, Table, count, macs, size, sparsity, totals

_RIGHT = frozenset({2, 3, 4, 5})


@dataclass(frozen=True)
class Report:
    """A model as it is, beside the dense one that it was made from if that is known. `policy` is the policy's text."""

    name: str
    after: Snapshot
    before: Snapshot | None = None
    policy: str = ""

    def __str__(self) -> str:
        """As `show()`."""
        return self.show()

    def show(self) -> str:
        """The report as plain text: totals, then each layer that holds weights or was changed."""
        sizes = totals(self.before.sizes if self.before else None, self.after.sizes)
        return f"{self.name}\n\n{sizes.text()}\n{self._table().text()}"

    def _rows(self) -> list[tuple[Layer | None, Layer | None]]:
        """(before, after) of each layer, in the order of the dense model, new ones after those they follow."""
        if self.before is None:
            return [(None, layer) for layer in self.after.layers if layer.params]
        new = {layer.label: layer for layer in self.after.layers}
        old = {layer.label: layer for layer in self.before.layers}
        pairs: list[tuple[Layer | None, Layer | None]] = [(layer, new.get(label)) for label, layer in old.items()]
        pairs += [(None, layer) for label, layer in new.items() if label not in old]
        return [(one, two) for one, two in pairs if _worth_a_row(one, two)]

    def _table(self) -> Table:
        heading = ("layer", "kind", "params", "MACs", "bytes", "sparsity", "shape", "what changed")
        return Table(heading, tuple(_row(one, two) for one, two in self._rows()), _RIGHT)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"name": self.name, "policy": self.policy, "before": self.before and self.before.to_json(),
                "after": self.after.to_json()}

    def _repr_html_(self) -> str:
        sizes = totals(self.before.sizes if self.before else None, self.after.sizes).html()
        return f"<h4>{escape(self.name)}</h4>{sizes}{self._table().html()}"


def _worth_a_row(old: Layer | None, new: Layer | None) -> bool:
    if old is None or new is None:
        return True
    return bool(old.params or new.params or change_of(old, new).changes.keys() - {"shape"})


def _row(old: Layer | None, new: Layer | None) -> tuple[str, ...]:
    layer = new or old
    assert layer is not None
    if new is None:
        what = "gone"
    elif old is None:
        what = "new" if new.origins else ""
    else:
        changed: Mapping[str, tuple[str, str]] = change_of(old, new).changes
        what = ", ".join(f"{name} {one} -> {two}" for name, (one, two) in changed.items()
                         if name in new.settings or name == "kind")
    return (layer.label, layer.kind, _pair(old, new, lambda row: count(row.params)),
            _pair(old, new, lambda row: macs(row.macs)), _pair(old, new, lambda row: size(row.bytes)),
            sparsity(new) if new is not None else NO_FIGURE, layer.shape, what)


def _pair(old: Layer | None, new: Layer | None, show: Any) -> str:
    """`36,864 -> 25,344`, or one of both where they agree or there is only one."""
    texts = [show(row) for row in (old, new) if row is not None]
    return texts[0] if len(set(texts)) == 1 else " -> ".join(texts)


def report(model: Model, name: str | None = None) -> Report:
    """The report on `model`: a captured or loaded graph, or an artifact's folder. Raises ArtifactError for a damaged
    one."""
    opened = open_model(model)
    title = name or (str(model) if opened is not model else name_of(opened))
    return Report(title, Snapshot.of(opened), before_of(opened), str(meta_of(opened).get("policy") or ""))
