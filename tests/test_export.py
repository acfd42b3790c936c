"""`export`: files of other formats, run by their own runtimes, against the module and exact integer arithmetic."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import commands
from fxcompress.backends import libraries
from fxcompress.backends.export import Exported
from fxcompress.backends.qdq import Conv2d, in_floats
from fxcompress.backends.runtimes import RUNTIMES
from fxcompress.diagnostics import PlanError
from fxcompress.graph.ops import kind_of
from fxcompress.nn import IntConv2d, IntLinear
from fxcompress.nn.integer import After, Grid

POLICY = 'use "std/quant.fxc" { int8 }\npolicy small { quantize conv2d | linear as int8 { } }'
FLOAT = "policy none { }"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deployed(model: nn.Module, x: Tensor, policy: str = POLICY) -> tuple[fxcompress.Result, Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()
        model(x)  # statistics for the norms
    result = fxcompress.compile(policy, model.eval(), x, calibration=[x])
    return result, result.finalize(target="cpu")


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """By ONNX Runtime as it comes, with all its optimizations."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return [torch.from_numpy(found) for found in session.run(None, {
        name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})]


def in_steps(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in steps of the 7 bits that the range of `expected` has."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()) * 127)


class Net(nn.Module):
    """What integers go through: a convolution with each activation, an addition, a depthwise one, a maximum, a
    concatenation, a shuffle and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.third = nn.Conv2d(16, 16, 1)
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 3, 2, 1)
        x = F.relu(x + self.second(x))
        x = torch.cat([x, F.relu6(self.deep(x))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = F.hardswish(self.third(x))
        return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1))


@dataclass(frozen=True)
class Case:
    result: fxcompress.Result
    module: Any
    x: Tensor
    exported: Exported


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Case:
    x = noise(4, 3, 16, 16)
    result, module = deployed(Net(), x)
    return Case(result, module, x, fxcompress.export(module, tmp_path_factory.mktemp("net") / "net.onnx"))


def test_onnx_computes_what_the_module_does(net: Case) -> None:
    exported = net.exported
    assert exported.format == "onnx" and exported.gap is not None and exported.gap < 0.02 and not exported.notes
    with torch.no_grad():
        found, = run(exported.path, net.x)
        assert in_steps(found, net.result.module.eval()(net.x)) < 1, "the simulation"
        assert in_steps(found, net.module(net.x)) < 1, "the kernels"
        more = noise(7, 3, 16, 16, seed=2)
        assert in_steps(run(exported.path, more)[0], net.module(more)) < 1, "another batch size"


def test_onnx_holds_integers_and_says_what_it_is(net: Case) -> None:
    model = onnx.load(net.exported.path)
    onnx.checker.check_model(model, full_check=True)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kernels = {name: part for name, part in net.module.named_modules() if isinstance(part, IntConv2d | IntLinear)}
    assert len(kernels) == 5
    for name, kernel in kernels.items():
        assert held[f"{name}.weight.integers"].dtype == np.int8
        assert np.array_equal(held[f"{name}.weight.integers"], kernel.weight.numpy())
        assert held[f"{name}.bias.integers"].dtype == np.int32
    assert [entry.version for entry in model.opset_import if not entry.domain] == [20]
    assert model.producer_name == "fxcompress" and {"torch", "model"} <= {entry.key for entry in model.metadata_props}
    sizes = [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
             for value in (*model.graph.input, *model.graph.output)]
    assert sizes == [["batch", 3, 16, 16], ["batch", 10]]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "output"]


ZOO: dict[str, Any] = {
    "resnet": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 10),
    "mobilenet": lambda: torchvision.models.MobileNetV2(10, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2]]),
    "shufflenet": lambda: torchvision.models.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 128], 10),
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = 64 if name == "resnet" else 32
    model, x = ZOO[name](), noise(4, 3, size, size)
    for block in model.modules():
        if isinstance(block, torchvision.models.resnet.BasicBlock):
            nn.init.constant_(block.bn2.weight, 0.1)  # else rounding one number otherwise changes them all
    if name == "vit":
        nn.init.normal_(model.heads.head.weight)  # zeros, as torchvision makes it
    result, module = deployed(model, x)
    path = fxcompress.export(module, tmp_path / "model.onnx").path
    with torch.no_grad():
        assert in_steps(run(path, x)[0], module(x)) < 1
        assert in_steps(run(path, x)[0], result.module.eval()(x)) < 1


def test_extremes_equal_exact_arithmetic(tmp_path: Path) -> None:
    """All weights and inputs at their ends: where products saturate 16 bits the sum would come out too small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 8, 3, bias=False))
    weight = torch.where(torch.rand(8, 64, 3, 3) < 0.9, 1.0, -1.0)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    x = torch.where(noise(2, 64, 8, 8) < 1.5, 127.0, 0.0)
    policy = "policy p { quantize conv2d { bits = 7 bits, observer = minmax } }"
    _, module = deployed(model, x, policy)
    kernel = module.get_submodule("0")
    grid = kernel.reads
    path = fxcompress.export(module, tmp_path / "conv.onnx").path
    q = torch.round(x.double() / grid.scale).add(grid.zero_point).clamp(grid.low, grid.high)
    exact = F.conv2d(q - grid.zero_point, kernel.weight.double()) * (kernel.weight_scale.double()[:, None, None]
                                                                    * grid.scale)
    assert float(exact.abs().max()) > 5e4
    assert torch.allclose(run(path, x)[0].double(), exact, rtol=1e-6)


