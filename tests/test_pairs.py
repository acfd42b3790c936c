"""Pairs of products in 16 bits: against loops, `vpmaddubsw` written out, and kernels that saturate."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recovery import Net, correlated
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.backends import compiled as compiling
from fxcompress.backends.artifact_json import Cursor
from fxcompress.backends.artifact_modules import SCHEME
from fxcompress.nn import DynamicLinear, IntConv2d, IntLinear, engines, integer, pairs
from fxcompress.nn import dynamic as dynamic_layers
from fxcompress.nn.integer import After, Grid, Product
from fxcompress.nn.scheme import Scheme
from fxcompress.passes.shared import quantizing

SHAPES = [(4,), (5,), (1, 3, 3), (2, 3, 1), (3, 3, 3), (8, 1, 1), (33, 1, 2)]


def summed_in_16_bits(rows: Tensor, x: Tensor) -> Tensor:
    """[out]: rows of integers [out, n] times `x` [n], every two products added as `vpmaddubsw` does."""
    products = F.pad(rows.long() * x.long(), (0, x.numel() % 2)).reshape(len(rows), -1, 2)
    return products.sum(2).clamp(-(2**15), 2**15 - 1).sum(1)


def orders(weight: Tensor) -> list[Tensor]:
    """The weights [out, in, ...] as kernels read them: the inputs of each place filled up to pairs, and place after
    place."""
    rows = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    return [F.pad(rows, (0, 0, 0, rows.shape[1] % 2)).transpose(1, 2).flatten(1), rows.transpose(1, 2).flatten(1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours_are_those_of_a_loop(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape)
    places = size.numel() // size[0]
    expected = set()
    if size[0] > 1:
        expected |= {(one * places + at, (one + 1) * places + at)
                     for one in range(0, size[0] - 1, 2) for at in range(places)}
        flat = [channel * places + at for at in range(places) for channel in range(size[0])]
        expected |= set(zip(flat[0::2], flat[1::2], strict=False))
    assert set(map(tuple, pairs.pairs_of(size).tolist())) == expected
    beside = {(one, other) for one, row in enumerate(pairs.partners(size).tolist()) for other in row if one != other}
    assert beside == expected | {(b, a) for a, b in expected}


@given(st.sampled_from([shape for shape in SHAPES if shape[0] > 1]), st.integers(0, 2**20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_saturates_however_weights_are_rounded(shape: tuple[int, ...], seed: int, heavy: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, *shape, generator=generator)
    weight = weight**3 if heavy else weight
    scheme = Scheme(8, narrow=True, pairs=True)
    far = pairs.reach(weight)
    scale, _ = scheme.parameters(-far, far)
    steps = weight / scale.reshape(-1, *[1] * len(shape))
    up = torch.rand(steps.shape, generator=generator) < 0.5
    for rounded in (steps.round(), torch.where(up, steps.ceil(), steps.floor()), steps.sign() * steps.abs().ceil()):
        integers = rounded.clamp(scheme.low, scheme.high)
        assert pairs.fit(integers.to(torch.int8), 255)
        for rows in orders(integers):
            x = torch.full((rows.shape[1],), 255)
            assert torch.equal(summed_in_16_bits(rows, x), rows.long() @ x)


def test_what_does_not_fit_is_told() -> None:
    weight = torch.tensor([[64, 64, 0, 0], [-64, 60, 127, -127]], dtype=torch.int8)
    assert pairs.fit(weight, 255) and not pairs.fit(weight + torch.tensor([1, 0, 0, 0], dtype=torch.int8), 255)
    assert pairs.fit(torch.full((2, 4), 127, dtype=torch.int8), 127)
    assert pairs.fit(torch.full((2, 1, 3, 3), 127, dtype=torch.int8), 255)  # no neighbours


# Kernels of CPUs that saturate


_PROGRAM = """
import sys, torch
from fxcompress.nn import IntConv2d, IntLinear, engines, pairs
from fxcompress.nn.integer import After, Grid
assert pairs.saturates()
few = 0 if sys.argv[1] == "onednn" else 1e9
engines.FEW_PRODUCTS = engines.FEW_DEPTHWISE = engines.FEW_ROWS = few
torch.manual_seed(0)
apart = {"scaled": 0.0, "all": 0.0}
for inputs, outputs, size, groups in [(16, 32, 1, 1), (3, 32, 3, 1), (64, 64, 3, 1), (8, 8, 3, 8), (33, 40, 1, 1),
                                      (30, 48, 3, 2), (65, 48, 0, 1)]:
    weight = torch.randn(outputs, inputs // groups, *[size] * (2 * bool(size)))
    shape = (2, inputs, 9, 9) if size else (100, inputs)
    q = torch.randint(200, 256, shape, dtype=torch.uint8)
    for kind, far in (("scaled", pairs.reach(weight)), ("all", weight.flatten(1).abs().amax(1))):
        steps = (weight / (far / 127).reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
        if size:
            total = torch.nn.functional.conv2d(q.double(), steps.double(), None, 1, size // 2, 1, groups)
        else:
            total = q.double() @ steps.double().T
        step = max(1.0, float(total.abs().max()) / 120)  # sums in bytes, around the middle
        after = After(Grid(step, 128) if few else None)
        if size:
            layer = IntConv2d(weight.shape, False, Grid(1.0, 0), after, (1, 1), (size // 2,) * 2, (1, 1), groups)
        else:
            layer = IntLinear(weight.shape, False, Grid(1.0, 0), after)
        layer.fill(steps, torch.ones(outputs), None)
        layer._packed.exact = True  # no looking first
        found = layer(q.contiguous(memory_format=torch.channels_last) if size else q).double()
        if few:
            assert layer.engine == "fbgemm" or groups > 1, (layer.engine, layer.why)
            total = (total * torch.tensor(1 / step, dtype=torch.float32).double()).round() + 128
        apart[kind] = max(apart[kind], float((found - total).abs().max()))
print(apart["scaled"], apart["all"])
"""


@pytest.mark.parametrize(("engine", "setting", "far"), [
    ("onednn", "ONEDNN_MAX_CPU_ISA", 1000), ("fbgemm", "FBGEMM_ENABLE_INSTRUCTIONS", 1)])
def test_kernels_without_vnni_are_exact_on_scaled_weights_and_saturate_on_others(
        engine: str, setting: str, far: float) -> None:
    """Libraries that are told to do without it sum as they do on CPUs that have none; a step of FBGEMM's bytes stands
    for many products."""
    environment = {**os.environ, setting: "AVX2", "OMP_NUM_THREADS": "1"}
    made = subprocess.run([sys.executable, "-c", _PROGRAM, engine], env=environment, capture_output=True, text=True,
                          check=True)
    scaled, all_ = map(float, made.stdout.split())
    assert scaled == 0 and all_ > far


def test_libraries_that_are_told_to_do_without_vnni_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    assert not pairs.saturates()
    for name, value in (("ONEDNN_MAX_CPU_ISA", "avx2"), ("DNNL_MAX_CPU_ISA", "AVX512_CORE"),
                        ("FBGEMM_ENABLE_INSTRUCTIONS", "AVX2")):
        with monkeypatch.context() as told:
            told.setenv(name, value)
            assert pairs.saturates()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    assert not pairs.saturates()


# The key


def layers(module: Any) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, Product | DynamicLinear)]


def compiled(keys: str) -> tuple[fxcompress.Result, list[Tensor]]:
    data = [correlated(12, 3, 10, 10), correlated(8, 3, 10, 10, seed=2)]
    policy = f"policy p {{ quantize conv2d | linear {{ {keys} }} }}"
    return fxcompress.compile(policy, Net().eval(), data[0][:2], calibration=data), data


@pytest.mark.parametrize("keys", ["", "gptq = true, correct_bias = true", "adaround = true", "equalize = true",
                                  "smooth = 50%", "weight_observer = mse", "granularity = per_tensor"])
def test_every_way_to_round_fits(keys: str) -> None:
    result, _ = compiled(f"fit_pairs = true, {keys}" if keys else "fit_pairs = true")
    made = layers(result.finalize(target="cpu"))
    assert len(made) == 5 and all(pairs.fit(layer.weight, layer.reads.high) for layer in made)
    loose = layers(compiled(f"fit_pairs = false, {keys}")[0].finalize(target="cpu"))
    assert not all(pairs.fit(layer.weight, layer.reads.high) for layer in loose)


def test_dynamic_layers_fit_too() -> None:
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 24)
    for keys in ("", ", granularity = per_group(7)"):
        policy = f"policy p {{ quantize linear {{ mode = dynamic, fit_pairs = true{keys} }} }}"
        made = layers(fxcompress.compile(policy, model, x).finalize(target="cpu"))
        assert len(made) == 2 and all(pairs.fit(part, 255) for layer in made for part, _ in layer._parts())


def test_less_is_lost_than_with_seven_bits() -> None:
    def noise(keys: str) -> float:
        result, data = compiled(keys)
        with torch.no_grad():
            expected = Net().eval()(data[0])
            return float((result.finalize(target="cpu")(data[0]) - expected).norm() / expected.norm())

    assert noise("fit_pairs = true") < noise("weight_bits = 7 bits")


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decided is decided as on a CPU whose products saturate; its kernels don't."""
    for module in (pairs, integer, dynamic_layers, quantizing):
        monkeypatch.setattr(module, "saturates", lambda: True)
    monkeypatch.setattr("fxcompress.backends.dynamic.saturates", lambda: True)


@pytest.mark.usefixtures("without_vnni")
def test_it_is_the_default_where_products_saturate() -> None:
    result, _ = compiled("")
    assert any("no two neighbours sum to more than 128" in note for note in result.notes)
    made = layers(result.finalize(target="cpu"))
    assert all(layer.reads.high == 255 and layer.check() and layer.engine in ("onednn", "fbgemm") for layer in made)


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize("keys", ["bits = 7 bits", "weight_bits = 7 bits"])
def test_bits_that_are_few_enough_are_left_alone(keys: str) -> None:
    result, _ = compiled(keys)
    assert not any("neighbours" in note or "VNNI" in note for note in result.notes)
    assert max(int(layer.weight.abs().max()) for layer in layers(result.finalize(target="cpu"))) == (
        127 if keys.startswith("bits") else 63)


@pytest.mark.usefixtures("without_vnni")
def test_layers_that_would_saturate_are_computed_in_floats_and_told() -> None:
    result, data = compiled("fit_pairs = false")
    assert any("computed in floats" in note for note in result.notes)
    small = result.finalize(target="cpu")
    engines_of = {layer.engine for layer in layers(small)}
    assert "floats" in engines_of and all("16 bits" in layer.why for layer in layers(small) if layer.engine == "floats")
    with torch.no_grad():
        found, simulated = small(data[0]), result.module(data[0])
    assert float((found - simulated).norm() / simulated.norm()) < 0.02


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize("activation", ["none", "relu", "hardtanh", "hardswish", "swish"])
@pytest.mark.parametrize("gives", [None, Grid(0.37, 11), Grid(0.9, 60, 0, 127)])
def test_floats_give_what_kernels_give(gives: Grid | None, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    q, other = torch.randint(0, 128, (2, 8, 7, 7), dtype=torch.uint8), torch.randint(0, 256, (2, 6, 7, 7))
    adds = Grid(0.2, 9) if activation in ("none", "relu") else None
    after = After(gives, adds=adds, copies=True, activation=activation,
                  numbers=(0.0, 6.0) if activation == "hardtanh" else ())
    other = other.to(torch.uint8) if gives is not None else other.float()
    after = After(gives, adds=adds if gives is not None or adds is None else integer.FLOATS, copies=True,
                  activation=activation, numbers=after.numbers)
    weight = torch.randint(-127, 128, (6, 8, 3, 3), dtype=torch.int8)
    layer = IntConv2d(weight.shape, True, Grid(0.05, 7, 0, 127), after, (1, 1), (1, 1), (1, 1), 1)
    layer.fill(weight, torch.rand(6) * 0.02 + 1e-3, torch.randn(6))
    x = q.contiguous(memory_format=torch.channels_last)
    added = None if after.adds is None else other.contiguous(memory_format=torch.channels_last)
    expected = layer(x, added).float()
    assert layer.engine != "floats"
    found = engines.in_floats(layer, x, added).float()
    assert float((found - expected).abs().max()) <= (1 if gives is not None else 1e-3)
    assert float((found != expected).float().mean()) < (0.01 if gives is not None else 2)


@pytest.mark.usefixtures("without_vnni")
def test_compiled_graphs_know_what_would_saturate() -> None:
    weight = torch.full((4, 6), 127, dtype=torch.int8)
    layer = IntLinear(weight.shape, False, Grid(1.0, 0), After(None))
    layer.fill(weight, torch.ones(4), None)
    model = fxcompress.capture(nn.Sequential(nn.Identity()), torch.randn(2, 6)).module
    model.add_module("layer", layer)
    compiling.Frozen(model)
    assert layer._packed.exact is False


@pytest.mark.parametrize("given", [False, True])
def test_schemes_saved_before_the_key_are_read(given: bool) -> None:
    fields = {"bits": 8, "signed": True, "symmetric": True, "narrow": True}
    document = Cursor({**fields, "pairs": True} if given else fields, "graph.json")
    assert SCHEME.read(document) == Scheme(8, narrow=True, pairs=given)
