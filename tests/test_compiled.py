"""Finished models traced: compiled by Inductor and exported by torch, equal to what they compute by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress


class Net(nn.Module):
    """Pooling, a residual sum, one whose addend is read again, a shuffle of two groups, a depthwise convolution and a
    linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.deep = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = F.relu(self.body(x) + x)
        n, c, h, w = x.shape
        y = torch.cat([x, F.relu(self.body(x) + x)], 1).view(n, 2, c, h, w).transpose(1, 2).reshape(n, 2 * c, h, w)
        return self.head(F.relu6(self.deep(y)).mean((2, 3)))


@pytest.fixture(scope="module", params=["policy p { quantize conv2d | linear }", "policy p { }"])
def finished(request: pytest.FixtureRequest) -> tuple[fxcompress.Result, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 12, 12)
    model(x)
    return fxcompress.compile(request.param, model.eval(), x, calibration=[x]), x


def test_compiled(finished: tuple[fxcompress.Result, Tensor]) -> None:
    result, x = finished
    plain, compiled = result.finalize(target="cpu"), result.finalize(target="cpu", compile=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    if "quantize" not in result.policy.source.text:
        return  # one model is compiled here: it takes long
    for batch in (x, x[:1], x.to(memory_format=torch.channels_last)):  # another size or order compiles anew, frozen
        made, expected = compiled(batch), plain(batch).detach()
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(x=batch), made)
        assert not made.requires_grad and torch.allclose(made, expected, atol=2e-2 * float(expected.abs().max()))
    with torch.inference_mode():  # is compiled anew too, with frozen weights
        assert torch.allclose(compiled(x), plain(x), atol=2e-2 * float(expected.abs().max()))
    assert torch.equal(copy.deepcopy(compiled)(x), plain(x))  # a copy isn't compiled


def test_exported(finished: tuple[fxcompress.Result, Tensor]) -> None:
    result, x = finished
    plain = result.finalize(target="cpu", pack=True)
    made = torch.export.export(plain, (x,)).module()(x)
    assert torch.allclose(made, plain(x), atol=2e-2 * float(made.detach().abs().max()))
