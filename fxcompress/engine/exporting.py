"""`export` of a result: finalized for the CPU, then written as a file of another format."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor, fx

from ..backends.export import Exported, FormatName
from ..backends.export import export as export_module
from ..graph.comparing import inputs_of
from .result import Result


def export(source: Result | fx.GraphModule, path: str | os.PathLike[str], format: FormatName | None = None,
           example_inputs: Sequence[Tensor] | None = None) -> Exported:
    """Write a result, or a GraphModule that `finalize` or `load` gave, to `path` as `onnx`, `openvino` or `pt2`: see
    `fxcompress.backends.export.export`. A result is finalized for the CPU first, and held against the file on its
    example inputs. Raises what both do."""
    if isinstance(source, Result):
        if example_inputs is None:
            example_inputs = [value for value in inputs_of(source.captured) if isinstance(value, Tensor)]
        source = source.finalize(target="cpu")
    return export_module(source, path, format, example_inputs)
