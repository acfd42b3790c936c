"""Running files: each runtime as a function from tensors to tensors, with torch's number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..diagnostics import Diagnostic, PlanError
from .libraries import need

Run = Callable[[Sequence[Tensor]], list[Tensor]]
_SHAPES = 8  # that a model is kept compiled for
_FITTING = "give tensors of shapes that the model takes"
_QUIET = 3  # ONNX Runtime's level of errors: its warnings speak of what its own optimizer left over


def onnxruntime(path: str | os.PathLike[str]) -> Run:
    """Run an ONNX file by ONNX Runtime on the CPU. Raises PlanError: FXC0640 without it, FXC0646 for a file that it
    can't run, or not with the tensors that it is called with."""
    need("onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = _QUIET
    errors = _errors_of(ort.capi.onnxruntime_pybind11_state)
    try:
        session = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except errors as error:
        raise _refused("ONNX Runtime", error) from error
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        try:
            found = session.run(None, dict(zip(names, map(_array, inputs), strict=True)))
        except errors as error:
            raise _refused("ONNX Runtime", error, _FITTING) from error
        return [torch.from_numpy(array) for array in found]

    return run


def openvino(path: str | os.PathLike[str], generates: bool = True) -> Run:
    """Run an OpenVINO model (or an ONNX file) on the CPU, in float32 where it isn't in integers; compiled at the first
    call for each shape of the inputs, which the last `_SHAPES` are kept of. It `generates` code for chains of
    operators, or keeps to its kernels, which can then take additions in. Raises PlanError as `onnxruntime` does."""
    need("openvino")
    from openvino import Core

    core = Core()
    settings = {} if generates else {"SNIPPETS_MODE": "DISABLE"}
    try:
        model = core.read_model(os.fspath(path))
    except RuntimeError as error:
        raise _refused("OpenVINO", error) from error

    @lru_cache(_SHAPES)
    def ready(shapes: tuple[torch.Size, ...], threads: int) -> Run:
        fixed = model.clone()
        try:
            fixed.reshape(dict(enumerate(map(list, shapes))))
        except RuntimeError as error:
            raise _refused("OpenVINO", error, _FITTING) from error
        try:
            return _request(core.compile_model(fixed, "CPU", {
                **settings, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}))
        except RuntimeError as error:
            raise _refused("OpenVINO", error) from error

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return ready(tuple([tensor.shape for tensor in inputs]), torch.get_num_threads())(inputs)

    return run


def _request(compiled: Any) -> Run:
    """Runs a model that OpenVINO compiled, one call after another: a request holds what it reads and gives. Tensors are
    set one by one, which takes half as long as a dictionary of them."""
    from openvino import Tensor as Shared

    request, lock = compiled.create_infer_request(), Lock()
    kinds = [port.get_element_type().to_dtype() for port in compiled.inputs]
    places = range(len(compiled.outputs))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = [array if array.dtype == kind else array.astype(kind)
                  for array, kind in zip(map(_array, inputs), kinds, strict=True)]
        with lock:
            for place, array in enumerate(arrays):
                request.set_input_tensor(place, Shared(array, shared_memory=True))
            try:
                request.infer(share_outputs=True)
            except RuntimeError as error:
                raise _refused("OpenVINO", error, _FITTING) from error
            return [torch.from_numpy(request.get_output_tensor(place).data.copy()) for place in places]

    return run


def _errors_of(library: Any) -> tuple[type[Exception], ...]:
    """The exceptions that a C library defines; they have no common base."""
    return tuple(value for value in vars(library).values() if isinstance(value, type) and issubclass(value, Exception))


def _refused(name: str, error: Exception,
             way_out: str = "take the file from its source again, or export it anew") -> PlanError:
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    return PlanError([Diagnostic("FXC0646", f"{name} can't run this file", notes=tuple(words[:3]), help=way_out)])


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


RUNTIMES: Mapping[str, Callable[[str | os.PathLike[str]], Run]] = {
    "onnxruntime": onnxruntime, "openvino": openvino, "openvino_kernels": partial(openvino, generates=False)}
