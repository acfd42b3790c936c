"""`target = auto`: one model by every engine that is here, measured side by side, and the fastest deployed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..diagnostics import FxcError
from ..graph.captured import Example
from ..graph.interpret import evaluating
from ..graph.timing import latencies
from ..graph.trace_errors import RAISED_BY_MODELS
from .auto_saved import read, write
from .compiled import Frozen
from .libraries import need
from .onnx_file import write_onnx
from .openvino_file import convert
from .runtimes import RUNTIMES
from .signature import Signature

SLOW = 3.0  # times the fastest: how slow an engine may be at first to be timed further
FAILURES = (FxcError, OSError, ImportError, *RAISED_BY_MODELS)  # what becomes a row's reason


@dataclass(frozen=True)
class Row:
    """One contender: `seconds` is the median of a forward pass, None where it wasn't timed; `why` says why it wasn't
    chosen where that isn't its time."""

    engine: str
    precision: str
    seconds: float | None = None
    why: str = ""
    chosen: bool = False

    @property
    def name(self) -> str:
        """`openvino int8`."""
        return f"{self.engine} {self.precision}"


@dataclass(frozen=True)
class Table:
    """What was measured, in the order of the contenders, with how many threads."""

    rows: tuple[Row, ...]
    threads: int

    @property
    def chosen(self) -> Row:
        """The row that was chosen."""
        return next(row for row in self.rows if row.chosen)

    def show(self) -> str:
        """One line a contender: its time, how many times as fast as the slowest it is, and a word on it."""
        slowest = max((row.seconds for row in self.rows if row.seconds is not None), default=0.0)
        lines = [f"{'engine':16} {'':5} {'ms':>9}  of the slowest"]
        for row in self.rows:
            time = f"{1e3 * row.seconds:9.3f}  {slowest / row.seconds:.2f}x" if row.seconds else f"{'-':>9}"
            words = "chosen" if row.chosen else row.why
            lines.append(f"{row.engine:16} {row.precision:5} {time}{'  ' if words else ''}{words}")
        return "\n".join([*lines, f"{self.threads} thread{'s' * (self.threads != 1)}; medians of interleaved rounds"])

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"threads": self.threads, "rows": [asdict(row) for row in self.rows]}

    @staticmethod
    def of(data: Mapping[str, Any]) -> Table:
        """From what `to_json` gave."""
        return Table(tuple(Row(**row) for row in data["rows"]), data["threads"])


