"""OpenVINO's intermediate representation: an `.xml` with its `.bin`, converted from ONNX.

Zero points of weights, which are zeros, are left out on the way: torch's exporter lets all layers of a width share one
tensor of zeros, and where OpenVINO finds it at a second shape it takes those layers to be more than scaled, and
computes them in floats.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import fx

from ..diagnostics import Diagnostic, PlanError
from .libraries import need
from .onnx_file import LARGE, write_onnx
from .signature import Signature

_ZERO_POINT = 2  # its place among the inputs of DequantizeLinear


def write_openvino(module: fx.GraphModule, signature: Signature, path: str | os.PathLike[str]) -> None:
    """Write `module` to `path` (`.xml`) and its weights beside it (`.bin`), in full precision where they are floats.

    Raises PlanError: FXC0640 without the libraries, FXC0641 for a graph that ONNX or OpenVINO can't express.
    """
    need("onnx", "onnxscript", "openvino")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        write_onnx(module, signature, source)
        convert(source, path)


def convert(source: Path, path: str | os.PathLike[str]) -> None:
    """Convert an ONNX file. Raises PlanError (FXC0641)."""
    import openvino

    try:
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            model = openvino.convert_model(os.fspath(_without_zeros(source, Path(folder))))
            openvino.save_model(model, os.fspath(path), compress_to_fp16=False)
    except RuntimeError as error:
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise PlanError([Diagnostic("FXC0641", "OpenVINO can't convert this graph", notes=tuple(words[:3]),
                                    help="export it as `onnx`, and report the operator")]) from error


def _without_zeros(source: Path, folder: Path) -> Path:
    """The ONNX file with no zero points that are zeros all through: itself, or another one in `folder`."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(os.fspath(source))
    zeros = {value.name for value in model.graph.initializer
             if value.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT32) and len(value.dims) == 1
             and not numpy_helper.to_array(value).any()}
    held = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and len(node.input) > _ZERO_POINT
            and node.input[_ZERO_POINT] in zeros]
    if not held:
        return source
    for node in held:
        del node.input[_ZERO_POINT:]
    made = folder / source.name
    size = sum(len(value.raw_data) for value in model.graph.initializer)
    onnx.save(model, os.fspath(made), save_as_external_data=size > LARGE)
    return made
