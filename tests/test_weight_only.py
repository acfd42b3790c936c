"""`mode = weight_only`: against the formula written out, and on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.diagnostics import PlanError
from fxcompress.graph.ops import kind_of
from fxcompress.nn import WeightOnlyConv2d, WeightOnlyEmbedding, WeightOnlyLinear
from fxcompress.nn.weight_only import pack, unpack


class Words(nn.Module):
    """An embedding, linear layers of an odd width, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.last = nn.Embedding(50, 23), nn.Linear(23, 40), nn.Linear(40, 10, bias=False)
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding="valid")

    def forward(self, i: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(self.words(i)))
        return self.last(x), self.conv(x[:, None])


def rounded(weight: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """A weight rounded group by group, in plain Python over its rows (Nagel et al., "A White Paper on Neural Network
    Quantization", 2021, equations 4 to 7)."""
    made = weight.detach().flatten(1).clone()
    for row in made:
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            if symmetric:
                top = 2 ** (bits - 1) - 1
                scale = part.abs().max() / top
                part.copy_((part / scale).round().clamp(-top, top) * scale)
            else:
                low, high = part.min().clamp(max=0), part.max().clamp(min=0)
                scale = (high - low) / (2**bits - 1)
                zero = (-low / scale).round()
                part.copy_(((part / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale)
    return made.reshape(weight.shape)


def quantized(body: str, model: nn.Module, x: Tensor) -> tuple[fxcompress.Result, Any]:
    result = fxcompress.compile(f"policy p {{ quantize * {{ mode = weight_only, {body} }} }}", model, x)
    return result, result.finalize(target="cpu")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 16), (4, 0), (4, 8), (3, 16), (2, 4), (6, 7)])
def test_the_layers_compute_with_the_rounded_weights(bits: int, group: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    model, x = Words().eval(), torch.randint(0, 50, (3, 7))
    grain = f", granularity = per_group({group})" if group else ""
    result, small = quantized(f"weight_bits = {bits} bits, symmetric = {str(symmetric).lower()}{grain}", model, x)
    expected = copy.deepcopy(model)
    for layer in (expected.words, expected.first, expected.last, expected.conv):
        layer.weight.data = rounded(layer.weight, bits, group, symmetric)
    for found, simulated, wanted in zip(small(x), result.module.eval()(x), expected(x), strict=True):
        assert torch.allclose(found, wanted, atol=2e-5) and torch.allclose(found, simulated, atol=1e-6)
    kinds = [kind_of(node) for node in small.graph.nodes]
    assert kinds.count("weight_only_linear") == 2 and {"weight_only_embedding", "weight_only_conv2d"} <= set(kinds)
    assert not {"quantizer", "linear", "embedding", "conv2d"} & set(kinds)


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_packing_keeps_every_integer(count: int) -> None:
    integers = torch.randint(-8, 8, (5, count), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    packed = pack(integers)
    assert packed.dtype == torch.uint8 and packed.shape == (5, (count + 1) // 2)
    assert torch.equal(unpack(packed, count), integers)
    assert int(packed[0, 0]) & 15 == int(integers[0, 0]) % 16


def test_extreme_integers() -> None:
    for bits, low, high in ((4, -8, 7), (8, -128, 127)):
        layer = WeightOnlyLinear((2, 5), False, bits, 3, False)
        integers = torch.tensor([[low] * 5, [high] * 5], dtype=torch.int8)
        scale, zero = torch.tensor([[0.5, 2.0], [0.25, 1.0]]), torch.tensor([[low, high], [high, low]])
        layer.fill(integers, scale, zero, None)
        expected = torch.tensor([[0.0] * 3 + [(low - high) * 2.0] * 2, [0.0] * 3 + [float(high - low)] * 2])
        assert torch.equal(layer.floats(), expected)
        assert torch.equal(layer(torch.eye(5)), expected.T)


def test_an_embedding_expands_what_it_reads() -> None:
    layer = WeightOnlyEmbedding((9, 6), False, 4, 2, False)
    generator = torch.Generator().manual_seed(5)
    layer.fill(torch.randint(-8, 8, (9, 6), generator=generator), torch.rand(9, 3, generator=generator),
               torch.randint(-8, 8, (9, 3), generator=generator), None)
    x = torch.tensor([[0, 8, 3], [3, 3, 1]])
    assert torch.equal(layer(x), F.embedding(x, layer.floats()))


def test_saved_small_and_loaded_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256)).eval(), torch.randn(3, 512)
    sizes = {}
    for name, body in (("int4", "weight_bits = 4 bits, granularity = per_group(64)"), ("int8", "symmetric = true")):
        _, small = quantized(body, model, x)
        small(x)
        fxcompress.save(small, tmp_path / name)
        for other in (fxcompress.load(tmp_path / name), copy.deepcopy(small)):
            assert torch.equal(other(x), small(x))
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name).rglob("*")
                          if file.is_file() and not file.is_symlink())
    floats = 4 * sum(p.numel() for p in model.parameters())
    assert floats / 8 < sizes["int4"] < 0.16 * floats and floats / 4 < sizes["int8"] < 0.27 * floats


def test_masked_weights_stay_zero_and_the_plan_knows_the_bytes() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)).eval(), torch.randn(2, 64)
    result = fxcompress.compile("policy p { mask linear { sparsity = 50% }\n quantize linear { mode = weight_only, "
                                "weight_bits = 4 bits, granularity = per_group(32) } }", model, x)
    small = result.finalize(target="cpu")
    layer = small.get_submodule("0")
    assert isinstance(layer, WeightOnlyLinear)
    assert float((layer.floats() == 0).double().mean()) >= 0.5
    held = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    assert held == 64 * 32 + 128 * 5


def test_gradients_reach_the_weights() -> None:
    torch.manual_seed(0)
    result = fxcompress.compile("policy p { quantize linear { mode = weight_only, weight_bits = 3 bits, "
                                "granularity = per_group(4) } }", nn.Sequential(nn.Linear(10, 3)), torch.randn(2, 10))
    result.module(torch.randn(2, 10)).sum().backward()
    gradient = result.module.get_parameter("0.weight").grad
    assert gradient is not None and bool((gradient != 0).all())


def test_what_has_no_integers_is_told() -> None:
    x = torch.randn(2, 1, 8, 8)
    conv = fxcompress.compile("policy p { quantize conv2d { mode = weight_only, weight_bits = 5 bits } }",
                              nn.Sequential(nn.Conv2d(1, 2, 3, padding="same")), x).finalize(target="cpu")
    assert isinstance(conv.get_submodule("0"), WeightOnlyConv2d) and conv(x).shape == (2, 2, 8, 8)
    with pytest.raises(PlanError) as error:
        fxcompress.compile("policy p { quantize embedding }", nn.Sequential(nn.Embedding(4, 4)),
                           torch.zeros(2, dtype=torch.int64))
    assert error.value.diagnostics[0].code == "FXC0370" and "embedding" in str(error.value.diagnostics[0].notes)
