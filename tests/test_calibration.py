"""Calibration data, `by = activation` and `compensate`, beside torch's own hooks and models changed by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from remove_check import kept_indices, makers, wake
from torch import Tensor, nn

import fxcompress
from fxcompress import FxcError
from fxcompress.graph.calibration import Calibration, Moments
from fxcompress.graph.captured import Captured
from fxcompress.graph.site import Outcome, Site
from fxcompress.passes import Mask, Remove
from fxcompress.passes.shared.criteria import CRITERIA, Scoring
from fxcompress.spec_data import load_data


class Net(nn.Module):
    """Convolutions with norms, a residual add, a concatenation, a transposed convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(16, 12, 3, bias=False)
        self.t = nn.ConvTranspose2d(12, 6, 1)
        self.fc1, self.fc2 = nn.Linear(6 * 16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.na(self.a(x)))
        x = x + F.relu(self.nb(self.b(x)))
        x = F.silu(self.c(torch.cat([x, -x], 1)))
        return self.fc2(F.gelu(self.fc1(F.relu(self.t(x)).flatten(1))))


def images(count: int = 96, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def removed(captured: Captured, data: object, paths: tuple[str, ...] = (), what: str = "channels",
            **settings: object) -> tuple[Captured, Outcome]:
    """As `remove_check.remove`, with calibration data."""
    result = captured.copy()
    nodes = tuple(node for node in makers(result) if not paths or node.target in paths)
    batches = None if data is None else Calibration.of(data, result)
    outcome = Remove(**{"ratio": 0.5, **settings}).rewrite(result, Site(nodes, what, calibration=batches))
    return result, outcome


def with_means(model: nn.Module, kept: dict[str, dict[int, Tensor]], data: Tensor,
               zeros: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """The dense model, its readers' inputs replaced, on the indices that left, by their means over `data` (or zero):
    what compensation shall equal, by hooks of torch. Also the means, by layer."""
    means: dict[str, Tensor] = {}

    def look(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            dim = -1 if isinstance(module, nn.Linear) else 1
            means[name] = args[0].movedim(dim, 0).flatten(1).mean(1)
        return hook

    def put(name: str, gone: Tensor):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            dim = -1 if isinstance(module, nn.Linear) else 1
            value = args[0].movedim(dim, -1).clone()
            value[..., gone] = 0 if zeros else means[name][gone]
            return value.movedim(-1, dim)
        return hook

    dense = copy.deepcopy(model).eval()
    layers = {name: part for name, part in dense.named_modules()
              if isinstance(part, nn.Linear | nn.modules.conv._ConvNd)}
    hooks = [part.register_forward_pre_hook(look(name)) for name, part in layers.items()]
    with torch.no_grad():
        dense(data)
    for hook in hooks:
        hook.remove()
    for name, part in layers.items():
        along = 0 if isinstance(part, nn.ConvTranspose2d) else 1
        cut = kept.get(f"{name}.weight", {}).get(along)
        if cut is not None:
            gone = torch.ones(part.weight.shape[along], dtype=torch.bool)
            gone[cut] = False
            part.register_forward_pre_hook(put(name, gone))
    return dense, means


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.fixture
def net() -> nn.Module:
    return wake(Net())


@pytest.fixture
def captured(net: nn.Module) -> Captured:
    return fxcompress.capture(net, (images(2),))


# Moments


def test_moments_are_those_of_torch_over_unequal_batches(net: nn.Module, captured: Captured) -> None:
    data, seen = images(50), {}
    net.nb.register_forward_hook(lambda module, args, value: seen.update(value=value.detach().double()))
    net(data)
    node = captured.node("nb")
    found = Calibration.of([data[:7], data[7:30], data[30:]], captured).moments(captured, [(node, 1), (node, -1)])
    moments, last = found[node, 1], found[node, -1]
    for value, wanted in ((moments.mean, seen["value"]), (moments.magnitude, seen["value"].abs()),
                          (moments.square, seen["value"].square())):
        torch.testing.assert_close(value, wanted.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(last.mean, seen["value"].mean((0, 1, 2)), rtol=1e-6, atol=1e-7)
    assert moments.count == 50 * 36


def test_moments_of_half_precision_do_not_overflow() -> None:
    moments = Moments(0)
    moments.see(torch.full((2, 3), 1000.0, dtype=torch.float16))
    assert moments.square.tolist() == [1e6, 1e6] and moments.count == 3


def test_running_the_data_changes_nothing(captured: Captured) -> None:
    module = captured.module.train()
    module.get_submodule("na").eval()
    state = copy.deepcopy(module.state_dict())
    Calibration.of(images(), captured).moments(captured, [(captured.node("fc1"), 1)])
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.training and module.nb.training and not module.na.training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_only_what_is_watched_is_run_and_values_are_freed(captured: Captured) -> None:
    calls: list[str] = []
    for name in ("a", "b", "c", "fc1"):
        captured.module.get_submodule(name).register_forward_hook(
            lambda module, args, value, name=name: calls.append(name))
    Calibration.of([images(4)], captured).moments(captured, [(captured.node("b"), 1)])
    assert calls == ["a", "b"]


def test_every_form_of_batches_gives_the_same(captured: Captured) -> None:
    data, node = images(130), captured.node("b")
    loader = torch.utils.data.DataLoader(data, batch_size=33)
    name = next(iter(captured.graph.nodes)).name
    forms = [data, data.double(), [data], [(data,)], [{name: data}], {name: data}, iter(data.split(40)),
             (part for part in data.split(7)), loader]
    found = [Calibration.of(form, captured) for form in forms]
    means = [data.moments(captured, [(node, 1)])[node, 1].mean for data in found for _ in range(2)]
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("data", "words"), [
    ([], "are empty"),
    (iter(()), "are empty"),
    (torch.zeros(0, 3, 8, 8), "are empty"),
    (3, "are of the type int"),
    ([torch.zeros(4, 3, 9, 8)], "it is float32[4, 3, 9, 8]; the model was captured with float32[N, 3, 8, 8]"),
    ([torch.zeros(4, 3, 8, 8), torch.zeros(3, 8, 8)], "batch 2 of"),
    ([torch.zeros(4, 3, 8, 8, dtype=torch.uint8)], "uint8[4, 3, 8, 8]"),
    ([(torch.zeros(4, 3, 8, 8), torch.zeros(4))], "has 2 inputs, and the model takes 1 input"),
    ([{"labels": torch.zeros(4)}], "not an input: `labels`"),
    (["images"], "of the type str"),
])
def test_data_that_do_not_fit_are_told(captured: Captured, data: object, words: str) -> None:
    with pytest.raises(FxcError, match="FXC0570") as error:
        Calibration.of(data, captured)
    assert words in str(error.value) and "an iterable of batches" in str(error.value)


def test_what_the_model_or_the_numbers_refuse_is_told() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    captured = fxcompress.capture(model, (torch.zeros(2, 3, dtype=torch.long),))
    with pytest.raises(FxcError, match="fails on batch 1"):
        removed(captured, [torch.full((2, 3), 11)])
    with torch.no_grad():
        captured.module.get_parameter("1.bias")[0] = float("nan")
    with pytest.raises(FxcError, match="infinite values, or none that are numbers"):
        removed(captured, [torch.zeros(2, 3, dtype=torch.long)], ("1",))


# Compensation


@pytest.mark.parametrize("by", ["l2", "activation"])
@pytest.mark.parametrize("path", ["a", "b", "c", "t", "fc1"])
def test_compensation_equals_the_dense_model_with_means_in_its_place(net: nn.Module, captured: Captured, path: str,
                                                                      by: str) -> None:
    data = images()
    smaller, outcome = removed(captured, data, (path,), by=by)
    dense, _ = with_means(net, kept_indices(smaller, outcome), data)
    zeroed, _ = with_means(net, kept_indices(smaller, outcome), data, zeros=True)
    assert apart(smaller.module(data), dense(data)) < 1e-5 < apart(zeroed(data), dense(data))
    without, _ = removed(captured, data, (path,), by=by, compensate=False)
    assert apart(without.module(data), zeroed(data)) < 1e-5
    assert any(note.startswith("compensated: the means of") for note in outcome.notes)


def test_the_whole_net_is_compensated_from_one_run(net: nn.Module, captured: Captured) -> None:
    data = images()
    runs: list[int] = []
    captured_copy = captured.copy()
    hook = captured_copy.module.get_submodule("a").register_forward_hook(
        lambda module, args, value: runs.append(len(value)))
    nodes = makers(captured_copy)
    outcome = Remove(ratio=0.25, by="activation", verify="off").rewrite(
        captured_copy, Site(nodes, "channels", calibration=Calibration.of([data], captured_copy)))
    hook.remove()
    assert runs.count(len(data)) == 1, "the others are fakes, for shapes"
    dense, _ = with_means(net, kept_indices(captured_copy, outcome), data)
    assert apart(captured_copy.module(data), dense(data)) < 1e-5


def test_zero_padding_and_transposed_kernels_take_the_mean_over_places() -> None:
    torch.manual_seed(0)
    model = wake(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.ReLU(),
                               nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)))
    captured = fxcompress.capture(model, (images(2),))
    data = images()
    for path, reader in (("0", 2), ("2", 4)):
        smaller, outcome = removed(captured, data, (path,))
        _, means = with_means(model, kept_indices(smaller, outcome), data)
        gone = torch.ones(8, dtype=torch.bool)
        gone[kept_indices(smaller, outcome)[f"{path}.weight"][0]] = False
        with torch.no_grad():
            picture = torch.where(gone, means[str(reader)], 0.0)[:, None, None].expand(8, *(6, 6) if reader == 2 else
                                                                                      (3, 3))
            shift = (model[reader](picture[None]) - model[reader](torch.zeros_like(picture)[None])).mean((0, 2, 3))
        bias = smaller.module.get_parameter(f"{reader}.bias") - model[reader].bias
        torch.testing.assert_close(bias, shift, rtol=1e-4, atol=1e-5)
        assert any("mean over its places" in note for note in outcome.notes)


def test_a_constant_channel_gives_the_same_with_and_without_data() -> None:
    model = wake(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
                               nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)))
    with torch.no_grad():
        for norm, shift in ((model[1], 0.7), (model[4], -0.9)):
            norm.weight[:4] = 0
            norm.bias[:4] = shift
    data = images()
    captured = fxcompress.capture(model, (data[:2],))
    for path in ("0", "3"):
        folded, outcome = removed(captured, None, (path,), by="bn_scale")
        measured, other = removed(captured, data, (path,), by="bn_scale")
        for (name, one), two in zip(folded.module.state_dict().items(), measured.module.state_dict().values(),
                                    strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)
        assert path == "0" or apart(folded.module(data), model(data)) < 1e-5, "nothing but constants left"
        notes = [note for note in outcome.notes + other.notes if note.startswith("constants of removed channels are")]
        assert len(notes) == 2 and not any(note.startswith("compensated") for note in other.notes)