def test_values_beyond_the_range_are_clipped(tmp_path: Path) -> None:
    """7 bits end at 127, where QuantizeLinear goes up to 255."""
    x = noise(8, 4)
    result, module = deployed(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), x,
                              "policy p { quantize linear { bits = 7 bits } }")
    path = fxcompress.export(module, tmp_path / "net.onnx").path
    with torch.no_grad():
        expected = result.module.eval()(50 * x)
        assert in_steps(run(path, 50 * x)[0], expected) < 1
    assert in_steps(run(path, x)[0], expected) > 1, "the range matters"


def test_a_bias_too_large_for_its_step(tmp_path: Path) -> None:
    """A channel whose weights are next to nothing, under a bias: in int32 the bias would overflow."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = 0.0, 1e-9
        model[0].bias[:2] = torch.tensor([3.0, -5.0])
    _, module = deployed(model, x)
    path = fxcompress.export(module, tmp_path / "net.onnx").path
    with torch.no_grad():
        assert in_steps(run(path, x)[0], module(x)) < 1


def test_a_bias_that_leaves_no_room_for_its_products(tmp_path: Path) -> None:
    """In int32 the sum of both would overflow, and what a ReLU makes zero would be the greatest number."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    x = noise(2, 3, 8, 8).abs()
    with torch.no_grad():
        reads = float(x.max()) / 255
        for channel, part in enumerate(torch.linspace(0.9, 4, 12), 4):  # of the greatest bias that int32 holds
            model[0].bias[channel] = -5.0
            model[0].weight[channel] = -127 * 5.0 / (reads * float(part) * (2**31 - 1))
    _, module = deployed(model, x)
    path = fxcompress.export(module, tmp_path / "net.onnx").path
    with torch.no_grad():
        assert in_steps(run(path, x)[0], module(x)) < 1


