"""`finalize(target="cuda")`: on fake CUDA tensors, its numbers in exact arithmetic, and on a GPU where there is one."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.backends.cuda import Gpu
from fxcompress.backends.half import check_on
from fxcompress.diagnostics import PlanError
from fxcompress.engine.gpu import put_on_gpu
from fxcompress.engine.gpu_plan import plan_for_gpu
from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import kind_of, module_of
from fxcompress.nn import CudaInt4Linear, CudaInt8Linear, CudaInt8WeightLinear, Sparse24Linear, ToInt8
from fxcompress.nn.cuda import is_two_of_four
from fxcompress.nn.integer import Grid
from fxcompress.passes.shared.calibrating import quantizers_of

INT8 = 'use "std/quant.fxc" { int8 }\npolicy p { quantize %s as int8 { } }'
SPARSE = "policy p { mask linear { sparsity = 50%, granularity = 2:4 } }"
CUDA, STAND_IN = torch.device("cuda"), Gpu(torch.device("cpu"))
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def kinds(captured: Captured) -> list[str]:
    return [kind_of(node) for node in captured.graph.nodes]


def compiled(policy: str, model: nn.Module, x: Tensor) -> fxcompress.Result:
    return fxcompress.compile(policy, model, x, calibration=[x] if "quantize" in policy else None)


# What the layers compute


@pytest.mark.parametrize("grid", [Grid(0.05, 7), Grid(0.03, 131), Grid(0.05, 40, 0, 127), Grid(0.05, 0, -127, 127)])
@pytest.mark.parametrize(("rows", "shape"), [((3,), (10, 24)), ((2, 20), (16, 21)), ((33,), (8, 8)), ((0,), (8, 8))])
@pytest.mark.parametrize("extreme", [False, True])
def test_int8_products_in_exact_arithmetic(grid: Grid, rows: tuple[int, ...], shape: tuple[int, int],
                                           extreme: bool) -> None:
    torch.manual_seed(3)
    q = torch.randint(grid.low, grid.high + 1, (*rows, shape[1]))
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    if extreme:
        q, weight = torch.full_like(q, grid.high), torch.full_like(weight, 127)
    scale, bias = torch.rand(shape[0]) * 1e-2 + 1e-3, torch.randn(shape[0])
    layer = CudaInt8Linear(shape, grid)
    layer.fill(weight, scale, bias)
    x = ((q - grid.zero_point).double() * grid.scale).float()
    found = layer(ToInt8(grid)(x))
    exact = (q - grid.zero_point) @ weight.long().t() * (scale.double() * grid.scale) + bias.double()
    assert found.dtype == torch.float16 and found.shape == (*rows, shape[0])
    # float32 sums are rounded to float16 once; where the sum cancels the offset that has float32's error stays
    assert torch.allclose(found.double(), exact, rtol=2**-11, atol=2e-4 * float(exact.abs().max() if q.numel() else 1))


def test_integers_saturate_as_the_simulation_does() -> None:
    grid = Grid(0.1, 100)
    x = torch.tensor([-1e4, -10.0, -0.05, 0.0, 0.05, 0.15, 15.5, 1e4])
    expected = torch.quantize_per_tensor(x, 0.1, 100, torch.quint8).int_repr().to(torch.int16) - 128
    assert torch.equal(ToInt8(grid)(x).to(torch.int16), expected)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_four_bits_in_exact_arithmetic(group: int) -> None:
    """(q - z)·s with s and z·s in bfloat16, times what is read in bfloat16."""
    torch.manual_seed(5)
    weight, x = torch.randint(-8, 8, (16, 128), dtype=torch.int8), noise(3, 5, 128).bfloat16()
    scale = (torch.rand(16, 128 // group) + 0.5).bfloat16().float()
    zero, bias = torch.randint(-8, 8, scale.shape), noise(16)
    layer = CudaInt4Linear((16, 128), True, group)
    layer.fill(weight, scale, zero, bias)
    offset = (-zero * scale).bfloat16().double()
    dense = weight.double() * scale.double().repeat_interleave(group, 1) + offset.repeat_interleave(group, 1)
    assert torch.equal(layer.floats().double(), dense)
    found, exact = layer(x.half()), x.double() @ dense.t() + bias.double()
    assert found.dtype == torch.float16 and torch.allclose(found.double(), exact, rtol=2**-11, atol=1e-3)
    assert layer.weight.numel() * 2 == weight.numel()


def test_int8_weights_in_exact_arithmetic() -> None:
    weight, x = torch.randint(-127, 128, (10, 24), dtype=torch.int8), noise(2, 3, 24).half()
    scale, bias = torch.rand(10) * 1e-2, noise(10)
    layer = CudaInt8WeightLinear((10, 24), True)
    layer.fill(weight, scale, bias)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    assert torch.allclose(layer(x).double(), exact, rtol=2**-11, atol=1e-4)


def test_the_pattern_is_recognised() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 1, 1, 0, 0]])
    assert is_two_of_four(weight) and not is_two_of_four(weight[:, 1:7]) and not is_two_of_four(weight + 1)
    assert not is_two_of_four(torch.tensor([[1.0, 1, 1, 0]]))


# The graph, on fake CUDA tensors


class Mixed(nn.Module):
    """What half precision has to look at: a buffer and a number out of range, numbers made in the graph, squares, and a
    layer read by name."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 8)
        self.register_buffer("mask", torch.full((4, 4), torch.finfo(torch.float32).min).triu(1))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.norm(F.gelu(self.first(x)))
        scores = (y @ y.transpose(1, 2)) / 8 + self.mask
        scores = scores.masked_fill(scores < -1e30, -1e9).softmax(-1)
        place = torch.arange(4, device=x.device).to(torch.float32)[:, None] / 4
        y = scores @ (y + place)
        size = (300 * y).pow(2).sum(-1, keepdim=True).sqrt()
        return self.last(y), {"size": size, "index": y.argmax(-1)}