def test_a_module_called_twice_is_compensated_once(net: nn.Module) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(F.relu(self.a(x))) + self.b(F.relu(self.a(-x))))

    model = wake(Twice())
    data = torch.randn(64, 4)
    captured = fxcompress.capture(model, (data[:2],))
    smaller, outcome = removed(captured, data, ("a",))
    kept = kept_indices(smaller, outcome)["a.weight"][0]
    gone = torch.tensor([index for index in range(8) if index not in kept.tolist()])
    mean = (F.relu(model.a(data)).mean(0) + F.relu(model.a(-data)).mean(0)) / 2
    wanted = model.b.bias + model.b.weight[:, gone] @ mean[gone]
    torch.testing.assert_close(smaller.module.b.bias, wanted)


def test_masked_readers_take_it_behind_their_masks() -> None:
    model = wake(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)))
    data = torch.randn(64, 6)
    masked = Mask(sparsity=0.5).apply(fxcompress.capture(model, (data[:2],)), '"2"')
    folded = copy.deepcopy(model)
    with torch.no_grad():
        folded[2].weight *= masked.module.get_submodule("2.weight_mask").mask
    smaller = Remove(ratio=0.5).apply(masked, '"0"', "channels", calibration=data)
    kept = smaller.module.get_parameter("0.weight")
    rows = [next(i for i in range(16) if torch.equal(model[0].weight[i], row)) for row in kept]
    gone = torch.tensor([index for index in range(16) if index not in rows])
    shift = folded[2].weight[:, gone] @ F.relu(model[0](data)).mean(0)[gone]
    torch.testing.assert_close(smaller.module.get_parameter("2.bias"), shift)
    policy = 'policy p { mask "2" { sparsity = 50% }\n remove channels("0") { ratio = 50% } }'
    result = fxcompress.compile(policy, model, (data[:2],), calibration=data)
    assert apart(result.finalize()(data), result.module.eval()(data)) < 1e-6


