"""`slices = coupled` of `remove`, against its formula written out in torch on the weights of small networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from remove_check import captured_of, makers, wake
from remove_nets import NETS, Net, conv, picture, tokens
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import FxcError
from fxcompress.graph.captured import Captured
from fxcompress.graph.coupling import analyse
from fxcompress.graph.site import Site
from fxcompress.passbase import CRITERIA
from fxcompress.passes import Mask, Remove, register_criterion
from fxcompress.passes.shared.layers import layers_of, mask_of
from fxcompress.passes.shared.removal_scores import scores_of

Slices = list[tuple[Tensor, Tensor]]  # (channels, rest) of weights, and of their gradients

FORMULA = {
    "l1": lambda w, g: w.abs().sum(1),
    "l2": lambda w, g: w.square().sum(1).sqrt(),
    "taylor": lambda w, g: (w * g).abs().sum(1),
    "hessian": lambda w, g: (w * g).square().sum(1) / 2,
    "lamp": lambda w, g: torch.stack([row / (e := w.square().sum(1))[e >= row].sum() for row in w.square().sum(1)]),
}
OVER = {"mean": lambda each: each.mean(0), "sum": lambda each: each.sum(0), "max": lambda each: each.amax(0)}


def scores_by(by: str, how: str, slices: Slices) -> Tensor:
    """What each channel scores: every slice over its mean, then all of them reduced."""
    each = [FORMULA[by](w.double(), g.double()) for w, g in slices]
    return OVER[how](torch.stack([score / score.mean() for score in each]))


def made(weight: nn.Parameter) -> tuple[Tensor, Tensor]:
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return weight.detach().reshape(len(weight), -1), grad.reshape(len(weight), -1)


def read(weight: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Slices along the input dimension."""
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return weight.detach().transpose(0, 1).flatten(1), grad.transpose(0, 1).flatten(1)


def scale(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return made(norm.weight)


def differentiated(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    out = model(*inputs)
    (out[0] if isinstance(out, tuple) else out).mul(torch.linspace(-1, 2, 5)).square().sum().backward()
    return model


def shown(captured: Captured, name: str, dim: int = 0, what: str = "channels", **settings: object) -> Tensor:
    """The scores that the pass gives the indices of a tensor."""
    coupling = analyse(captured, "heads")
    layers = layers_of(coupling, makers(captured))
    candidates = mask_of(layers, coupling.count) & ~coupling.barred
    scores = scores_of(Remove(ratio=0.5, slices="coupled", **settings), coupling, layers, candidates)
    return torch.from_numpy(scores[coupling.of(coupling.flow.tensor(name)[dim])])


def close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-6, atol=1e-9)


def plain() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m, x):
        return m.fc(F.relu(m.b(F.relu(m.bn(m.a(x))))).flatten(1))

    return wake(Net(run, a=conv(3, 8), bn=nn.BatchNorm2d(8), b=conv(8, 6), fc=nn.Linear(6 * 64, 5))), picture()


@pytest.mark.parametrize("how", list(OVER))
@pytest.mark.parametrize("by", list(FORMULA))
def test_convolutions_with_a_norm_and_a_linear_layer_behind_a_flatten(by: str, how: str) -> None:
    model, inputs = plain()
    model = differentiated(model, inputs)
    captured = captured_of(model, inputs)
    # 64 columns of the linear layer are one channel: (out, channel, place) -> (channel, out · place)
    flat = tuple(t.reshape(5, 6, 64).transpose(0, 1).reshape(6, -1)
                 for t in (model.fc.weight.detach(), model.fc.weight.grad))
    slices = {"a": [made(model.a.weight), scale(model.bn), read(model.b.weight)],
              "b": [made(model.b.weight), flat]}
    differentiate(captured, model)
    for name, group in slices.items():
        assert close(shown(captured, f"{name}.weight", by=by, reduce=how), scores_by(by, how, group))


def differentiate(captured: Captured, model: nn.Module) -> None:
    for name, parameter in captured.module.named_parameters():
        parameter.grad = model.get_parameter(name).grad


