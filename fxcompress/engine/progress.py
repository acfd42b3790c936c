"""How far a run over calibration data is: a bar on a terminal, or a function of the caller's that is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from ..graph.calibration import Watch

Progress = bool | Callable[[int, int | None], object]


def watcher(progress: Progress, what: str = "calibrating") -> Watch | None:
    """What lets batches through and tells of it: for True a bar called `what` on stderr, where that is a terminal; for
    a function a call (done, of how many, None where that isn't known) behind each batch; None for no telling."""
    if callable(progress):
        return partial(_told, progress)
    return partial(_bar, what) if progress and sys.stderr.isatty() else None


def _told(tell: Callable[[int, int | None], object], batches: Iterable[object]) -> Iterator[object]:
    total = _length(batches)
    for done, batch in enumerate(batches, 1):
        yield batch
        tell(done, total)


def _bar(what: str, batches: Iterable[object]) -> Iterator[object]:
    from rich.console import Console
    from rich.progress import track

    yield from track(batches, what, total=_length(batches), console=Console(file=sys.stderr), transient=True)


def _length(batches: Iterable[object]) -> int | None:
    """How many there are, None where they don't say (a `DataLoader` over a stream raises TypeError)."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