@pytest.mark.parametrize("kind", ["lstm", "gru", "attention"])
def test_recurrent_layers_and_attention_take_it_into_their_input_biases(kind: str) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 8)
            self.read = {"lstm": lambda: nn.LSTM(8, 6, batch_first=True), "gru": lambda: nn.GRU(8, 6, batch_first=True),
                         "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True)}[kind]()
            self.out = nn.Linear(8 if kind == "attention" else 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.out((self.read(x, x, x) if kind == "attention" else self.read(x))[0])

    model = wake(Reader())
    data = torch.randn(32, 7, 5)
    captured = fxcompress.capture(model, (data[:2],))
    smaller, outcome = removed(captured, data, ("a",))
    kept = kept_indices(smaller, outcome)["a.weight"][0]
    mean = F.relu(model.a(data)).mean((0, 1))
    with torch.no_grad():
        hook = model.a.register_forward_hook(lambda module, args, value: torch.where(
            torch.isin(torch.arange(8), kept), F.relu(value), mean))  # means are not negative: relu leaves them
        wanted = model(data)
        hook.remove()
        if kind == "attention":
            assert smaller.module.read.in_proj_bias.shape == (24,)
        assert apart(smaller.module(data), wanted) < 1e-5


def test_transformer_blocks_are_compensated() -> None:
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                             image_size=32, patch_size=8), add_pooling_layer=False)
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                vocab_size=50), add_pooling_layer=False)
    for model, data in ((vit, {"pixel_values": torch.randn(16, 3, 32, 32)}),
                        (bert, {"input_ids": torch.randint(0, 50, (16, 9))})):
        wake(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "intermediate" in name and name.endswith("bias"):
                    parameter.add_(1.0)  # channels with means
        captured = fxcompress.capture(model, {name: value[:2] for name, value in data.items()})
        wanted = model(**data).last_hidden_state
        for what, better in (("hidden", 0.8), ("heads", 1.0)):
            with torch.no_grad():
                error = [apart(Remove(ratio=0.5, by="activation", compensate=on).apply(
                    captured, "linear", what, calibration=data).module(*data.values())["last_hidden_state"], wanted)
                    for on in (False, True)]
            assert error[1] < better * error[0]


# The criterion


def test_activation_ranks_by_the_mean_magnitude_that_readers_see(net: nn.Module, captured: Captured) -> None:
    data = images()
    seen: dict[str, Tensor] = {}
    net.fc2.register_forward_pre_hook(lambda module, args: seen.update(fc1=args[0].abs().mean(0)))
    net.t.register_forward_pre_hook(lambda module, args: seen.update(c=args[0].abs().mean((0, 2, 3))))
    net(data)
    for path in ("fc1", "c"):
        smaller, outcome = removed(captured, data, (path,), by="activation")
        kept = kept_indices(smaller, outcome)[f"{path}.weight"][0]
        assert set(kept.tolist()) == set(seen[path].argsort(descending=True)[: len(kept)].tolist())


@pytest.mark.parametrize("settings", [{"scope": "global"}, {"scope": "isomorphic"}, {"reduce": "max"},
                                      {"normalize": "standard", "scope": "global"}, {"align": 2}])
def test_activation_works_with_every_scope_and_reducer(captured: Captured, settings: dict[str, object]) -> None:
    smaller = Remove(ratio=0.4, by="activation", **settings).apply(captured, what="channels", calibration=images())
    assert smaller.facts.macs < captured.facts.macs and smaller.module(images(3)).shape == (3, 5)


def test_a_criterion_of_ones_own_sees_responses(captured: Captured) -> None:
    @fxcompress.register_criterion("variance_of_values", needs="response")
    def variance(scoring: Scoring) -> Tensor:
        return scoring.reduce(scoring.responses, lambda part: part.square - part.mean.square())

    try:
        smaller = Remove(ratio=0.5, by="variance_of_values").apply(captured, '"fc1"', "channels", calibration=images())
        assert smaller.module.get_parameter("fc1.weight").shape[0] == 10
        with pytest.raises(FxcError, match="`by = variance_of_values` needs calibration data"):
            Remove(ratio=0.5, by="variance_of_values").apply(captured, '"fc1"', "channels")
    finally:
        CRITERIA.unregister("variance_of_values")


@pytest.mark.parametrize(("build", "selected", "path"), [
    (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), "self_attn", "self_attn"),
    (lambda: nn.LSTM(16, 8, batch_first=True), "0", "0"),
])
def test_a_note_names_layers_that_are_not_compensated_inside(build, selected: str, path: str) -> None:
    model = wake(nn.Sequential(build(), First(), nn.Linear(8, 3)) if path == "0" else build())
    data = torch.randn(8, 5, 16)
    captured = fxcompress.capture(model, (data[:2],))
    what = "channels" if path == "0" else "heads"
    wanted = f"not compensated: what leaves is read inside of {path}, where its mean can't be measured"
    for batches, times in ((data, 1), (None, 0)):
        _, outcome = removed(captured, batches, (selected,), what)
        assert outcome.notes.count(wanted) == times
    _, outcome = removed(captured, data, (selected,), what, compensate=False)
    assert wanted not in outcome.notes


