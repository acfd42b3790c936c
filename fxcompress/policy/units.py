"""Units of numbers: what each measures and its size in base units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Measure = Literal["percent", "count", "bytes", "bits", "steps", "epochs", "samples", "seconds"]


@dataclass(frozen=True)
class Unit:
    """A unit: what it measures, how many base units it is, and what it is called in the language reference."""

    measure: Measure
    size: float
    doc: str


UNITS: Mapping[str, Unit] = {
    "%": Unit("percent", 0.01, "hundredths"),
    "k": Unit("count", 1e3, "thousands"),
    "M": Unit("count", 1e6, "millions"),
    "G": Unit("count", 1e9, "thousands of millions"),
    "B": Unit("bytes", 1, "bytes"),
    "kB": Unit("bytes", 1e3, "1000 bytes"),
    "MB": Unit("bytes", 1e6, "1000 kB"),
    "GB": Unit("bytes", 1e9, "1000 MB"),
    "KiB": Unit("bytes", 2**10, "1024 bytes"),
    "MiB": Unit("bytes", 2**20, "1024 KiB"),
    "GiB": Unit("bytes", 2**30, "1024 MiB"),
    "bits": Unit("bits", 1, "bits of a number"),
    "steps": Unit("steps", 1, "training steps"),
    "epochs": Unit("epochs", 1, "passes over the training set"),
    "samples": Unit("samples", 1, "inputs of calibration"),
    "us": Unit("seconds", 1e-6, "microseconds"),
    "ms": Unit("seconds", 1e-3, "milliseconds"),
    "s": Unit("seconds", 1, "seconds"),
}
ALIASES = {"bit": "bits", "step": "steps", "epoch": "epochs", "sample": "samples", "kiB": "KiB", "KB": "kB"}

#: what a number of each measure looks like, for messages
EXAMPLES: Mapping[Measure, str] = {
    "percent": "60%", "count": "1.5M", "bytes": "6 MiB", "bits": "4 bits", "steps": "100 steps", "epochs": "12 epochs",
    "samples": "256 samples", "seconds": "3 ms",
}


def canonical(unit: str) -> str:
    """The unit's one spelling: `step` is `steps`."""
    return ALIASES.get(unit, unit)


def to_base(value: float, unit: str) -> int | float:
    """`value` in base units: fractions, counts, bytes, bits, steps, seconds. Exact for texts of up to 15 digits."""
    size = UNITS[canonical(unit)].size
    if size < 1:
        return float(Decimal(repr(value)) * Decimal(repr(size)))  # 53.3 * 0.01 and 53.3 / 100 are not 0.533
    base = value * size
    return int(base) if isinstance(base, float) and base.is_integer() and abs(base) < 2**63 else base


def show_number(value: float) -> str:
    """A number as the language writes it: `8`, `0.5`, `0.0001`."""
    if isinstance(value, int) or float(value).is_integer():
        return str(int(value)) if abs(value) < 1e15 else f"{value:g}"
    return repr(float(value))


def show_percent(fraction: float) -> str:
    """0.6 as `60%`."""
    return f"{show_number(round(fraction * 100, 10))}%"
