"""What the modes of `quantize` share: keys, presets, calibration data, and several modes in one policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.graph.calibration import Calibration
from fxcompress.graph.ops import kind_of, module_of
from fxcompress.nn import Quantizer
from fxcompress.plan.totals import totals_of

PRESETS = {
    "int8": "int_linear", "int8_sym": "int_linear", "int8_per_tensor": "int_linear", "int8_dynamic": "dynamic_linear",
    "int8_per_token": "dynamic_linear", "int8_qat": "int_linear", "int4_qat": "int_linear",
    "int8_weights": "weight_only_linear", "int4_weights": "weight_only_linear",
}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_deployed(preset: str) -> None:
    model, x = perceptron(), noise(16, 128)
    policy = f'use "std/quant.fxc" {{ {preset} }}\npolicy p {{ quantize linear as {preset} }}'
    result = fxcompress.compile(policy, model, x, calibration=[x])
    small = result.finalize(target="cpu")
    assert [kind_of(node) for node in small.graph.nodes].count(PRESETS[preset]) == 2
    apart = float((small(x) - model(x)).detach().norm() / model(x).detach().norm())
    assert apart < (0.35 if "int4" in preset else 0.05)


def test_every_shipped_preset_is_known_here() -> None:
    text = (Path(fxcompress.__file__).parent / "policy/std/quant.fxc").read_text()
    assert {line.split()[1] for line in text.splitlines() if line.startswith("preset ")} == set(PRESETS)


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_qint8_is_the_same_grid(symmetric: str) -> None:
    model, x = perceptron(), noise(16, 128)
    found = {}
    for dtype in ("quint8", "qint8"):
        result = fxcompress.compile(f"policy p {{ quantize linear {{ dtype = {dtype}, bits = 7 bits, symmetric = "
                                    f"{symmetric} }} }}", model, x, calibration=[x])
        found[dtype] = (result.module.eval()(x), result.finalize(target="cpu")(x))
        modules = [module_of(node) for node in result.captured.graph.nodes if kind_of(node) == "quantizer"]
        values = [m for m in modules if isinstance(m, Quantizer) and m.axis is None]
        assert {module.scheme.signed for module in values} == {dtype == "qint8"}
        assert {module.scheme.low for module in values} == {-64 if dtype == "qint8" else 0}
    for one, other in zip(*found.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


class Seen:
    """Counts the samples of a value."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def see(self, value: Tensor) -> None:
        self.sizes.append(len(value))


@pytest.mark.parametrize(("samples", "expected"), [(None, [4, 4, 4]), (6, [4, 2]), (4, [4]), (100, [4, 4, 4])])
def test_so_many_samples_are_looked_at(samples: int | None, expected: list[int]) -> None:
    captured = fxcompress.capture(perceptron(), noise(4, 128))
    seen = Seen()
    node = next(node for node in captured.graph.nodes if kind_of(node) == "relu")
    Calibration([noise(4, 128)] * 3, samples=samples).feed(captured, {node: [seen]})
    assert seen.sizes == expected


def test_ranges_come_from_the_samples_asked_for() -> None:
    model, x = perceptron(), noise(8, 128)
    data = [x[:4], x[4:] * 100]
    scales = []
    for more in ("", ", calibrate = 4 samples"):
        result = fxcompress.compile(f"policy p {{ quantize linear {{ observer = minmax{more} }} }}", model, x,
                                    calibration=data)
        quantizer = result.module.get_submodule("input_1_quantizer")
        assert isinstance(quantizer, Quantizer)
        scales.append(float(quantizer.scale))
    steps = 2**quantizer.scheme.bits - 1
    assert scales[1] == pytest.approx(float(x[:4].max() - x[:4].min()) / steps, rel=1e-5) and scales[0] > 50 * scales[1]


class Mixed(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(20, 16), nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, i: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.words(i)[:, None]))
        x = x.transpose(1, 2).flatten(2)
        return self.c(nn.functional.gelu(self.b(torch.relu(self.a(x)))))


def test_modes_side_by_side() -> None:
    torch.manual_seed(0)
    model, i = Mixed().eval(), torch.randint(0, 20, (4, 6))
    result = fxcompress.compile("""policy p {
        quantize embedding { mode = weight_only, weight_bits = 4 bits, granularity = per_group(8) }
        quantize conv2d | linear[name ~ "a"] { mode = static }
        quantize linear[name ~ "b"] { mode = dynamic, activations = per_token }
        quantize linear[name ~ "c"] { mode = weight_only }
    }""", model, i, calibration=[i])
    small = result.finalize(target="cpu")
    kinds: list[Any] = [kind_of(node) for node in small.graph.nodes if kind_of(node) in (
        "weight_only_embedding", "int_conv2d", "int_linear", "dynamic_linear", "weight_only_linear")]
    assert kinds == ["weight_only_embedding", "int_conv2d", "int_linear", "dynamic_linear", "weight_only_linear"]
    simulated = result.module.eval()(i).detach()
    assert float((small(i) - simulated).norm() / simulated.norm()) < 0.02
    held = {name: t.numel() * t.element_size() for name, t in small.state_dict().items()}
    assert held["words.weight"] == 20 * 8 and held["a.weight"] == 64 * 32
    assert abs(totals_of(result.captured).bytes - sum(held.values())) <= 8 * 32
    assert fxcompress.capture(model, i).facts.macs == result.captured.facts.macs