class First(nn.Module):
    """The output of a recurrent layer, without its states."""

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return given[0]


def test_an_input_that_shrinks_is_compensated_and_not_noted() -> None:
    model = wake(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.LSTM(8, 6, batch_first=True), First(), nn.Linear(6, 3)))
    data = torch.randn(8, 5, 16)
    _, outcome = removed(fxcompress.capture(model, (data[:2],)), data, ("0",))
    assert any(note.startswith("compensated") for note in outcome.notes)
    assert not any(note.startswith("not compensated") for note in outcome.notes)


def test_what_is_read_inside_of_a_module_has_no_response() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    captured = fxcompress.capture(model, (torch.randn(2, 5, 16),))
    with pytest.raises(FxcError, match="FXC0343"):
        Remove(ratio=0.5, by="activation").apply(captured, "multihead_attention", "heads",
                                                 calibration=torch.randn(8, 5, 16))


# In time, and where data are missing


@pytest.mark.parametrize("settings", [{"by": "activation"}, {"compensate": True}])
def test_without_data_it_is_an_error(captured: Captured, settings: dict[str, object]) -> None:
    with pytest.raises(FxcError, match="FXC0346"):
        Remove(ratio=0.5, **settings).apply(captured, what="channels")


def test_a_later_phase_that_needs_data_is_refused_at_once_and_has_them(net: nn.Module) -> None:
    policy = """policy p {
        phase one over epochs 0..1 { remove channels("a") { ratio = 50% } }
        phase two over epochs 1..2 after one { remove channels("c") { ratio = 50%, by = activation } }
    }"""
    with pytest.raises(FxcError, match="FXC0346"):
        fxcompress.compile(policy, net, (images(2),), epochs=2)
    assert "(known after weights)" in fxcompress.plan(policy, net, (images(2),)).show()
    result = fxcompress.compile(policy, net, (images(2),), epochs=2, calibration=iter([images(30), images(20, 2)]))
    assert any(note.startswith("compensated") for note in result.notes)
    result.step()
    result.epoch_end()
    assert result.module.c.weight.shape == (6, 8, 3, 3) and result._executor.calibration is None
    assert result.finalize()(images(2)).shape == (2, 5)


