"""Running files: each runtime as a function from tensors to tensors, with torch's number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .libraries import need

Run = Callable[[Sequence[Tensor]], list[Tensor]]
_QUIET = 3  # ONNX Runtime's level of errors: its warnings speak of what its own optimizer left over


def onnxruntime(path: str | os.PathLike[str]) -> Run:
    """Run an ONNX file by ONNX Runtime on the CPU. Raises PlanError (FXC0640) without it."""
    need("onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = _QUIET
    session = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        found = session.run(None, dict(zip(names, map(_array, inputs), strict=True)))
        return [torch.from_numpy(array) for array in found]

    return run


def openvino(path: str | os.PathLike[str]) -> Run:
    """Run an OpenVINO model (or an ONNX file) on the CPU, in float32 where it isn't in integers. Raises PlanError
    (FXC0640) without it."""
    need("openvino")
    from openvino import Core

    core = Core()
    compiled = core.compile_model(core.read_model(os.fspath(path)), "CPU", {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    count = len(compiled.outputs)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        request.infer(dict(enumerate(map(_array, inputs))), share_inputs=True)
        return [torch.from_numpy(np.array(request.get_output_tensor(place).data)) for place in range(count)]

    return run


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


RUNTIMES: Mapping[str, Callable[[str | os.PathLike[str]], Run]] = {"onnxruntime": onnxruntime, "openvino": openvino}
