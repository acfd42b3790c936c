"""Each layer of a file, and each kernel, by itself on the integers of the simulation: within one step of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from test_export import Net, deployed, noise

import fxcompress
from fxcompress.graph.ops import kind_of
from fxcompress.nn import IntConv2d


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


def test_every_layer_is_within_a_step(tmp_path: Path) -> None:
    from quantize_layers import file_apart, module_apart, rounded

    inputs = [noise(4, 3, 12, 12)]
    result, module = deployed(Net(), inputs[0])
    known = rounded(result.module.eval(), inputs)
    count = sum(kind_of(node) == "quantizer" and node.args[0].op != "get_attr" for node in result.module.graph.nodes)
    path = fxcompress.export(module, tmp_path / "net.onnx").path
    found = [module_apart(module, known, inputs), *(
        file_apart(runtime, path, known, inputs) for runtime in ("onnxruntime", "openvino"))]
    assert [each.cuts for each in found] == [count] * 3, "every rounding of a value is looked at"
    assert all(each.most_apart <= 1 and each.share < 0.01 for each in found)


def test_a_layer_that_computes_something_else_is_seen(tmp_path: Path) -> None:
    from quantize_layers import file_apart, module_apart, rounded

    inputs = [noise(4, 3, 12, 12)]
    result, module = deployed(Net(), inputs[0])
    known = rounded(result.module.eval(), inputs)
    path = fxcompress.export(module, tmp_path / "net.onnx").path
    model = onnx.load(path)
    weight = next(value for value in model.graph.initializer if value.data_type == onnx.TensorProto.INT8
                  and len(value.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)
    layer = next(part for part in module.modules() if isinstance(part, IntConv2d))
    layer.fill(-layer.weight, layer.weight_scale, layer.bias)
    assert file_apart("onnxruntime", path, known, inputs).most_apart > 10
    assert module_apart(module, known, inputs).most_apart > 10


def test_a_simulation_in_float64_keeps_its_grids() -> None:
    from quantize_layers import InDouble

    x = noise(4, 3, 12, 12)
    result, _ = deployed(Net(), x)
    simulation = result.module.eval()
    with torch.no_grad():
        expected, found = simulation(x), InDouble(simulation).run(x.double())
    assert found.dtype == torch.float64
    assert float((found - expected).norm() / expected.norm()) < 0.02