def facts(value: Any) -> list[tuple[Any, ...]]:
    tensors = [value[0], *value[1].values()] if isinstance(value, tuple) else [value]
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def test_half_precision_keeps_what_the_model_gives() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), noise(2, 4, 16)
    planned = plan_for_gpu(fxcompress.capture(model, x))
    found = check_on(planned.captured, CUDA)
    expected = model(x)
    assert facts(found) == facts(expected)
    assert all(tensor.device.type == "cuda" for tensor in [found[0], *found[1].values()])
    weights = {name: tensor.dtype for name, tensor in planned.captured.module.named_parameters()}
    assert set(weights.values()) == {torch.float16} and set(weights) == set(dict(model.named_parameters()))
    assert any("mask" in note and "65504" in note for note in planned.notes)
    real = planned.captured.module.cpu()
    for node in planned.captured.graph.nodes:  # numbers made in the graph are made on the GPU: here there is none
        if "device" in node.kwargs:
            assert node.kwargs["device"].type == "cuda"
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    real.recompile()
    with torch.no_grad():
        made = real(x)
    assert apart(made[0], expected[0]) < 5e-3 and apart(made[1]["size"], expected[1]["size"]) < 5e-3
    assert float(made[1]["size"].max()) > 255  # its square isn't a number in float16


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "vit_b_16"])
def test_models_on_fakes(name: str) -> None:
    torch.manual_seed(0)
    size = 224 if name == "vit_b_16" else 64
    model, x = torchvision.models.get_model(name, num_classes=10).eval(), noise(2, 3, size, size)
    planned = plan_for_gpu(fxcompress.capture(model, x))
    found = check_on(planned.captured, CUDA)
    assert (found.shape, found.dtype, found.device.type) == (torch.Size([2, 10]), torch.float32, "cuda")
    assert kinds(planned.captured).count("to") == 2  # at the input and at the output
    assert all(parameter.dtype == torch.float16 for name, parameter in planned.captured.module.named_parameters()
               if "norm" not in name or name.startswith("encoder"))


def test_quantized_linear_layers_multiply_int8() -> None:
    """The head's ten outputs are filled up to sixteen; layers that read one value share its integers."""
    model, x = mlp(24, 40, 10), noise(8, 24)
    result = compiled(INT8 % "linear", model, x)
    planned = plan_for_gpu(result.captured)
    assert planned.captured.facts.macs == 24 * 40 + 40 * 10
    found = kinds(planned.captured)
    assert found.count("cuda_int8_linear") == 2 and "linear" not in found and "quantizer" not in found
    heads = [module for module in planned.captured.module.modules() if isinstance(module, CudaInt8Linear)]
    assert [tuple(head.weight.shape) for head in heads] == [(40, 24), (16, 40)]
    assert set(planned.captured.module.state_dict()) == {f"{place}.{name}" for place in (0, 2)
                                                         for name in ("weight", "scale", "offset")}
    x = noise(8, 24)
    assert apart(planned.captured.module(x), result.module.eval()(x)) < 2e-3
    assert result.module.get_parameter("0.weight").dtype == torch.float32  # it worked on a copy


