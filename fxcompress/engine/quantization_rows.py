"""What quantization did to a model, layer by layer: ranges, what is clipped, errors against float, bytes, times.

An error is told as a signal-to-quantization-noise ratio (SQNR), 10·log10(Σx² / Σ(x − q)²) in decibels, where x are the
numbers in float and q what stands in their place. It is measured when a model is finalized (`quantization.py`), kept as
plain data in the report of the artifact, and shown by `fxcompress.inspect.quantization`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

FLOAT = "float"  # the kernel of a layer that is left as it is


@dataclass(frozen=True)
class Error:
    """`signal` is Σx², `noise` Σ(x − q)²."""

    signal: float
    noise: float

    @property
    def sqnr(self) -> float:
        """In decibels: infinite where there is no noise, minus infinite where there is nothing else."""
        if not self.noise:
            return math.inf
        return 10 * (math.log10(self.signal) - math.log10(self.noise)) if self.signal else -math.inf


@dataclass(frozen=True)
class Rounding:
    """How a tensor is rounded, and what that does to it. `low` to `high` is the range that its integers reach (of a
    tensor of several scales the widest); `clipped` is the share of its numbers that lie outside, in [0, 1]."""

    bits: int
    signed: bool
    symmetric: bool
    granularity: str
    low: float
    high: float
    clipped: float
    error: Error


@dataclass(frozen=True)
class LayerRow:
    """One layer. `reads` is how the values are rounded that it computes with, and `weight` its weight, each measured
    by itself: rounded against the very same numbers in float. `gives` is what comes out of the layer, activation and
    rounding included, with all the rounding before it, against the model in float.

    `bytes` are those of weight, scales and bias, in float and now; `seconds` is the median time of the layer's kernel
    for one batch of example inputs, None where it can't be told apart; `why` says why this kernel, or why `float`.
    """

    layer: str
    kind: str
    kernel: str
    why: str
    bytes: tuple[int, int]
    seconds: float | None = None
    reads: Rounding | None = None
    weight: Rounding | None = None
    gives: Error | None = None

    @property
    def own(self) -> float:
        """The lower SQNR of the two that the layer's own rounding has."""
        return min((part.error.sqnr for part in (self.reads, self.weight) if part is not None), default=math.inf)


@dataclass(frozen=True)
class Histogram:
    """How often numbers of a layer's `what` (`reads` or `weight`) fall in each of evenly spaced bins from `low` to
    `high`, and the range that integers `reach`. A weight is counted in steps of its scales."""

    layer: str
    what: str
    low: float
    high: float
    reach: tuple[float, float]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Quantization:
    """Every layer that multiplies, in the order of the graph, measured on so many `samples`; the histograms of those
    whose own rounding has the lowest SQNR, the lowest first; the error of what the model gives. Times are those of a
    batch of so many samples, `seconds` that of the whole model, node by node."""

    samples: int
    batch: int
    seconds: float
    gives: Error
    rows: tuple[LayerRow, ...]
    histograms: tuple[Histogram, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    def explained(self, notes: Iterable[str]) -> Quantization:
        """With the reasons that passes gave in their notes, `LAYER stays in float: WHY`, for layers in float."""
        said = {layer: why for layer, found, why in (note.partition(" stays in float: ") for note in notes) if found}
        return replace(self, rows=tuple(replace(row, why=said.get(row.layer, row.why)) if row.kernel == FLOAT else row
                                        for row in self.rows))
