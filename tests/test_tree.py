"""Copies of models, beside those of `copy.deepcopy`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from fxcompress.graph import capture
from fxcompress.graph.tree import clone_model, own


class Odd(nn.Module):
    """Attributes of all sorts, and tensors that occur several times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(40, 40), nn.BatchNorm1d(40)
        self.again, self.by_name = self.first, {"norm": self.norm, "sizes": [1, 2], 3: (4, [5])}
        self.rows = OrderedDict(a=1.5)
        self.tied = nn.Linear(40, 40)
        self.tied.weight = self.first.weight
        self.recurrent, self.attention = nn.LSTM(40, 40), nn.MultiheadAttention(40, 2)
        self.part = self.first.weight[:2]  # hangs in an autograd graph
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(40, 40))
        self.first.bias.requires_grad_(False)
        self.register_buffer("kept", torch.arange(3.0), persistent=False)
        self.norm.register_forward_hook(watch)

    def forward(self, x: Tensor) -> Any:
        y = self.normed(self.norm(self.tied(self.first(x)))) @ self.part.t()
        return y, self.recurrent(x)[0], self.attention(x, x, x)[0], self.kept


def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


class ByHand(nn.Linear):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ByHand:
        made = ByHand(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        made.label = "copied"  # type: ignore[assignment]
        return made


def test_a_copy_is_that_of_deepcopy() -> None:
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(4, 40)
    with torch.no_grad():
        expected = model(x)
    made = clone_model(model, own)
    with torch.no_grad():
        for one, two in zip(made(x), expected, strict=True):
            assert torch.equal(one, two)
    assert isinstance(made, Odd) and made.again is made.first and made.by_name["norm"] is made.norm
    assert made.tied.weight is made.first.weight and made.first.weight.requires_grad
    assert not made.first.bias.requires_grad
    assert made.by_name["sizes"] == [1, 2] and made.by_name["sizes"] is not model.by_name["sizes"]
    assert made.by_name[3] == (4, [5]) and made.by_name[3][1] is not model.by_name[3][1] and made.rows == model.rows
    assert [*made.state_dict()] == [*model.state_dict()] and not made.norm.training
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert not held & {id(tensor) for tensor in (*made.parameters(), *made.buffers())}
    assert not {id(module) for module in model.modules()} & {id(module) for module in made.modules()}
    assert all(weight is dict(made.recurrent.named_parameters())[name]
               for name, weight in zip(made.recurrent._flat_weights_names, made.recurrent._flat_weights, strict=True))


def test_every_attribute_of_torchvision_s_models_is_copied() -> None:
    for name in ("mobilenet_v3_small", "swin_t", "densenet121"):
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        made, expected = clone_model(model, torch.empty_like), copy.deepcopy(model)
        for one, two in zip(made.modules(), expected.modules(), strict=True):
            assert type(one) is type(two) and one.__dict__.keys() == two.__dict__.keys()
            assert one.extra_repr() == two.extra_repr() and one.training == two.training


def test_a_class_that_copies_itself_is_asked() -> None:
    made = clone_model(nn.Sequential(ByHand(40, 40)), own)
    assert made[0].label == "copied"  # type: ignore[index]


def test_a_write_to_one_is_not_seen_by_the_other() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = copy.deepcopy(model.state_dict())
    captured = capture(model, torch.zeros(2, 64))
    optimizer = torch.optim.Adam(captured.module.parameters())
    captured.module(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    captured.module.state_dict()["1.bias"].numpy()[0] = 7.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trained = copy.deepcopy(captured.module.state_dict())
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.numpy()[:] = 0.0
    assert all(torch.equal(tensor, trained[name]) for name, tensor in captured.module.state_dict().items())
    other = captured.copy()
    with torch.no_grad():
        other.module.get_parameter("0.weight").fill_(3.0)
    assert torch.equal(captured.module.state_dict()["0.weight"], trained["0.weight"])


@pytest.mark.parametrize("make", [
    lambda path: torch.from_numpy(np.ones(4096, dtype=np.float32)), lambda path: torch.ones(4096).share_memory_(),
    lambda path: torch.from_file(str(path), shared=True, size=4096), lambda path: torch.ones(8192)[4096:],
    lambda path: torch.ones(64, 64).t(), lambda path: torch.ones(()), lambda path: torch.ones(4096).to_sparse(),
], ids=["numpy", "shared", "file", "part", "transposed", "scalar", "sparse"])
def test_memory_of_all_sorts(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    np.ones(4096, dtype=np.float32).tofile(path)
    tensor = make(path)
    made = own(tensor)
    assert made.layout == tensor.layout and made.shape == tensor.shape
    if tensor.layout == torch.strided:
        assert made.stride() == tensor.stride()
        tensor.zero_()
        assert (made == 1).all()
