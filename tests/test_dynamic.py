"""`mode = dynamic`: kernels against exact integer arithmetic, and the simulation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import PlanError, PolicyError
from fxcompress.graph.ops import kind_of
from fxcompress.nn import DynamicLinear, DynamicQuantizer, quantized_dtypes
from fxcompress.nn.scheme import Scheme
from fxcompress.passes import Quantize


def grid(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero point) for the values of `x` [rows, n], a row a grid (Krishnamoorthi, 2018, section 2)."""
    low, high, steps = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0), 2**bits - 1
    if symmetric:
        return torch.maximum(-low, high) * 2 / (steps - 1), torch.full_like(low, 2 ** (bits - 1))
    scale = (high - low) / steps
    return scale, (-(low / scale).round()).clamp(0, steps)


def exact(layer: DynamicLinear, x: Tensor, bits: int, per_token: bool, symmetric: bool, group: int) -> Tensor:
    """The layer in 64-bit integers."""
    scale, zero = grid(x if per_token else x.reshape(1, -1), bits, symmetric)
    scale, zero = scale[:, None], zero[:, None]
    q = (x * (1 / scale) + zero).round().clamp(0, 2**bits - 1).to(torch.int64) - zero.to(torch.int64)
    total = torch.zeros(len(x), layer.shape[0], dtype=torch.float64)
    size = group or layer.shape[1]
    for at, scales in zip(range(0, layer.shape[1], size), layer.weight_scale.T, strict=True):
        sums = q[:, at : at + size] @ layer.weight[:, at : at + size].to(torch.int64).T
        total += sums.double() * scale.double() * scales.double()
    return total if layer.bias is None else total + layer.bias.double()


