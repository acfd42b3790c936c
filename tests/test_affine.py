"""Affine quantization against torch's own quantized tensors, bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress import dequantize, quantize_tensor
from fxcompress.nn.affine import INT_TYPES

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
DTYPES = {"quint8": torch.quint8, "qint8": torch.qint8, "qint32": torch.qint32}


def theirs(x: Tensor, scale: float, zero: int, name: str) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to take these away
        found = torch.quantize_per_tensor(x, scale, zero, DTYPES[name])
        return found.int_repr(), found.dequantize()


@given(st.data())
def test_per_tensor_as_torch(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(DTYPES)))
    kind = INT_TYPES[name]
    zero = data.draw(st.integers(max(kind.low, -1000), min(kind.high, 1000)))
    scale = data.draw(st.floats(2**-20, 2**13, width=32))
    spread = data.draw(st.sampled_from([0.5, 10.0, 300.0, 1e5, 1e8]))
    size = data.draw(st.sampled_from([1, 3, 8, 33, 257]))
    x = torch.randn(size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))) * spread * scale
    halves = (torch.arange(size) - size // 2 + 0.5) * scale
    for values in (x, halves, torch.zeros(size), (x / scale).clamp(-1, 1) * 2**30 * scale):
        integers, back = theirs(values, scale, zero, name)
        ours = quantize_tensor(values, scale, zero, DTYPES[name])
        assert ours.dtype == integers.dtype and torch.equal(ours, integers)
        assert torch.equal(dequantize(ours, scale, zero), back)
        assert torch.equal(ours, quantize_tensor(values, scale, zero, name))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_as_torch(name: str, axis: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 7, 9) * 20
    count = x.shape[axis]
    scale = torch.rand(count) + 0.01
    zero = torch.randint(0, 100, (count,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.quantize_per_channel(x, scale, zero, axis % 3, DTYPES[name])
        integers, back = found.int_repr(), found.dequantize()
    ours = quantize_tensor(x, scale, zero, DTYPES[name], axis)
    assert torch.equal(ours, integers)
    assert torch.equal(dequantize(ours, scale, zero, axis), back)


def test_half_precision_and_layouts() -> None:
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    assert torch.equal(quantize_tensor(x.half(), 0.1, 3, "qint8"), quantize_tensor(x.half().float(), 0.1, 3, "qint8"))
    assert torch.equal(quantize_tensor(x, 0.1, 3, "qint8"), quantize_tensor(x.contiguous(), 0.1, 3, "qint8"))


def test_saturates_where_torch_wraps() -> None:
    x = torch.tensor([1e12, -1e12, float("inf"), -float("inf")])
    assert quantize_tensor(x, 0.1, 200, "quint8").tolist() == [255, 0, 255, 0]
    assert quantize_tensor(x, 0.1, 5, "qint32").tolist() == [2**31 - 1, -(2**31), 2**31 - 1, -(2**31)]


@pytest.mark.parametrize(("change", "words"), [
    ({"scale": 0.0}, "above zero"), ({"scale": -1.0}, "above zero"), ({"scale": float("nan")}, "above zero"),
    ({"scale": 1e-60}, "above zero"), ({"zero_point": 300}, "between 0 and 255"), ({"dtype": "int3"}, "quint8, qint8"),
    ({"x": torch.tensor([float("nan")])}, "NaN"), ({"scale": torch.ones(2)}, "single numbers"),
    ({"scale": torch.ones(2), "axis": 0}, "3 indices, but 2 scales"), ({"axis": 1}, "axis 1")])
def test_refusals(change: dict[str, object], words: str) -> None:
    good: dict[str, object] = {"x": torch.ones(3), "scale": 0.1, "zero_point": 0, "dtype": "quint8"}
    with pytest.raises(ValueError, match=words):
        quantize_tensor(**{**good, **change})  # type: ignore[arg-type]


def test_only_integers_are_dequantized() -> None:
    with pytest.raises(ValueError, match="integers was expected"):
        dequantize(torch.ones(2), 0.1, 0)