@pytest.mark.parametrize("by", ["l2", "taylor"])
def test_a_residual_stream_counts_all_that_write_and_read_it(by: str) -> None:
    torch.manual_seed(3)
    model, inputs = NETS["residual"]()
    model = differentiated(wake(model), inputs)
    captured = captured_of(model, inputs)
    differentiate(captured, model)
    stream = [made(model.a.weight), made(model.c.weight), read(model.b.weight), read(model.fc.weight)]
    assert close(shown(captured, "a.weight", by=by), scores_by(by, "mean", stream))
    assert close(shown(captured, "b.weight", by=by), scores_by(by, "mean", [made(model.b.weight),
                                                                           read(model.c.weight)]))


def test_depthwise_filters_and_the_columns_of_every_group_count() -> None:
    def run(m, x):
        return m.fc(m.g(F.relu(m.dw(m.a(x)))).mean((2, 3)))

    model = wake(Net(run, a=conv(3, 8), dw=conv(8, 8, groups=8), g=conv(8, 12, groups=2), fc=nn.Linear(12, 5)))
    captured = captured_of(model, picture())
    # the same offset leaves both groups of four, and both lose that column in all their six filters
    offsets = [tuple(t.reshape(2, 4, -1).transpose(0, 1).reshape(4, -1) for t in made(layer.weight))
               for layer in (model.a, model.dw)]
    wanted = scores_by("l1", "mean", [*offsets, read(model.g.weight)])
    assert close(shown(captured, "g.weight", dim=1, by="l1"), wanted)


def test_whole_groups_of_a_transposed_convolution_count() -> None:
    def run(m, x):
        return m.fc(F.relu(m.t(m.a(x))).mean((2, 3)))

    model = wake(Net(run, a=conv(3, 8), t=nn.ConvTranspose2d(8, 12, 3, groups=4), fc=nn.Linear(12, 5)))
    captured = captured_of(model, picture())
    pairs, triples = [tuple(t.reshape(4, -1) for t in made(layer.weight)) for layer in (model.a, model.t)], [
        tuple(t.reshape(4, -1) for t in read(model.fc.weight))]  # what two channels make, three of the next are of
    found = shown(captured, "a.weight", by="l2")
    assert close(found, scores_by("l2", "mean", [*pairs, *triples]).repeat_interleave(2))


def test_masked_functional_and_raw_weights_count_as_they_are_computed_with() -> None:
    def run(m, x):
        return (F.relu(m.a(x)) @ m.w) + F.linear(F.relu(m.a(x)), m.v)

    torch.manual_seed(0)
    net = Net(run, a=nn.Linear(16, 12), w=nn.Parameter(torch.randn(12, 5)), v=nn.Parameter(torch.randn(5, 12))).eval()
    captured = captured_of(net, tokens())
    slices = [made(net.a.weight), made(net.w), read(net.v)]
    assert close(shown(captured, "a.weight", by="l2"), scores_by("l2", "mean", slices))

    model = wake(Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(16, 12), b=nn.Linear(12, 5)))
    masked = Mask(sparsity=0.6).apply(captured_of(model, tokens()), '"b"')
    seen = nn.Parameter(masked.module.get_parameter("b.weight") * masked.module.get_submodule("b.weight_mask").mask)
    assert float((seen == 0).float().mean()) > 0.5
    assert close(shown(masked, "a.weight", by="l2"), scores_by("l2", "mean", [made(model.a.weight), read(seen)]))