class Deployed(nn.Module):
    """A model with the engine that runs it; called as the model is, in evaluation mode and without gradients.

    * `engine`: `eager`, `compiled`, `onnxruntime`, `openvino`, or `openvino_kernels`: OpenVINO without the code that it
      generates for chains of operators; `precision`: `int8` or `fp32`
    * `module`: the GraphModule, where torch runs it; None for the others
    * `table`: what was measured, None if nothing was
    """

    def __init__(self, engine: str, precision: str, module: fx.GraphModule | None = None,
                 folder: str | os.PathLike[str] | None = None, signature: Signature | None = None) -> None:
        """For an engine of torch's a `module`, for another one the `folder` that holds its file. Raises PlanError
        (FXC0640) where the engine isn't installed, and (FXC0646) where it refuses the file."""
        super().__init__()
        self.engine, self.precision, self.module = engine, precision, module
        self.signature, self.folder = signature, folder
        self.table: Table | None = None
        self._keeps: Any = None
        self._call: Callable[..., Any]
        if module is not None:
            self._call = _COMPILE[engine](module)
        else:
            assert folder is not None and signature is not None
            run = RUNTIMES[engine](Path(folder) / FILE_OF[engine])
            self._call = lambda *args, **kwargs: signature.restore(run(signature.ordered(args, kwargs)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        with torch.no_grad():
            return self._call(*args, **kwargs)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write it to a new folder, for `Deployed.load`. Nothing of it is pickled. Raises ArtifactError (FXC0610,
        FXC0612)."""
        about = {"engine": self.engine, "precision": self.precision,
                 "table": self.table.to_json() if self.table is not None else None}
        write(Path(directory), about, self.module, self.signature, self.folder)

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> Deployed:
        """What `save` wrote to `directory`. Raises ArtifactError for a folder that is damaged or no deployment (FXC0645
        and those of `fxcompress.load`), PlanError (FXC0640, FXC0646) where the engine isn't here."""
        about, module, signature = read(Path(directory), tuple(_COMPILE), FILE_OF)
        made = Deployed(about["engine"], about["precision"], module, directory, signature)
        made.table = Table.of(about["table"]) if about["table"] is not None else None
        return made.eval()

    def extra_repr(self) -> str:
        """The engine."""
        return f"{self.engine} {self.precision}"


def _eager(module: fx.GraphModule) -> Callable[..., Any]:
    return module.__call__  # not the module: `Deployed` has it once already


def _compiled(module: fx.GraphModule) -> Callable[..., Any]:
    return Frozen(module)


_COMPILE: Mapping[str, Callable[[fx.GraphModule], Callable[..., Any]]] = {"eager": _eager, "compiled": _compiled}
FILE_OF = {"onnxruntime": "model.onnx", "openvino": "model.xml", "openvino_kernels": "model.xml"}
LIBRARY_OF = {"onnxruntime": "onnxruntime", "openvino": "openvino", "openvino_kernels": "openvino"}
ENGINES = (*_COMPILE, *FILE_OF)


@dataclass
class Contender:
    """One engine with one precision: deployed, or the reason why it isn't."""

    engine: str
    precision: str
    deployed: Deployed | None = None
    why: str = ""


def contenders(module: fx.GraphModule, precision: str, example: Example) -> list[Contender]:
    """`module` by every engine, each run once on `example`: what can't be built or run has a reason instead."""
    folder = tempfile.TemporaryDirectory(prefix="fxcompress-")
    signature: Signature | None = None
    found = []
    for engine in ENGINES:
        contender = Contender(engine, precision)
        found.append(contender)
        try:
            if engine in FILE_OF:
                signature = signature or Signature.of(module)
                _file(engine, module, signature, Path(folder.name))
                made = Deployed(engine, precision, None, folder.name, signature)
                made._keeps = folder  # goes with the last that reads from it
            else:
                made = Deployed(engine, precision, module)
            made.eval()(*example.args, **example.kwargs)
            contender.deployed = made
        except FAILURES as error:
            contender.why = reason_of(error)
    return found


def _file(engine: str, module: fx.GraphModule, signature: Signature, folder: Path) -> None:
    need(LIBRARY_OF[engine])
    source, file = folder / FILE_OF["onnxruntime"], folder / FILE_OF[engine]
    if not source.exists():
        write_onnx(module, signature, source)
    if not file.exists():
        convert(source, file)


def reason_of(error: BaseException) -> str:
    """An error on one line."""
    if isinstance(error, FxcError):
        return "; ".join(" ".join([item.message, *(f"({note})" for note in item.notes[:1])])
                         for item in error.diagnostics)
    words = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {words[0]}"[:200]


def timed(deployed: Sequence[Deployed], example: Example) -> list[float]:
    """The median seconds of a forward pass of each, measured in turns. What is more than `SLOW` times as slow as the
    fastest in a first round isn't timed further."""
    first = [_once(one, example) for one in deployed]
    close = [one for one, seconds in zip(deployed, first, strict=True) if seconds <= SLOW * min(first)]
    medians = dict(zip(map(id, close), latencies(close, example), strict=True))
    return [medians.get(id(one), seconds) for one, seconds in zip(deployed, first, strict=True)]


def _once(one: Deployed, example: Example) -> float:
    """The lesser of two passes."""
    took = []
    with evaluating(one):
        for _ in range(2):
            start = perf_counter()
            one(*example.args, **example.kwargs)
            took.append(perf_counter() - start)
    return min(took)


def tensors_by_name(module: fx.GraphModule, values: Sequence[Any]) -> Example:
    """A call of `module` with the tensors among `values`, which are those of its placeholders."""
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    return Example((), {name: value for name, value in zip(names, values, strict=True) if isinstance(value, Tensor)})
