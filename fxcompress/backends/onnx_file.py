"""ONNX files: a lowered GraphModule with QuantizeLinear and DequantizeLinear, by torch's exporter.

| the file says | |
|---|---|
| operators | those of ONNX's own domain, opset `OPSET` |
| inputs, outputs | by the names of the graph's placeholders and of what it gives; the dynamic batch is called `batch` |
| producer | fxcompress and its version; `metadata_props` names torch's version and the model |
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..diagnostics import Diagnostic, PlanError
from .libraries import need
from .qdq import in_floats
from .signature import Signature, flatten

OPSET = 20  # of ONNX's domain: what torch's exporter writes without converting
BATCH = "batch"
LARGE = 2**31 - 2**20  # bytes of weights, from which protobuf can't hold them in one file


def write_onnx(module: fx.GraphModule, signature: Signature, path: str | os.PathLike[str]) -> None:
    """Write `module`, lowered for the CPU or in floats, to `path`; weights of 2 GiB and more go into a file beside it.

    Raises PlanError: FXC0640 without the libraries, FXC0641 for a graph that ONNX can't express.
    """
    need("onnx", "onnxscript")
    import onnx

    program = _program(module, signature)
    model = program.model
    model.producer_name, model.producer_version = "fxcompress", _version()
    _name_batch(model)
    model.metadata_props.update({"torch": torch.__version__, "model": type(module).__name__})
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    program.save(os.fspath(path), external_data=size > LARGE)
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except onnx.checker.ValidationError as error:
        Path(path).unlink()
        raise _inexpressible(error) from error


def _program(module: fx.GraphModule, signature: Signature) -> Any:
    floats = in_floats(module)
    flatten(floats)
    with _silent():
        try:
            return torch.onnx.export(floats, tuple(signature.examples()), dynamo=True, verbose=False,
                                     opset_version=OPSET, input_names=list(signature.inputs),
                                     output_names=list(signature.outputs), dynamic_shapes=signature.dynamic_shapes())
        except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError, RuntimeError, ValueError) as error:
            raise _inexpressible(error) from error


def _name_batch(model: Any) -> None:
    """Call the one dimension that is dynamic `batch`; the exporter has a symbol for it."""
    symbols = {str(size) for value in model.graph.inputs for size in value.shape if not isinstance(size, int)}
    if len(symbols) == 1:
        symbol, = symbols
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        for value in values:
            if value.shape is not None:
                value.shape = type(value.shape)(  # a size that isn't known has no name: it would be that of others too
                    size if isinstance(size, int) or size.value is None else
                    re.sub(rf"\b{symbol}\b", BATCH, str(size.value)) for size in value.shape)


def _inexpressible(error: Exception) -> PlanError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    words = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return PlanError([Diagnostic("FXC0641", "this graph can't be written as ONNX", notes=tuple(words[:3]),
                                 help="export it as `pt2`, which holds every operator of torch; or rewrite that part "
                                      "of the model")])


def _version() -> str:
    try:
        return version("fxcompress")
    except PackageNotFoundError:  # run from a folder
        return "unknown"


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter warns of what isn't the caller's: its own deprecated calls, dimensions it keeps dynamic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