def test_sizes_without_a_name_keep_none(tmp_path: Path) -> None:
    model, inputs = nn.Transformer(8, 2, 1, 1, 8, batch_first=True).eval(), (noise(2, 6, 8), noise(2, 4, 8))
    module = fxcompress.compile(FLOAT, model, inputs).finalize(target="cpu")
    path = fxcompress.export(module, tmp_path / "two.onnx", example_inputs=inputs).path
    with torch.no_grad():
        assert torch.allclose(run(path, *inputs)[0], model(*inputs), atol=1e-5)
    graph = onnx.load(path).graph
    named = {dim.dim_param for value in (*graph.input, *graph.value_info, *graph.output)
             for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    assert "batch" in named and not [name for name in named if "None" in name]


def test_a_file_that_does_not_take_the_tensors_is_a_diagnostic(tmp_path: Path) -> None:
    module = fxcompress.compile(FLOAT, nn.Linear(4, 2).eval(), noise(3, 4)).finalize(target="cpu")
    for runtime, name in (("onnxruntime", "net.onnx"), ("openvino", "net.xml")):
        call = RUNTIMES[runtime](fxcompress.export(module, tmp_path / name).path)
        with pytest.raises(PlanError) as error:
            call([noise(3, 5)])
        assert error.value.diagnostics[0].code == "FXC0646"


class Nest(nn.Module):
    """Takes two inputs, one by keyword; gives a dict with a tuple, the same tensor twice and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, weights: Tensor) -> dict[str, Any]:
        found = self.layer(self.table(tokens) * weights)
        return {"found": (found, found.sum(1)), "again": found, "none": None}


def test_inputs_and_results_by_name(tmp_path: Path) -> None:
    example = {"tokens": torch.tensor([[0, 1, 4], [2, 2, 3]]), "weights": noise(2, 3, 1)}
    module = fxcompress.compile(FLOAT, Nest().eval(), example).finalize(target="cpu")
    path = fxcompress.export(module, tmp_path / "nest.onnx").path
    first, total = run(path, *example.values())
    with torch.no_grad():
        expected = module(**example)
    assert torch.allclose(first, expected["found"][0], atol=1e-6)
    assert torch.allclose(total, expected["found"][1], atol=1e-6)


def test_a_result_an_artifact_and_the_command_write_the_same(
        net: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fxcompress.save(net.module, tmp_path / "artifact")
    fxcompress.export(net.result, tmp_path / "result.onnx")
    assert commands.export(tmp_path / "artifact", tmp_path / "artifact.onnx") == 0
    assert "onnx in" in capsys.readouterr().out
    expected, = run(net.exported.path, net.x)
    for name in ("result", "artifact"):
        assert torch.equal(run(tmp_path / f"{name}.onnx", net.x)[0], expected)


def test_openvino(net: Case, tmp_path: Path) -> None:
    exported = fxcompress.export(net.module, tmp_path / "net.xml")
    assert exported.format == "openvino" and sorted(file.name for file in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(exported.path), "CPU")
    with torch.no_grad():
        for batch in (net.x, noise(3, 3, 16, 16)):
            assert in_steps(torch.from_numpy(compiled(batch.numpy())[0]), net.module(batch)) < 1


class OneWidth(nn.Module):
    """Rows and filters of the same number of outputs, whose zero points are zeros of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first, self.second = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(self.patches(x).flatten(2).transpose(1, 2))))


def test_openvino_multiplies_integers(tmp_path: Path) -> None:
    """By what its own runtime graph says of the precision that each product was given."""
    x = noise(2, 3, 16, 16)
    _, module = deployed(OneWidth(), x, "policy p { quantize conv2d | linear { } }")
    path = fxcompress.export(module, tmp_path / "net.xml").path
    core = openvino.Core()
    ran = core.compile_model(core.read_model(path), "CPU").get_runtime_model()
    info = [node.get_rt_info() for node in ran.get_ops()]
    kernels = [each["primitiveType"].astype(str) for each in info
               if each["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")]
    assert len(kernels) == 3 and all(kernel.lower().endswith(("i8", "u8")) for kernel in kernels), kernels


class Heads(nn.Module):
    """The end of attention: floats of heads are put side by side, and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.softmax(-1).transpose(1, 2).reshape(x.shape[0], x.shape[2], 12))


def test_floats_are_moved_before_they_are_rounded(tmp_path: Path) -> None:
    x = noise(2, 3, 6, 4)
    result, module = deployed(Heads(), x, "policy p { quantize linear { } }")
    kinds = [kind_of(node) for node in module.graph.nodes]
    path = fxcompress.export(module, tmp_path / "net.onnx").path
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    rounded, = (node.input[0] for node in graph.node if node.op_type == "QuantizeLinear")
    assert makers[rounded] == "Reshape" and kinds.index("to_integer") < kinds.index("reshape")
    assert in_steps(run(path, x)[0], module(x).detach()) < 1
    assert in_steps(run(path, x)[0], result.module.eval()(x).detach()) < 1


class Attention(nn.Module):
    """One product for queries, keys and values of different widths, which are split."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.last = nn.Linear(8, 20), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.all(x).split([8, 8, 4], -1)
        return self.last((queries @ keys.transpose(1, 2)).softmax(-1) @ values)