def test_recurrent_layers_and_attention_are_read_where_they_take_channels_in() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 8)
            self.attend, self.lstm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 6, batch_first=True)
            self.out, self.other = nn.Linear(6, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.out(self.lstm(x)[0]) + self.other(self.attend(x, x, x, need_weights=False)[0])

    model = wake(Reader())
    captured = captured_of(model, (torch.randn(2, 7, 5),))
    width = [made(model.a.weight), read(model.lstm.weight_ih_l0), read(model.attend.in_proj_weight)]
    assert close(shown(captured, "a.weight", by="l2"), scores_by("l2", "mean", width))
    gates = [tuple(t.reshape(4, 6, -1).transpose(0, 1).reshape(6, -1) for t in made(w))
             for w in (model.lstm.weight_ih_l0, model.lstm.weight_hh_l0)]
    state = [*gates, read(model.lstm.weight_hh_l0), read(model.out.weight)]
    assert close(shown(captured, "out.weight", dim=1, by="l2"), scores_by("l2", "mean", state))
    rows = model.attend.in_proj_weight.detach().reshape(3, 2, -1).transpose(0, 1).reshape(2, -1)
    columns = model.attend.out_proj.weight.detach().reshape(8, 2, 4).permute(1, 0, 2).reshape(2, -1)
    heads = scores_by("l2", "mean", [(rows, rows), (columns, columns)])
    assert close(shown(captured, "attend.out_proj.weight", dim=1, by="l2"), heads.repeat_interleave(4))


def test_a_policy_chooses_by_the_slices_of_the_readers() -> None:
    model, inputs = plain()
    with torch.no_grad():
        model.b.weight.mul_(torch.linspace(3, 0.1, 8)[None, :, None, None])
    slices = [made(model.a.weight), scale(model.bn), read(model.b.weight)]
    wanted = scores_by("l2", "mean", slices).topk(4).indices.sort().values
    alone = scores_by("l2", "mean", slices[:1]).topk(4).indices.sort().values
    assert not torch.equal(wanted, alone), "the slices would make no difference"
    policy = 'policy p {{ remove channels("a") {{ ratio = 50%{} }} }}'
    for words, kept in ((", slices = coupled", wanted), ("", alone), (", slices = made", alone)):
        result = fxcompress.compile(policy.format(words), model, inputs)
        assert torch.equal(result.module.get_parameter("a.weight"), model.a.weight[kept])


def test_ranked_together_no_group_weighs_more_than_another() -> None:
    model, inputs = plain()
    model = differentiated(model, inputs)
    kept = []
    for factor in (1.0, 1000.0):
        model.a.weight.grad.mul_(factor)
        captured = captured_of(model, inputs)
        differentiate(captured, model)
        thin = Remove(ratio=0.5, by="taylor", scope="global", slices="coupled").apply(captured, "conv2d", "channels")
        kept.append(thin.module.get_parameter("a.weight"))
    assert torch.equal(*kept) and 0 < len(kept[0]) < 8


# What has no score of a slice, and what is lacking


@pytest.fixture
def _own_criteria(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CRITERIA, "_added", dict(CRITERIA._added))


@pytest.mark.usefixtures("_own_criteria")
def test_a_registered_criterion_sees_the_readers() -> None:
    @register_criterion("largest")
    def largest(scoring):
        return scoring.reduce(scoring.weights, lambda part: part.rows.abs().amax(1))

    model, inputs = plain()
    each = [w.double().abs().amax(1) for w, _ in (made(model.a.weight), scale(model.bn), read(model.b.weight))]
    wanted = torch.stack([score / score.mean() for score in each]).mean(0)
    # where no index is there twice, the part's largest is the component's
    assert close(shown(captured_of(model, inputs), "a.weight", by="largest"), wanted)


@pytest.mark.parametrize("by", ["random", "bn_scale", "fpgm", "activation"])
def test_a_criterion_that_scores_no_slices_is_refused(by: str) -> None:
    model, inputs = plain()
    with pytest.raises(FxcError) as raised:
        Remove(ratio=0.5, by=by, slices="coupled").apply(captured_of(model, inputs), '"a"', "channels",
                                                         calibration=torch.randn(4, 3, 8, 8))
    assert raised.value.diagnostics[0].code == "FXC0348"


def test_a_reader_without_a_gradient_is_named() -> None:
    model, inputs = plain()
    model = differentiated(model, inputs)
    captured = captured_of(model, inputs)
    differentiate(captured, model)
    captured.module.get_parameter("fc.weight").grad = None
    with pytest.raises(FxcError) as raised:
        Remove(ratio=0.5, by="taylor", slices="coupled").rewrite(captured, Site(makers(captured)[:2], "channels"))
    (found,) = raised.value.diagnostics
    assert found.code == "FXC0343" and found.notes == ("without one: fc",)