@pytest.mark.parametrize("kernel", ["fbgemm", "onednn"])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(("bits", "weight_bits"), [(7, 8), (8, 7), (4, 8)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("extreme", [False, True])
def test_in_exact_arithmetic(extreme: bool, per_token: bool, symmetric: bool, bits: int, weight_bits: int, group: int,
                             kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "onednn":
        monkeypatch.setattr(quantized_dtypes, "available", lambda engine: False)
    torch.manual_seed(1)
    x = torch.randn(6, 40) * torch.logspace(-3, 2, 6)[:, None]
    x[1] = x[1].abs()
    top = 2 ** (weight_bits - 1) - 1
    weight = torch.randint(-top, top + 1, (12, 40), dtype=torch.int8)
    if extreme:
        x, weight = torch.full_like(x, 3.7), torch.full_like(weight, top)
        x[2], weight[3] = -3.7, -top
    scheme = Scheme(bits, signed=False, symmetric=symmetric)
    layer = DynamicLinear(weight.shape, not symmetric, scheme, per_token, group)
    layer.fill(weight, torch.rand(12, -(-40 // group) if group else 1) + 0.5,
               None if symmetric else torch.randn(12))
    found, expected = layer(x).double(), exact(layer, x, bits, per_token, symmetric, group)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    each = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-9)
    assert float(each.max()) < (1e-5 if per_token else 1e-2)


def test_rows_of_zeros_and_no_rows() -> None:
    layer = DynamicLinear((3, 8), True, Scheme(7, signed=False, symmetric=False), True)
    layer.fill(torch.ones(3, 8, dtype=torch.int8), torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(layer(torch.zeros(2, 1, 8)), torch.tensor([1.0, 2.0, 3.0]).expand(2, 1, 3))
    assert layer(torch.zeros(0, 8)).shape == (0, 3)


class Mlp(nn.Module):
    """Two layers that read the same value, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.gelu(self.a(x)) * self.b(x))


def deployed(body: str, model: nn.Module, x: Tensor) -> tuple[fxcompress.Result, Any]:
    result = fxcompress.compile(f"policy p {{ quantize linear {{ mode = dynamic, {body} }} }}", model, x)
    return result, result.finalize(target="cpu")


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("body", ["activations = per_tensor", "activations = per_token",
                                  "activations = per_token, granularity = per_group(8)",
                                  "granularity = per_tensor, symmetric = true"])
def test_what_is_deployed_is_what_was_simulated(body: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(2, 5, 32)
    result, small = deployed(body, model, x)
    kinds = [kind_of(node) for node in small.graph.nodes]
    assert kinds.count("dynamic_linear") == 3 and not {"quantizer", "linear"} & set(kinds)
    simulated = [node for node in result.captured.graph.nodes if kind_of(node) == "quantizer"]
    assert len(simulated) == 5  # three weights, and two values: that which two layers read has one
    assert apart(small(x), result.module.eval()(x)) < 1e-5 and apart(small(x), model(x)) < 0.1
    fxcompress.save(small, tmp_path / "small")
    for other in (fxcompress.load(tmp_path / "small"), copy.deepcopy(small)):
        assert torch.equal(other(x), small(x))


def test_rows_of_their_own_scale_want_ranges_of_their_own() -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    x = torch.randn(8, 32) * torch.logspace(-2, 2, 8)[:, None]
    errors = {}
    for activations in ("per_tensor", "per_token"):
        _, small = deployed(f"activations = {activations}", model, x)
        found, expected = small(x).detach(), model(x).detach()
        errors[activations] = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).mean())
    assert errors["per_token"] < 0.03 and errors["per_tensor"] > 10 * errors["per_token"]


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    quantizer, x = DynamicQuantizer(Scheme(3, signed=False, symmetric=False)), torch.randn(4, 5, requires_grad=True)
    made = quantizer(x)
    made.backward(torch.arange(20.0).reshape(4, 5))
    assert x.grad is not None and torch.equal(x.grad, torch.arange(20.0).reshape(4, 5))
    assert not torch.equal(made, x) and len(made.detach().unique()) <= 8


def test_what_saturates_is_not_lowered_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nn.dynamic", "backends.dynamic", "passes.shared.quantizing"):
        monkeypatch.setattr(f"fxcompress.{module}.saturates", lambda: True)
    torch.manual_seed(0)
    result, small = deployed("fit_pairs = false", Mlp().eval(), torch.randn(2, 32))
    assert not any(isinstance(module, DynamicLinear) for module in small.modules())
    assert any("saturate" in note and "stays in float" in note for note in result.notes)
    for keys in ("weight_bits = 7 bits", "bits = 7 bits", "fit_pairs = true", ""):
        _, small = deployed(keys, Mlp().eval(), torch.randn(2, 32))
        assert sum(isinstance(module, DynamicLinear) for module in small.modules()) == 3


def test_a_layer_that_would_saturate_where_it_is_loaded_computes_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    _, small = deployed("fit_pairs = false", Mlp().eval(), x := torch.randn(2, 32))
    expected = small(x)
    monkeypatch.setattr("fxcompress.nn.dynamic.saturates", lambda: True)
    there = copy.deepcopy(small)
    assert not all(part.check() for part in there.modules() if isinstance(part, DynamicLinear))
    assert torch.allclose(there(x), expected, atol=1e-5)


def test_convolutions_are_refused_with_the_reason() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), torch.randn(2, 1, 4, 4)
    result = fxcompress.compile("policy p { quantize * { mode = dynamic } }", model, x)
    assert any("isn't for conv2d" in note for note in result.notes)
    with pytest.raises(PlanError, match="FXC0370"):
        fxcompress.compile("policy p { quantize conv2d { mode = dynamic } }", model, x)


@pytest.mark.parametrize(("code", "settings"), [
    ("FXC0371", {"activations": "per_token"}), ("FXC0371", {"mode": "weight_only", "bits": 8}),
    ("FXC0371", {"mode": "dynamic", "observer": "minmax"}), ("FXC0371", {"freeze": 0.5}),
    ("FXC0372", {"granularity": "per_group(8)"}),
    ("FXC0372", {"mode": "qat", "granularity": "per_group(8)"}),
    ("FXC0373", {"mode": "qat", "delay": 0.8, "freeze": 0.5}),
])
def test_combinations_that_mean_nothing(code: str, settings: dict[str, Any]) -> None:
    with pytest.raises(PolicyError) as error:
        Quantize(**settings)
    assert [found.code for found in error.value.diagnostics] == [code] and error.value.diagnostics[0].help
