"""Weights as edges: every kind becomes a function and its module again, without a change to what is computed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import FxcError
from fxcompress.graph import Captured, capture
from fxcompress.graph.ops import kind_of, path_of
from fxcompress.nn import Mask as MaskModule
from fxcompress.passes import Mask
from fxcompress.passes.shared.masking import remove_masks
from fxcompress.passes.shared.units import Blocks, Columns, Groups, Layout, Rows, Units
from fxcompress.passes.shared.weights import absorb, expose

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 1), padding="same", dilation=2, bias=False), (2, 4, 8, 8)),
    "conv3d": (nn.Conv3d(4, 8, 2, groups=2), (2, 4, 4, 4, 4)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 8, 8)),
    "circular": (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 8)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 2, 2, dilation=2), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(5, 7), (2, 3, 5)),
    "embedding": (nn.Embedding(9, 4, padding_idx=0), (2, 3)),
}


def example(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = LAYERS[name][1]
    if name == "embedding":
        return torch.randint(0, 9, size, generator=generator)
    return torch.randn(size, generator=generator)


def captured(name: str) -> Captured:
    return capture(nn.Sequential(copy.deepcopy(LAYERS[name][0])).eval(), (example(name),))


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_becomes_a_function_and_a_module_again(name: str) -> None:
    model = captured(name)
    node = model.node("0")
    layer, kind, settings = LAYERS[name][0], kind_of(model.node("0")), repr(model.module.get_submodule("0"))
    wanted, shape = layer(example(name)), [(n.op, n.target) for n in model.graph.nodes]
    weight = expose(model, node)
    model.refresh()
    assert (weight.op, weight.target, node.op, kind_of(node), path_of(node)) == (
        "get_attr", "0.weight", "call_function", kind, "0")
    assert torch.equal(model.module(example(name)), wanted)
    assert absorb(model, node)
    model.refresh()
    assert [(n.op, n.target) for n in model.graph.nodes] == shape
    assert repr(model.module.get_submodule("0")) == settings
    assert torch.equal(model.module(example(name)), wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_is_masked_and_folded(name: str) -> None:
    model = captured(name)
    masked = Mask(sparsity=0.5).apply(model, "*")
    mask = next(child.mask for child in masked.module.modules() if isinstance(child, MaskModule))
    reference = copy.deepcopy(LAYERS[name][0])
    with torch.no_grad():
        reference.weight.mul_(mask)
    assert int((~mask).sum()) == round(mask.numel() / 2)
    assert torch.equal(masked.module(example(name)), reference(example(name)))
    remove_masks(masked, fold=True)
    masked.refresh()
    assert torch.equal(masked.module(example(name)), reference(example(name)))
    assert list(masked.module.state_dict()) == list(model.module.state_dict())


def test_a_function_on_a_parameter_is_masked_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.kernel)

    model, x = Functional(), torch.randn(3, 4)
    masked = Mask(sparsity=0.25).apply(capture(model, (x,)), "linear")
    mask = masked.module.kernel_mask.mask
    assert torch.equal(masked.module(x), F.linear(x, model.kernel * mask))
    remove_masks(masked, fold=True)
    masked.refresh()
    assert list(masked.module.state_dict()) == ["kernel"]
    assert torch.equal(masked.module(x), F.linear(x, model.kernel * mask))


class Shared(nn.Module):
    """An LSTM reads the very tensor that a linear layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 16)
        self.fc.weight = self.rnn.weight_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a + self.b)


@pytest.mark.parametrize(("model", "inputs", "words"), [
    (Shared(), torch.randn(2, 3, 4), "`rnn` uses the same tensor, and a lstm"),
    (Computed(), torch.randn(3, 4), "its weight is computed in the model"),
    (nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)), torch.zeros(2, 3, dtype=torch.long), "`max_norm`"),
])
def test_what_cannot_be_masked_says_why(model: nn.Module, inputs: Tensor, words: str) -> None:
    with pytest.raises(FxcError) as caught:
        Mask(sparsity=0.5).apply(capture(model, (inputs,)), "linear | embedding" if words[:2] != "`m" else "embedding")
    found = caught.value.diagnostics[0]
    assert found.code == "FXC0510" and words in found.message and found.help


@pytest.mark.parametrize(("shape", "layout"), [
    ((6, 4), Layout()), ((6, 4, 3, 3), Layout()), ((4, 6, 3), Layout(transposed=True)),
    ((8, 3, 2, 2), Layout(transposed=True, groups=4)), ((5,), Layout()),
])
def test_cubes_and_back(shape: tuple[int, ...], layout: Layout) -> None:
    weight = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    cube = layout.cube(weight)
    assert cube.shape == layout.cube_shape(shape)
    assert torch.equal(layout.uncube(cube, shape), weight)


@pytest.mark.parametrize("units", [Units(), Rows(), Columns(), Blocks(3, 2), Groups(1, 2), Groups(2, 4)])
def test_units_cover_every_weight_once(units: Units) -> None:
    cube = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(0))
    assert units.misfit((6, 4, 3)) is None
    count = units.count(cube.shape)
    hidden = torch.zeros(cube.shape)
    for unit in range(count):
        drop = torch.zeros(count, dtype=torch.bool)
        drop[unit] = True
        keep = units.keep(drop, cube)
        hidden += ~keep
        assert int((~keep).sum()) == round(units.size(cube.shape) * units.share)
        assert units.hidden(keep)[unit]
    assert hidden.max() == 1 and hidden.sum() == round(cube.numel() * units.share)


def test_movement_is_collected_across_a_removal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    result = fxcompress.compile("""policy p {
        phase look over steps 0..4 { mask linear { sparsity = linear(0% -> 50%), by = movement, every = 2 steps } }
        phase thin over steps 2..3 { remove channels(linear[name == "0"]) { ratio = 50% } }
    }""", model, (torch.randn(4, 6),))
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.1, momentum=0.9))
    for _ in range(5):
        optimizer.zero_grad()
        result.module(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        result.step()
    masks = {name: child for name, child in result.module.named_modules() if isinstance(child, MaskModule)}
    assert {name: tuple(mask.mask.shape) for name, mask in masks.items()} == {
        "0.weight_mask": (4, 6), "2.weight_mask": (3, 4)}
    assert all(mask.evidence is not None and mask.evidence.shape == mask.mask.shape for mask in masks.values())
    assert result.done and all(mask.masked() == mask.mask.numel() // 2 for mask in masks.values())
