"""The table of a quantized model: for each layer how it is rounded, what that does to its numbers, size and time.

The figures were measured when the model was finalized (`engine/quantization.py`) and lie in the report of its
artifact: no data are needed to show them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from torch import fx

from ..backends.artifact_json import Cursor
from ..engine.quantization_rows import FLOAT, Error, Histogram, LayerRow, Quantization, Rounding
from ..graph.captured import Captured
from ..render import clean
from .rows import meta_of
from .text import NO_FIGURE, Table, size

HEADING = ("layer", "kind", "reads", "clipped", "SQNR", "weight", "clipped", "SQNR", "gives", "bytes", "time", "kernel",
           "why")
_RIGHT = frozenset({3, 4, 6, 7, 8, 9, 10})
LEGEND = ("SQNR in dB against float: of what a layer reads and of its weight, each by its own rounding alone; of what "
          "it gives, with all the rounding before it.")
T = TypeVar("T")
_LARGEST = 3.5e38  # a little more than float32 holds
_FEW = 3  # layers that are named as the worst


def quantization_of(model: Captured | fx.GraphModule) -> Quantization | None:
    """What was measured on `model` as it was finalized, None for one that wasn't quantized. Raises ArtifactError
    (FXC0604, FXC0608) for a report that doesn't hold that."""
    data = meta_of(model).get("report")
    fields = dict(Cursor(data, "report.json").pairs()) if data is not None else {}
    found = fields["quantization"].optional() if "quantization" in fields else None
    if found is None:
        return None
    parts = found.fields(("samples", "batch", "seconds", "gives", "rows", "histograms"))
    return Quantization(
        parts["samples"].integer(0), parts["batch"].integer(0), parts["seconds"].number(), _error(parts["gives"]),
        tuple(map(_row, parts["rows"].items())), tuple(map(_histogram, parts["histograms"].items(1000))))


def _error(cursor: Cursor) -> Error:
    parts = cursor.fields(("signal", "noise"))
    return Error(*(max(0.0, parts[name].number()) for name in ("signal", "noise")))


def _rounding(cursor: Cursor) -> Rounding:
    parts = cursor.fields(("bits", "signed", "symmetric", "granularity", "low", "high", "clipped", "error"))
    return Rounding(
        parts["bits"].integer(1, 64), parts["signed"].boolean(), parts["symmetric"].boolean(),
        parts["granularity"].text(100), parts["low"].number(), parts["high"].number(), parts["clipped"].number(),
        _error(parts["error"]))


def _pair(cursor: Cursor) -> tuple[Cursor, Cursor]:
    items = cursor.items(2)
    if len(items) != 2:
        cursor.wrong("a list of two")
    return items[0], items[1]


def _row(cursor: Cursor) -> LayerRow:
    parts = cursor.fields(("layer", "kind", "kernel", "why", "bytes", "seconds", "reads", "weight", "gives"))
    before, after = _pair(parts["bytes"])
    return LayerRow(
        parts["layer"].text(), parts["kind"].text(), parts["kernel"].text(), parts["why"].text(),
        (before.integer(0), after.integer(0)), _maybe(Cursor.number, parts["seconds"]),
        _maybe(_rounding, parts["reads"]), _maybe(_rounding, parts["weight"]), _maybe(_error, parts["gives"]))


def _maybe(read: Callable[[Cursor], T], cursor: Cursor) -> T | None:
    return None if cursor.value is None else read(cursor)


def _histogram(cursor: Cursor) -> Histogram:
    parts = cursor.fields(("layer", "what", "low", "high", "reach", "counts"))
    low, high = parts["low"].number(), parts["high"].number()
    first, last = (item.number() for item in _pair(parts["reach"]))
    if not -_LARGEST <= low < high <= _LARGEST or not -_LARGEST <= first <= last <= _LARGEST:
        cursor.wrong("a histogram over a range of float32")
    counts = tuple(item.integer(0) for item in parts["counts"].items(10_000))
    return Histogram(parts["layer"].text(), parts["what"].choice(("reads", "weight")), low, high, (first, last), counts)


