"""What was measured: JSON lines and CSV always, TensorBoard where it is installed.

`metrics.jsonl` has a line every few steps (`"kind": "step"`) and one an epoch (`"kind": "epoch"`); `metrics.csv` has
the epochs. A run that is resumed goes on behind the checkpoint: what was written after it is cut off, and comes again.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from .checkpoint import write_bytes

Row = Mapping[str, Any]


class Writer(Protocol):
    """The part of TensorBoard's writer that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """One number."""

    def close(self) -> Any:
        """Write what is left."""


class Log:
    """The files of one run, in `folder`; of the main process alone."""

    def __init__(self, folder: Path, size: int | None = None, step: int = 0) -> None:
        """`size` is what a checkpoint says of `metrics.jsonl` (`None`: begin anew), `step` the step it is of."""
        self.path, self.table = folder / "metrics.jsonl", folder / "metrics.csv"
        self.file = open(self.path, "ab" if size is not None else "wb")  # noqa: SIM115 (open as long as the run is)
        if size is not None:
            self.file.truncate(min(size, self.path.stat().st_size))
            self.file.seek(0, io.SEEK_END)
        self.board = _board(folder / "tensorboard", step if size is not None else None)

    def step(self, row: Row) -> None:
        """A line of a step."""
        self._line({"kind": "step", **row})
        self._chart(row, "train")

    def epoch(self, row: Row, history: Iterable[Row]) -> None:
        """A line of an epoch; `history` are all epochs, it included."""
        self._line({"kind": "epoch", **row})
        self._chart(row, "epoch")
        rows = list(history)
        columns = list(dict.fromkeys(name for each in rows for name in flat(each)))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat(each) for each in rows)
        write_bytes(self.table, lambda file: file.write(text.getvalue().encode()))

    def _line(self, row: Row) -> None:
        self.file.write(json.dumps(finite(row)).encode() + b"\n")
        self.file.flush()

    def _chart(self, row: Row, part: str) -> None:
        if self.board is not None:
            for name, value in flat(row).items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self.board.add_scalar(f"{part}/{name}", float(value), int(row["step"]))

    def size(self) -> int:
        """Bytes of `metrics.jsonl`, which are on the disk then."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Nothing more comes."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def flat(row: Row) -> dict[str, Any]:
    """`{"terms": {"kl": 1}}` as `{"terms.kl": 1}`."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        found.update({f"{name}.{key}": inner for key, inner in flat(value).items()} if isinstance(value, Mapping)
                     else {name: value})
    return found


def finite(value: Any) -> Any:
    """Plain data as JSON can hold it: None for what is no finite number."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(folder: Path, step: int | None) -> Writer | None:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer: Writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)
    return writer