def test_what_is_split_is_multiplied_in_parts(tmp_path: Path) -> None:
    x = noise(3, 5, 8)
    _, module = deployed(Attention(), x, "policy p { quantize linear { } }")
    path = fxcompress.export(module, tmp_path / "net.onnx").path
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "Split" not in kinds and kinds.count("MatMul") == 6  # four layers and the two products of attention
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for runtime, suffix in (("onnxruntime", "onnx"), ("openvino", "xml")):
        run = RUNTIMES[runtime](fxcompress.export(module, tmp_path / f"other.{suffix}").path)
        assert in_steps(run([x])[0], module(x).detach()) < 1
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


def test_a_split_along_rows_stays(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.all(x).split(3, 1)
            return one * two

    x = noise(3, 6, 8)
    _, module = deployed(Rows(), x, "policy p { quantize linear { } }")
    path = fxcompress.export(module, tmp_path / "net.onnx").path
    assert "Split" in [node.op_type for node in onnx.load(path).graph.node]
    assert in_steps(run(path, x)[0], module(x).detach()) < 1


@pytest.mark.parametrize("engine", ["openvino", "openvino_kernels"])
def test_openvino_takes_other_dtypes_and_several_threads(net: Case, tmp_path: Path, engine: str) -> None:
    one = RUNTIMES[engine](fxcompress.export(net.module, tmp_path / "net.xml").path)
    batches = [noise(2, 3, 16, 16, seed=seed) for seed in range(6)]
    expected = [one([batch])[0] for batch in batches]
    assert torch.equal(one([batches[0].double()])[0], expected[0])
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda batch: one([batch])[0], batches * 8))
    assert all(torch.equal(each, wanted) for each, wanted in zip(found, expected * 8, strict=True))


@pytest.mark.parametrize("engine", ["openvino", "openvino_kernels"])
def test_openvino_runs_each_shape(net: Case, tmp_path: Path, engine: str) -> None:
    run = RUNTIMES[engine](fxcompress.export(net.module, tmp_path / "net.xml").path)
    with torch.no_grad():
        for batch in (net.x, noise(3, 3, 16, 16), net.x):
            assert in_steps(run([batch])[0], net.module(batch)) < 1
    with pytest.raises(PlanError) as error:
        run([noise(2, 5, 16, 16)])
    item, = error.value.diagnostics
    assert (item.code, item.help) == ("FXC0646", "give tensors of shapes that the model takes")


LOADS = """
import sys, torch
from safetensors.torch import load_file, save_file
given = load_file(sys.argv[2])
program = torch.export.load(sys.argv[1]).module()
assert "fxcompress" not in sys.modules
save_file({name: program(x) for name, x in given.items()}, sys.argv[3])
"""


def test_pt2_in_a_fresh_process(net: Case, tmp_path: Path) -> None:
    module, x = net.module, net.x
    path = fxcompress.export(module, tmp_path / "net.pt2").path
    batches = {"same": x, "other": noise(3, 3, 16, 16, seed=3)}
    save_file(batches, tmp_path / "given")
    subprocess.run([sys.executable, "-c", LOADS, str(path), str(tmp_path / "given"), str(tmp_path / "found")],
                   check=True, cwd=tmp_path)
    program = torch.export.load(path).module()
    for name, found in load_file(tmp_path / "found").items():
        assert torch.equal(found, program(batches[name]))
        with torch.no_grad():
            assert in_steps(found, module(batches[name])) < 1
    weights = sum(part.weight.numel() for part in module.modules() if isinstance(part, IntConv2d | IntLinear))
    held = [tensor for tensor in torch.export.load(path).state_dict.values() if tensor.dtype == torch.int8]
    assert sum(tensor.numel() for tensor in held) == weights


