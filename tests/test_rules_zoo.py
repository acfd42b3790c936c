"""Forms of operators that models of torchvision and timm hold, each removed from and compared with its original."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcompress.backends.artifact import from_files, to_files
from fxcompress.diagnostics import PlanError
from fxcompress.graph.apply import carry_out
from fxcompress.graph.capture import capture
from fxcompress.graph.captured import Captured
from fxcompress.graph.site import Outcome, Site
from fxcompress.nn import Reorder
from fxcompress.passes.remove import Remove


def removed(model: nn.Module, x: Tensor, **settings: object) -> tuple[Captured, Outcome]:
    """Half of all channels removed from `model`, proven, and run at another batch size."""
    captured = capture(model.eval(), x)
    nodes = tuple(node for node in captured.graph.nodes if node.op != "output")
    outcome = carry_out(captured, Remove(ratio=0.5, **settings), Site(nodes, "channels"))  # type: ignore[arg-type]
    assert any(note.startswith("proven equal") for note in outcome.notes), outcome.notes
    assert captured.module(torch.cat([x, x, x])).shape == model(torch.cat([x, x, x])).shape
    return captured, outcome


class _Heads(nn.Module):
    """Attention over positions whose heads are merged with the batch, by a size computed from it (as in BoTNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.table, self.out = nn.Conv2d(6, 3 * 32, 1), nn.Parameter(torch.randn(5, 8)), nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        q, k, v = (part.reshape(batch * 4, 8, -1).transpose(1, 2) for part in self.qkv(x).split([32, 32, 32], dim=1))
        heads = q.shape[0]
        places = q.reshape(heads, height, width, -1) @ self.table.t()
        scores = q @ k.transpose(1, 2) + places.mean(-1).reshape(heads, 1, height * width)
        mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, 32, height, width))


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_merged_with_a_computed_batch(batch: int) -> None:
    torch.manual_seed(0)
    model = _Heads()
    thin, _ = removed(model, torch.randn(batch, 6, 4, 4))
    assert thin.module.get_parameter("qkv.weight").shape == (48, 6, 1, 1)
    assert thin.module.get_parameter("table").shape == (5, 8)