@dataclass(frozen=True)
class Shown:
    """The figures as text and as HTML."""

    found: Quantization

    def text(self) -> str:
        """Plain text: in total, the layers, what the columns mean."""
        return "\n".join((*self.lines(), "")) + f"\n{self.table().text()}\n{LEGEND}\n"

    def html(self) -> str:
        """The same as HTML, everything escaped."""
        lines = "<br>".join(map(escape, self.lines()))
        return f"<h4>quantization</h4><p>{lines}</p>{self.table().html()}<p>{escape(LEGEND)}</p>"

    def lines(self) -> list[str]:
        """What holds for all layers."""
        found = self.found
        there = [row for row in found.rows if row.kernel != FLOAT]
        count = f"{len(there)} of {len(found.rows)} layers that multiply compute in integers"
        lines = [f"{count}; the result against float: {decibels(found.gives)} dB, on {_samples(found.samples)}"]
        uniform = [(name, schemes) for name, schemes in self._schemes() if len(schemes) == 1]
        if uniform:
            lines.append("; ".join(f"{name} in {schemes[0]}" for name, schemes in uniform))
        known = [row.seconds for row in found.rows if row.seconds is not None]
        if found.seconds > 0:
            lines.append(f"{duration(found.seconds)} for {_samples(found.batch)}, {sum(known) / found.seconds:.0%} of "
                         "it in these layers")
        worst = sorted((row for row in found.rows if row.own < math.inf), key=lambda row: row.own)[:_FEW]
        if worst:
            lines.append("lowest by their own rounding: "
                         + ", ".join(f"{row.layer} ({row.own:.1f} dB)" for row in worst))
        return [clean(line) for line in lines]

    def _schemes(self) -> list[tuple[str, list[str]]]:
        """How values and weights are rounded, each way once."""
        return [("values", _ways([row.reads for row in self.found.rows])),
                ("weights", _ways([row.weight for row in self.found.rows]))]

    def table(self) -> Table:
        """One row a layer. How numbers are rounded stands beside their range where it isn't the same in all layers."""
        (_, values), (_, weights) = self._schemes()
        cells = tuple(_cells(row, len(values) > 1, len(weights) > 1) for row in self.found.rows)
        return Table(HEADING, cells, _RIGHT)


def _ways(parts: Sequence[Rounding | None]) -> list[str]:
    return list(dict.fromkeys(scheme(part) for part in parts if part is not None))


def scheme(part: Rounding) -> str:
    """`quint7 affine per_tensor`."""
    sign, middle = "qint" if part.signed else "quint", "symmetric" if part.symmetric else "affine"
    return f"{sign}{part.bits} {middle} {part.granularity}"


def decibels(error: Error | None) -> str:
    """`31.4`; `exact` where nothing differs, a dash where nothing was measured."""
    if error is None:
        return NO_FIGURE
    return "exact" if not error.noise else f"{error.sqnr:.1f}"


def duration(seconds: float) -> str:
    """`1.23 ms`."""
    return f"{seconds * 1e6:.3g} µs" if seconds < 999.5e-6 else f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else \
        f"{seconds:.3g} s"


def share(part: float) -> str:
    """`0.12%`; `0` for nothing at all, `<0.01%` for hardly anything."""
    return "0" if not part else "<0.01%" if part < 1e-4 else f"{part:.2%}"


def _samples(count: int) -> str:
    return f"{count} sample{'s' * (count != 1)}"


def _cells(row: LayerRow, *schemes: bool) -> tuple[str, ...]:
    size_ = size(row.bytes[0]) if row.bytes[0] == row.bytes[1] else " -> ".join(map(size, row.bytes))
    parts = [cell for part, shown in zip((row.reads, row.weight), schemes, strict=True) for cell in _part(part, shown)]
    return (row.layer, row.kind, *parts, decibels(row.gives), size_,
            duration(row.seconds) if row.seconds is not None else NO_FIGURE, row.kernel, row.why)


def _part(part: Rounding | None, shown: bool) -> tuple[str, str, str]:
    """Range, clipped share and SQNR of one tensor."""
    if part is None:
        return NO_FIGURE, NO_FIGURE, NO_FIGURE
    reach = f"[{part.low:.4g}, {part.high:.4g}]"
    return f"{scheme(part)} {reach}" if shown else reach, share(part.clipped), decibels(part.error)