class Words(nn.Module):
    """An embedding, two linear layers on rows [N, T, size], and a convolution behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(9, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(self.table(tokens)))).flatten(1) + self.conv(
            self.table(tokens)[:, None]).mean((1, 2, 3))[:, None]


MODES = {
    "dynamic": "quantize linear { mode = dynamic }",
    "per token": "quantize linear { mode = dynamic, activations = per_token }",
    "dynamic in groups": "quantize linear { mode = dynamic, granularity = per_group(8) }",
    "weights": "quantize linear | embedding | conv2d { mode = weight_only }",
    "weights in groups": "quantize linear | embedding | conv2d { mode = weight_only, weight_bits = 4 bits, "
                         "granularity = per_group(8) }",
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, tmp_path: Path) -> None:
    tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = fxcompress.compile(f"policy p {{ {MODES[mode]} }}", Words().eval(), tokens).finalize(target="cpu")
    path = fxcompress.export(module, tmp_path / "words.onnx", example_inputs=[tokens]).path
    with torch.no_grad():
        for batch in (tokens, tokens[:3].flip(1)):
            assert in_steps(run(path, batch)[0], module(batch)) < 1
    held = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(int(np.prod(tensor.dims)) for tensor in held) >= (108 + 18 if "weights" in mode else 0) + 120 + 30


def test_a_model_in_floats(tmp_path: Path) -> None:
    x = noise(2, 3, 8, 8)
    _, module = deployed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten()), x, FLOAT)
    for name in ("net.onnx", "net.xml", "net.pt2"):
        gap = fxcompress.export(module, tmp_path / name).gap
        assert gap is not None and gap < 1e-5


def test_what_an_activation_does_that_its_grid_does_too_is_left_out() -> None:
    grid = Grid(6 / 127, 0, 0, 127)
    kernel = IntConv2d((4, 3, 1, 1), False, Grid(0.1, 0), After(grid, activation="hardtanh", numbers=(0.0, 6.0)),
                       (1, 1), (0, 0), (1, 1), 1)
    assert Conv2d(kernel).activation == "none"
    for after in (After(Grid(7 / 127, 0, 0, 127), activation="hardtanh", numbers=(0.0, 6.0)),
                  After(Grid(6 / 127, 10, 0, 127), activation="relu")):
        kernel.after = after
        assert Conv2d(kernel).activation == after.activation


def test_the_original_stays_as_it_is(net: Case) -> None:
    module, x = net.module, net.x
    with torch.no_grad():
        before = module(x)
        kinds = [type(part) for part in module.modules()]
        in_floats(module)
        assert [type(part) for part in module.modules()] == kinds and torch.equal(module(x), before)


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = deployed(nn.Sequential(nn.Linear(4, 4)), noise(4, 4), FLOAT)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    exported = fxcompress.export(module, tmp_path / "net.onnx")
    assert exported.gap is None and "onnxruntime isn't installed" in exported.notes[0]
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    with pytest.raises(PlanError) as error:
        fxcompress.export(module, tmp_path / "net.xml")
    assert [item.code for item in error.value.diagnostics] == ["FXC0640"]
    assert error.value.diagnostics[0].help == "pip install 'fxcompress[export,openvino]'"


def test_a_failed_export_leaves_what_was_there(tmp_path: Path) -> None:
    _, module = deployed(nn.Sequential(nn.Conv2d(3, 4, 1)), noise(4, 3, 4, 4))
    (tmp_path / "net.onnx").write_text("was here")
    module.get_submodule("0").weight_scale.mul_(float("nan"))
    with pytest.raises(PlanError) as error:
        fxcompress.export(module, tmp_path / "net.onnx")
    assert [item.code for item in error.value.diagnostics] == ["FXC0642"]
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "was here"