class Heads(nn.Module):
    """Three layers on one value, behind a reshape, and the functional form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k = nn.Linear(32, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x)).reshape(-1, 2, 16)
        return self.q(y) @ self.k(y).transpose(1, 2) + F.linear(y, self.table)[:, :, :2]


def test_layers_share_the_integers_of_a_value() -> None:
    torch.manual_seed(0)
    model, x = Heads().eval(), noise(4, 32)
    result = compiled(INT8 % "linear", model, x)
    planned = plan_for_gpu(result.captured)
    found = kinds(planned.captured)
    assert (found.count("cuda_int8_linear"), found.count("to_int8")) == (4, 2)
    assert apart(planned.captured.module(x), result.module.eval()(x)) < 5e-3


class Tied(nn.Module):
    """A weight that is quantized in one place and read in another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y) + self.conv(y[:, None]).mean((1, 2, 3))[:, None, None]


def test_what_stays_in_half_is_said_and_keeps_its_rounded_weights() -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(1))
    result = compiled(INT8 % "linear | conv2d", model, x)
    planned = plan_for_gpu(result.captured)
    module = planned.captured.module
    assert any("conv" in note and "no convolution of integers" in note for note in planned.notes)
    assert torch.equal(module.get_parameter("embed.weight"), model.embed.weight.half())  # nobody rounded that one
    rounded = module_of(next(node for node in result.captured.graph.nodes if node.name == "conv_weight_quantizer"))
    assert torch.equal(module.get_parameter("conv.weight"), rounded(model.conv.weight).half())
    assert apart(module(x), result.module.eval()(x)) < 0.02


def test_sparse_weights() -> None:
    """2:4 masks become sparse layers where their sizes fit; the rest says why not."""
    model, x = mlp(64, 96, 64, 10), noise(4, 64)
    result = compiled(SPARSE, model, x)
    planned = plan_for_gpu(result.captured)
    sparse = [module for module in planned.captured.module.modules() if isinstance(module, Sparse24Linear)]
    assert [module.shape for module in sparse] == [(96, 64)]  # 96 inputs aren't a multiple of 64
    assert sum("2:4 pattern isn't used" in note for note in planned.notes) == 2
    assert list(planned.captured.module.state_dict()) == list(model.state_dict())
    assert sparse[0].weight.requires_grad and float((sparse[0].weight == 0).float().mean()) == 0.5
    result.module.eval()
    assert apart(planned.captured.module(x), result.module(x)) < 2e-3
    old = plan_for_gpu(result.captured, Gpu(CUDA, (7, 5)))
    assert "sparse24_linear" not in kinds(old.captured) and any("since compute capability 8" in n for n in old.notes)


def without_values_rounded(captured: Captured) -> Captured:
    """As `captured`, but weights alone are rounded."""
    made = captured.copy()
    for node in quantizers_of(made):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    made.refresh()
    made.module.eval()
    return made


@pytest.mark.parametrize(("bits", "granularity", "classes"), [
    (8, "per_channel", (CudaInt8WeightLinear, CudaInt8WeightLinear)),
    (4, "per_channel", (CudaInt4Linear, CudaInt8WeightLinear)),
    (3, "per_tensor", (CudaInt4Linear, CudaInt8WeightLinear))])
def test_weights_alone(bits: int, granularity: str, classes: tuple[type[nn.Module], ...], tmp_path: Path) -> None:
    """4 bits are packed where the sizes fit: 24 inputs don't."""
    model, x = mlp(128, 24, 16), noise(6, 128)
    policy = f"policy p {{ quantize linear {{ weight_bits = {bits} bits, granularity = {granularity} }} }}"
    simulated = without_values_rounded(compiled(policy, model, x).captured)
    planned = plan_for_gpu(simulated)
    module = planned.captured.module
    assert tuple(type(module_of(node)) for node in planned.captured.graph.nodes
                 if kind_of(node).endswith("linear")) == classes
    assert apart(module(x), simulated.module(x)) < 5e-3
    assert planned.captured.facts.macs == 128 * 24 + 24 * 16
    fxcompress.save(module, tmp_path / "small")
    for other in (fxcompress.load(tmp_path / "small"), copy.deepcopy(module)):
        assert torch.equal(other(x), module(x))


def test_hardware_without_int8() -> None:
    model, x = mlp(16, 16), noise(4, 16)
    planned = plan_for_gpu(compiled(INT8 % "linear", model, x).captured, Gpu(CUDA, (7, 0)))
    assert "linear" in kinds(planned.captured) and any("since compute capability 7.5" in n for n in planned.notes)


def test_copied_saved_and_loaded(tmp_path: Path) -> None:
    model, x = mlp(64, 32, 64, 10), noise(6, 64)
    policy = ('use "std/quant.fxc" { int8 }\npolicy p { mask linear[name ~ "0"] { sparsity = 50%, granularity = 2:4 }\n'
              'quantize linear - linear[name ~ "0"] as int8 { } }')
    planned = plan_for_gpu(compiled(policy, model, x).captured)
    assert {"sparse24_linear", "cuda_int8_linear", "to_int8"} <= set(kinds(planned.captured))
    module = planned.captured.module
    fxcompress.save(module, tmp_path / "small")
    for other in (fxcompress.load(tmp_path / "small"), copy.deepcopy(module)):
        assert torch.equal(other(x), module(x))


