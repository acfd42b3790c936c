"""OpenVINO's intermediate representation: an `.xml` with its `.bin`, converted from ONNX."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import fx

from ..diagnostics import Diagnostic, PlanError
from .libraries import need
from .onnx_file import write_onnx
from .signature import Signature


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
        model = openvino.convert_model(os.fspath(source))
        openvino.save_model(model, os.fspath(path), compress_to_fp16=False)
    except RuntimeError as error:
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise PlanError([Diagnostic("FXC0641", "OpenVINO can't convert this graph", notes=tuple(words[:3]),
                                    help="export it as `onnx`, and report the operator")]) from error
