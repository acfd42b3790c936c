"""The report: what was done to a model, layer by layer and in total."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from ..engine.quantization_rows import Quantization
from ..render import clean
from .layers import Layer, Snapshot
from .quantization import Shown, quantization_of
from .rows import Dense, Figures, Model, Run, meta_of, name_of, open_model, plan_of, run_of
from .text import NO_FIGURE, Table, count, macs, size, sparsity, totals

END = "(end)"  # the phase of what finalize does, whatever the policy says
_RIGHT = frozenset({2, 3, 4, 5})


@dataclass(frozen=True)
class Row:
    """One layer: before (None where it is new) and after (None where it is gone)."""

    label: str
    kind: str
    before: Figures | None
    after: Layer | None

    @property
    def what(self) -> str:
        """What the policy did to it, in the words of its rules."""
        if self.after is None:
            return "gone"
        details = (origin.detail.replace(f"{self.label}.", "") for origin in self.after.origins if origin.phase != END)
        return "; ".join(dict.fromkeys(details))


@dataclass(frozen=True)
class Report:
    """A model as it is, beside the dense one that it was made from and the run that made it, if these are known.
    `policy` is the policy's text; `quantization` is None for a model without."""

    name: str
    after: Snapshot
    before: Dense | None = None
    run: Run | None = None
    policy: str = ""
    quantization: Quantization | None = None

    def __str__(self) -> str:
        """As `show()`."""
        return self.show()

    def show(self) -> str:
        """The report as plain text: totals, each layer with weights or that was touched, how it is
        quantized, what was measured."""
        parts = [f"{clean(self.name)}{self._trained()}\n", self._totals().text(), self._table().text()]
        if self.quantization is not None:
            parts.append(Shown(self.quantization).text())
        if self.run is not None and self.run.expects:
            parts.append(self._expects(self.run).text())
        if self.run is not None and self.run.notes:
            parts.append("".join(f"{clean(note)}\n" for note in self.run.notes))
        return "\n".join(parts)

    def _trained(self) -> str:
        if self.run is None:
            return ""
        if not self.run.steps and not self.run.epochs:
            return ", compressed without training"
        return f", compressed over {self.run.steps:,} steps, {self.run.epochs:,} epochs of training"

    def _totals(self) -> Table:
        return totals(self.before.sizes if self.before else None, self.after.sizes)

    def rows(self) -> list[Row]:
        """The layers that have weights or were touched, in the order of the graph; those that are gone last."""
        old = self.before.layers if self.before is not None else {}
        found = [Row(layer.label, layer.kind, old[layer.label][1] if layer.label in old else None, layer)
                 for layer in self.after.layers if layer.params or layer.macs or layer.origins]
        there = {layer.label for layer in self.after.layers}
        return found + [Row(label, kind, figures, None) for label, (kind, figures) in old.items() if label not in there]

    def _table(self) -> Table:
        heading = ("layer", "kind", "params", "MACs", "bytes", "sparsity", "shape", "what was done")
        return Table(heading, tuple(_cells(row) for row in self.rows()), _RIGHT)

    def _expects(self, run: Run) -> Table:
        rows = tuple((text, shown, "holds" if holds else "does not hold") for text, shown, holds in run.expects)
        return Table(("expected", "measured", ""), rows, frozenset({1}))

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "name": self.name, "policy": self.policy, "run": asdict(self.run) if self.run else None,
            "sizes": {"before": self.before.sizes.to_json() if self.before else None,
                      "after": self.after.sizes.to_json()},
            "layers": [{"label": row.label, "kind": row.kind, "before": asdict(row.before) if row.before else None,
                        "after": row.after.to_json() if row.after else None} for row in self.rows()],
            "quantization": self.quantization.to_json() if self.quantization else None,
        }

    def _repr_html_(self) -> str:
        tables = [self._totals(), self._table(), *([self._expects(self.run)] if self.run and self.run.expects else [])]
        quantized = Shown(self.quantization).html() if self.quantization is not None else ""
        notes = "".join(f"<li>{escape(clean(note))}</li>" for note in (self.run.notes if self.run else ()))
        return (f"<h4>{escape(clean(self.name))}{escape(self._trained())}</h4>{''.join(t.html() for t in tables)}"
                f"{quantized}" + (f"<ul>{notes}</ul>" if notes else ""))


def _cells(row: Row) -> tuple[str, ...]:
    new = row.after
    return (row.label, row.kind, _pair(row, lambda figures: count(figures.params)),
            _pair(row, lambda figures: macs(figures.macs)), _pair(row, lambda figures: size(figures.bytes)),
            sparsity(new) if new is not None else NO_FIGURE, new.shape if new is not None else "", row.what)


def _pair(row: Row, show: Callable[[Figures | Layer], str]) -> str:
    """`36,864 -> 25,344`, or one of both where they agree or there is only one."""
    texts = [show(figures) for figures in (row.before, row.after) if figures is not None]
    return texts[0] if len(set(texts)) == 1 else " -> ".join(texts)


def report(model: Model, before: Model | None = None, name: str | None = None) -> Report:
    """The report on `model`: a captured or loaded graph, or an artifact's folder. What was before it is `before`, else
    what its plan says. Raises ArtifactError for a damaged folder, PlanError for a plan in it that can't be read."""
    opened = open_model(model)
    title = name or (str(model) if opened is not model else name_of(opened))
    plan = plan_of(opened)
    dense = Dense.of_plan(plan) if plan is not None else None
    if before is not None:
        dense = Dense.of_model(open_model(before))
    return Report(title, Snapshot.of(opened), dense, run_of(opened), str(meta_of(opened).get("policy") or ""),
                  quantization_of(opened))
