"""CSV files and Markdown tables of the benchmarks."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a CSV written before; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Write all rows at once, so that a reader never sees half of them; lists become text, numbers are rounded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    with scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    scratch.replace(path)


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " | ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else value


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table. The first `words` columns are set to the left, the others, which hold numbers, to the right."""
    rule = ["---" if place < words else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A cell as a number, None where it is empty."""
    value = row.get(key)
    return None if value in (None, "") else float(value)  # type: ignore[arg-type]


def yes(row: Mapping[str, Any], key: str = "ok") -> bool:
    """A cell as a truth value."""
    return str(row.get(key)) == "True"


def median(values: Iterable[float | None], form: str = ".2f") -> str:
    """The median of those that are there."""
    present = [value for value in values if value is not None]
    return format(statistics.median(present), form) if present else "-"
