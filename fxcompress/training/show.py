"""A bar on a terminal: where the training is, its loss terms, the sparsity, the numbers that move."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol


class Bar(Protocol):
    """What is told of the training."""

    def __call__(self, epoch: int, step: int, row: Mapping[str, Any]) -> None:
        """`step` of the epoch is done; `row` is what was measured last."""


@contextmanager
def bar(epochs: int, steps: int, *, shown: bool) -> Iterator[Bar]:
    """A bar on stderr where that is a terminal, and `shown`; else nothing."""
    if not (shown and sys.stderr.isatty()):
        yield lambda epoch, step, row: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TimeRemainingColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("train", total=epochs * steps, epoch=f"1/{epochs}", said="")

        def tell(epoch: int, step: int, row: Mapping[str, Any]) -> None:
            progress.update(task, completed=epoch * steps + step, epoch=f"{min(epoch + 1, epochs)}/{epochs}",
                            said=words(row))

        yield tell


def words(row: Mapping[str, Any]) -> str:
    """The numbers of a row in one line: loss, its terms, metrics, sparsity, temperatures and weights that move."""
    said = [f"loss {row['loss']:.4f}"] if row.get("loss") is not None else []
    said += [f"{name} {value:.4f}" for name, value in row.get("terms", {}).items()]
    if "validation" in row:
        said.append(f"validation: {', '.join(f'{name} {value:.4f}' for name, value in row['validation'].items())}")
    if row.get("sparsity"):
        said.append(f"sparsity {100 * row['sparsity']:.1f}%")
    said += [f"{name.partition(': ')[2]} {value:.3g}" for name, value in row.get("numbers", {}).items()
             if "sparsity" not in name and not ("temperature" in name and "temperatures" in row)]
    said += [f"T({name}) {value:.3g}" for name, value in row.get("temperatures", {}).items()]
    return "  ".join(said)
