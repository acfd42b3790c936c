"""Other systems that deploy PyTorch models on this CPU, each as its documents recommend: contestants of
`quantize_speed.py`. What each of them imports stays inside its function.

Activations have 7 bits everywhere (ONNX Runtime: weights), since 8 saturate without VNNI instructions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize_models import Job, cached

Run = Callable[[], Any]


# PyTorch


def inductor(job: Job) -> Run:
    import torch
    from torch._inductor import config

    config.freezing = True
    net, inputs = torch.compile(job.net), job.inputs
    return lambda: net(*inputs)


def torch_ao(engine: str) -> Callable[[Job], Run]:
    """Its graph mode on torch.fx, which is deprecated."""
    def prepare(job: Job) -> Run:
        import torch
        from torch.ao.quantization import get_default_qconfig_mapping  # noqa: TID251
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx  # noqa: TID251

        warnings.filterwarnings("ignore")
        torch.backends.quantized.engine = engine
        inputs = job.inputs
        observed = prepare_fx(job.net, get_default_qconfig_mapping(engine), inputs)
        for batch in job.calibration:
            observed(*batch)
        net = convert_fx(observed)
        return lambda: net(*inputs)

    return prepare


def pt2e(cpp: bool) -> Callable[[Job], Run]:
    """torchao's export mode, with the quantizer that is made for Inductor on x86."""
    def prepare(job: Job) -> Run:
        import torch
        from torch._inductor import config
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        config.freezing, config.cpp_wrapper = True, cpp
        inputs = job.inputs
        exported = torch.export.export(job.net, inputs, strict=True).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=True))
        observed = prepare_pt2e(exported, quantizer)
        for batch in job.calibration:
            observed(*batch)
        converted = convert_pt2e(observed)
        move_exported_model_to_eval(converted)
        net = torch.compile(converted)
        return lambda: net(*inputs)

    return prepare


# ONNX Runtime


def onnx_file(job: Job) -> Path:
    def make(path: Path) -> None:
        import torch

        torch.onnx.export(job.net, job.inputs, path, input_names=list(job.names), output_names=["y"], dynamo=True,
                          external_data=False, verbose=False)

    return cached(job.file("float.onnx", "onnxscript"), make)


def tidy_onnx_file(job: Job) -> Path:
    """The same with shapes inferred and float fusions done, as ONNX Runtime wants it before quantizing."""
    def make(path: Path) -> None:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        quant_pre_process(str(onnx_file(job)), str(path), skip_symbolic_shape=True)

    return cached(job.file("tidy.onnx", "onnxscript", "onnxruntime"), make)


class Reader:
    """Calibration data in the form that ONNX Runtime takes."""

    def __init__(self, job: Job) -> None:
        self._left: Iterator[dict[str, Any]] = (
            {name: each.numpy() for name, each in zip(job.names, batch, strict=True)} for batch in job.calibration)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def static_onnx_file(job: Job) -> Path:
    def make(path: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        # Of a transformer only what has weights: ranges that hold an attention mask's -3e38 make nonsense of the rest.
        products = {"op_types_to_quantize": ["MatMul", "Gemm", "Conv"], "extra_options": {"MatMulConstBOnly": True}}
        CalibrationDataReader.register(Reader)
        quantize_static(str(tidy_onnx_file(job)), str(path), Reader(job), quant_format=QuantFormat.QDQ,
                        per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8, **(products if job.transformer else {}))

    return cached(job.file("static.onnx", "onnxscript", "onnxruntime"), make)


def dynamic_onnx_file(job: Job) -> Path:
    def make(path: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(str(tidy_onnx_file(job)), str(path), per_channel=True, reduce_range=True,
                         weight_type=QuantType.QInt8)

    return cached(job.file("dynamic.onnx", "onnxscript", "onnxruntime"), make)


def onnx_runtime(file: Callable[[Job], Path]) -> Callable[[Job], Run]:
    def prepare(job: Job) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(file(job)), options, providers=["CPUExecutionProvider"])
        taken = {each.name for each in session.get_inputs()}
        inputs = {name: each.numpy() for name, each in zip(job.names, job.inputs, strict=True) if name in taken}
        return lambda: session.run(None, inputs)

    return prepare


# OpenVINO


def openvino(quantized: bool) -> Callable[[Job], Run]:
    def prepare(job: Job) -> Run:
        import openvino

        core = openvino.Core()
        file = openvino_file(job) if quantized else onnx_file(job)
        settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
        request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
        inputs = {name: each.numpy() for name, each in zip(job.names, job.inputs, strict=True)}
        return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    return prepare


def openvino_file(job: Job) -> Path:
    def make(path: Path) -> None:
        import nncf
        import openvino

        model = openvino.Core().read_model(onnx_file(job))
        data = nncf.Dataset([{name: each.numpy() for name, each in zip(job.names, batch, strict=True)}
                             for batch in job.calibration])
        kind = nncf.ModelType.TRANSFORMER if job.transformer else None
        done = nncf.quantize(model, data, subset_size=len(job.calibration), model_type=kind)
        openvino.save_model(done, path, compress_to_fp16=False)
        path.with_suffix(".bin").replace(path.with_name("static.bin"))  # it is looked for beside static.xml

    return cached(job.file("static.xml", "onnxscript", "openvino", "nncf"), make)


CONTESTANTS: Mapping[str, Callable[[Job], Run]] = {
    "inductor": inductor,
    "ao_x86": torch_ao("x86"), "ao_onednn": torch_ao("onednn"),
    "pt2e": pt2e(cpp=False), "pt2e_cpp": pt2e(cpp=True),
    "ort_fp32": onnx_runtime(onnx_file), "ort_int8": onnx_runtime(static_onnx_file),
    "ort_dynamic": onnx_runtime(dynamic_onnx_file),
    "ov_fp32": openvino(quantized=False), "ov_int8": openvino(quantized=True),
}