def test_compensate_is_three_valued() -> None:
    assert Remove(ratio=0.5).compensate == "auto" and Remove(ratio=0.5, compensate=False).compensate is False
    with pytest.raises(FxcError, match="compensate"):
        Remove(ratio=0.5, compensate="maybe")
    with pytest.raises(FxcError, match="FXC01"):
        fxcompress.parse("policy p { remove channels(conv2d) { ratio = 50%, compensate = yes } }")


# The command line

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

net.example_inputs = (torch.zeros(2, 4),)

def batches():
    for seed in range(3):
        yield torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))

def broken():
    raise ValueError("no data today")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "p.fxc").write_text("policy p {\n    remove channels(linear) { ratio = 50%, by = activation }\n}\n")
    data = np.random.default_rng(0).normal(size=(70, 4))
    np.save(tmp_path / "d.npy", data)
    np.savez(tmp_path / "d.npz", data=data)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:100])
    save_file({"data": torch.from_numpy(data).float()}, tmp_path / "d.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"nothing")
    return tmp_path


@pytest.mark.parametrize("spec", ["d.npy", "d.npz", "d.safetensors", "net.py:batches"])
def test_data_of_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    from fxcompress import commands

    monkeypatch.chdir(folder)
    assert commands.compile(Path("p.fxc"), "net.py:net", output=Path("out"), calibration=spec) == 0
    assert fxcompress.load("out")(torch.zeros(3, 4)).shape == (3, 3)


@pytest.mark.parametrize(("spec", "code"), [
    ("none.npy", "FXC0719"), ("objects.npy", "FXC0719"), ("cut.npz", "FXC0719"), ("cut.safetensors", "FXC0719"),
    ("data.pt", "FXC0719"), ("net.py:batch", "FXC0713"), ("net.py:broken", "FXC0714"), ("net.py:", "FXC0710")])
def test_mistakes_of_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch, spec: str, code: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(FxcError, match=code):
        load_data(spec)


def test_the_option_is_there(folder: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "fxcompress", "compile", "p.fxc", "--model", "net.py:net", "-o", "out",
                          "--calibration", "d.npy"], cwd=folder, check=False, capture_output=True, text=True)
    assert run.returncode == 0 and "compensated: the means of 4 removed components" in run.stdout, run.stderr