# What is refused


def test_weights_out_of_range() -> None:
    model = mlp(4, 4)
    with torch.no_grad():
        model[0].weight.fill_(1e5)  # type: ignore[union-attr, operator]
    with pytest.raises(PlanError, match="FXC0581") as refused:
        plan_for_gpu(fxcompress.capture(model, noise(2, 4)))
    assert "0.weight" in str(refused.value)


def test_a_gap_is_refused_and_named() -> None:
    """The CPU stands in for a GPU: the same graph, made and compared there."""
    model, x = mlp(16, 16, 16), noise(4, 16)
    captured = compiled(INT8 % "linear", model, x).captured.copy()
    captured.module.eval()
    assert any("within" in note for note in put_on_gpu(captured.copy(), None, STAND_IN))
    with torch.no_grad():
        captured.module.get_parameter("2.bias").fill_(1e5)
    with pytest.raises(PlanError, match="FXC0582"):
        put_on_gpu(captured, None, STAND_IN)


def test_without_a_gpu_finalize_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match="FXC0527"):
        compiled(SPARSE, mlp(64, 64), noise(2, 64)).finalize(target="cuda")


# On a GPU


@gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 200])
@pytest.mark.parametrize("shape", [(10, 24), (64, 40), (16, 21), (256, 512)])
def test_int8_products_on_the_gpu(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    grid = Grid(0.05, 131)
    layer, x = CudaInt8Linear(shape, grid), noise(rows, shape[1])
    layer.fill(torch.randint(-127, 128, shape, dtype=torch.int8), torch.full((shape[0],), 1e-3), noise(shape[0]))
    expected = layer(ToInt8(grid)(x))
    assert torch.allclose(layer.cuda()(ToInt8(grid)(x.cuda())).cpu(), expected, rtol=2**-10, atol=1e-6)


@gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 7, 8, 130])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_products_on_the_gpu(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight = noise(64, 128) * torch.tensor([1.0, 0, 0, 1]).repeat(32)
    layer = Sparse24Linear((64, 128), bias)
    layer.fill(weight, noise(64, seed=2) if bias else None)
    x = noise(rows, 2, 128)
    expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    layer.cuda()
    for _ in range(2):  # compressed, and again from what was kept
        assert apart(layer(x.half().cuda()).double().cpu(), expected) < 2e-3
    assert torch.equal(copy.deepcopy(layer)(x.half().cuda()), layer(x.half().cuda()))
    layer.load_state_dict({name: 2 * tensor for name, tensor in layer.state_dict().items()})
    assert apart(layer(x.half().cuda()).double().cpu(), 2 * expected) < 2e-3


@gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_packed_weights_on_the_gpu(rows: int, group: int) -> None:
    torch.manual_seed(0)
    x = noise(rows, 512).half()
    four, eight = CudaInt4Linear((64, 512), True, group), CudaInt8WeightLinear((64, 512), True)
    scale = torch.rand(64, 512 // group) + 0.5
    four.fill(torch.randint(-8, 8, (64, 512), dtype=torch.int8), scale, torch.zeros(scale.shape), noise(64))
    eight.fill(torch.randint(-127, 128, (64, 512), dtype=torch.int8), torch.rand(64) * 1e-2, noise(64))
    for layer in (four, eight):
        expected = layer(x).double()
        assert apart(layer.cuda()(x.cuda()).double().cpu(), expected) < 1e-2  # tinygemm rounds to bfloat16


@gpu
@needs_gpu
@pytest.mark.parametrize(("policy", "model", "shape"), [
    (INT8 % "linear", mlp(64, 96, 10), (33, 64)), (SPARSE, mlp(64, 128, 64), (5, 64)),
    (INT8 % "conv2d | linear", torchvision.models.resnet18(num_classes=10).eval(), (4, 3, 64, 64))])
def test_finalize_on_the_gpu(policy: str, model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = noise(*shape)
    result = compiled(policy, model, x)
    small = result.finalize(target="cuda")
    assert {tensor.device.type for tensor in small.state_dict().values()} == {"cuda"}
    assert apart(small(x.cuda()).cpu(), result.module.eval()(x)) < 0.05
    fxcompress.save(small, tmp_path / "small")
    assert torch.equal(fxcompress.load(tmp_path / "small").cuda()(x.cuda()), small(x.cuda()))