class _Standardised(nn.Module):
    """A convolution whose weight is standardised by a batch norm over all it reads (as in NFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.last, self.head = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.batch_norm(self.second.weight.reshape(1, 6, -1), None, None, training=True)
        x = nn.functional.conv2d(self.first(x).relu(), weight.reshape_as(self.second.weight), self.second.bias)
        return self.head(self.last(x).relu())


def test_statistics_of_a_weight_make_what_it_reads_inexact() -> None:
    torch.manual_seed(0)
    thin, outcome = removed(_Standardised(), torch.randn(2, 3, 8, 8))
    assert any(note.startswith("inexact: batchnorm") and note.endswith("concerns first") for note in outcome.notes)
    assert thin.module.get_parameter("second.weight").shape == (3, 4, 3, 3)


class _Stacked(nn.Module):
    """A mean of stacked vectors by a convolution of one tap over their channels (as the class tokens of CoaT)."""

    def __init__(self, taps: int, mode: str = "zeros") -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 8) for _ in range(3)])
        self.mix, self.head = nn.Conv1d(3, 1, taps, padding="same", padding_mode=mode), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.stack([part(x) for part in self.parts], dim=1)).squeeze(1).relu())


def test_one_tap_leaves_what_it_slides_over_free() -> None:
    torch.manual_seed(0)
    thin, _ = removed(_Stacked(1), torch.randn(2, 6))
    assert [tuple(thin.module.get_parameter(f"{name}.weight").shape) for name in ("parts.0", "parts.2", "head")] == [
        (4, 6), (4, 6), (4, 4)]
    with pytest.raises(PlanError, match="slides over it"):
        removed(_Stacked(3, "circular"), torch.randn(2, 6))


class _EfficientAttention(nn.Module):
    """A gate for each channel by a convolution over the means of its neighbours (Wang et al., "ECA-Net", 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.mix = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.head = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate = self.mix(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
        return self.head(self.last(x * gate.view(x.shape[0], -1, 1, 1).expand_as(x)))


def test_taps_over_channels_make_their_removal_inexact() -> None:
    torch.manual_seed(0)
    model, x = _EfficientAttention(), torch.randn(2, 3, 8, 8)
    thin, outcome = removed(model, x)
    assert sum("conv1d" in note and "slides over it; it concerns first" in note for note in outcome.notes) == 1
    rows = model.first.weight.detach().flatten(1).norm(dim=1).topk(4).indices.sort().values
    small = _EfficientAttention()
    small.first, small.last, small.head[0], small.head[2] = (
        thin.module.get_submodule(name) for name in ("first", "last", "head.0", "head.2"))
    small.mix = model.mix
    assert torch.equal(small.first.weight, model.first.weight[rows])
    torch.testing.assert_close(thin.module(x), small(x))


class _Positions(nn.Module):
    """A depthwise convolution of values whose channels are heads, beside their queries (as in CoaT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 32), nn.Linear(32, 5)
        self.conv = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        image = self.conv(v.transpose(-1, -2).reshape(batch, 32, 3, 3)).reshape(batch, 4, 8, length).transpose(-1, -2)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v + q * image
        return self.out(mixed.transpose(1, 2).reshape(batch, length, 32))


def test_heads_stay_heads_behind_a_depthwise_convolution() -> None:
    torch.manual_seed(0)
    thin, _ = removed(_Positions(), torch.randn(2, 9, 6))
    shapes = [tuple(thin.module.get_parameter(f"{name}.weight").shape) for name in ("qkv", "conv", "out")]
    assert shapes == [(48, 6), (16, 1, 3, 3), (5, 16)]


class _InPlace(nn.Module):
    """A dropout that works in place (as before the classifiers of MobileNetV3 and EfficientNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(1.0, inplace=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x)))


def test_modules_that_work_in_place_no_longer_do() -> None:
    torch.manual_seed(0)
    model, x = _InPlace(), torch.randn(2, 6)
    captured = capture(model.eval(), x)
    torch.testing.assert_close(captured.module(x), model(x))
    torch.testing.assert_close(captured.module.train()(x), model.train()(x))
    assert not captured.module.get_submodule("drop").inplace
    assert model.drop.inplace
    removed(model, x)


class _Shuffled(nn.Module):
    """Two groups of channels, interleaved (as in ShuffleNet), by one of the ways to write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        if self.way == "view":
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        elif self.way == "unflatten":
            x = x.unflatten(1, (2, -1)).permute(0, 2, 1, 3, 4).flatten(1, 2)
        else:
            x = nn.functional.channel_shuffle(x, 2)
        return self.last(x)


@pytest.mark.parametrize("way", ["view", "unflatten", "function"])
@pytest.mark.parametrize(("strong", "regular"), [([0, 3, 4, 7], True), ([0, 1, 2, 5], False)])
def test_a_channel_shuffle_ties_no_channels(way: str, strong: list[int], regular: bool) -> None:
    torch.manual_seed(0)
    model, x = _Shuffled(way), torch.randn(2, 3, 4, 4)
    model.first.weight.data[strong] *= 100
    thin, _ = removed(model, x)
    assert torch.equal(thin.module.get_parameter("first.weight"), model.first.weight[strong])
    order = nn.functional.channel_shuffle(torch.arange(8.0).reshape(1, 8, 1, 1), 2).flatten().long().tolist()
    columns = [place for place, channel in enumerate(order) if channel in strong]
    assert torch.equal(thin.module.get_parameter("last.weight"), model.last.weight[:, columns])
    moved = [m.order for m in thin.module.modules() if isinstance(m, Reorder)]
    assert moved == ([] if regular else [tuple(strong.index(order[place]) for place in columns)])
    loaded = from_files(to_files(thin.module), torch.device("cpu"))
    torch.testing.assert_close(loaded(x), thin.module(x), rtol=0, atol=0)
    assert list(thin.module.state_dict()) == list(model.state_dict())
