"""Removal along a ramp: shares of the original at every time, ranked by the weights of that time, in training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from engine_nets import EXAMPLE, Net, batches, code_of, masks, train
from remove_check import wake, zeroed
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import PlanError, PolicyError, RewriteError
from fxcompress.passes.remove import Remove
from fxcompress.passes.shared import removing

THIN = """policy p {
    phase thin over steps %s {
        remove channels(conv2d | linear) { ratio = %s, %s }
    }
}"""
PICTURE = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)),)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


class Residual(nn.Module):
    """Convolutions whose channels an addition ties, and a concatenation after them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.b, self.norm, self.c = nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3)
        self.head = nn.Linear(28, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.b(torch.relu(self.a(x)))))
        return self.head(torch.cat([x.mean((2, 3)), self.c(x).mean((2, 3))], 1))


def noise(result: fxcompress.Result, optimizer: torch.optim.Optimizer, generator: torch.Generator, steps: int) -> None:
    """Train on anything: weights change, and differently in each channel."""
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, *PICTURE[0].shape[1:], generator=generator)
        result.module(x).square().sum().backward()
        optimizer.step()
        result.step()


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


# How much


@pytest.mark.parametrize(("ramp", "value"), [
    ("linear(10% -> 50%)", lambda t: 0.1 + 0.4 * t),
    ("cubic(0% -> 75%)", lambda t: 0.75 * (1 - (1 - t) ** 3)),
    ("step(25% -> 50%)", lambda t: 0.5 if t == 1 else 0.25),
])
def test_the_ratio_is_the_share_of_the_original_that_has_left(model: nn.Module, ramp: str, value: object) -> None:
    result = fxcompress.compile(THIN % ("0..12", ramp, "every = 3 steps"), model, EXAMPLE)
    optimizer, data = result.follow(torch.optim.Adam(result.module.parameters(), lr=0.01)), batches()
    for step in range(13):
        share = value(min(step // 3 * 3, 12) / 12)  # type: ignore[operator]
        for name, size in (("conv", 8), ("fc1", 24)):
            left = size - result.module.get_submodule(name).weight.shape[0]  # type: ignore[union-attr, operator]
            assert left == int(share * size + 0.5), (step, name)
        assert result.module.get_parameter("fc2.weight").shape[0] == 4
        train(result, optimizer, data, step < 12)
    assert result.done


@pytest.mark.parametrize("settings", [
    "by = l1", "align = 4", "min_channels = 10", "max_ratio = 40%", "align = 8, max_ratio = 60%", "by = bn_scale",
])
def test_the_end_is_that_of_one_removal(settings: str) -> None:
    torch.manual_seed(1)
    model = wake(torchvision.models.MobileNetV2(width_mult=0.35, num_classes=5, inverted_residual_setting=[
        [1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]))
    example = (torch.randn(2, 3, 32, 32),)
    policy = "policy p {{ phase thin {} {{ remove channels(conv2d) {{ ratio = {}, verify = off, {} }} }} }}"
    once = fxcompress.compile(policy.format("", "50%", settings), model, example)
    along = policy.format("over steps 0..4", "cosine(5% -> 50%), every = 1 steps", settings)
    slow = fxcompress.compile(along, model, example)
    widths = [slow.module.get_parameter("features.0.0.weight").shape[0]]
    for _ in range(4):
        with torch.no_grad():  # other channels are the least at every step
            for parameter in slow.module.parameters():
                parameter.mul_(torch.rand(parameter.shape[0]).view(-1, *[1] * (parameter.dim() - 1)) + 0.5)
        slow.step()
        widths.append(slow.module.get_parameter("features.0.0.weight").shape[0])
    assert slow.done and shapes(slow.module) == shapes(once.module)
    assert widths == sorted(widths, reverse=True)
    assert shapes(slow.module) != shapes(model)


def test_the_end_is_that_of_one_removal_where_groups_balance_each_other() -> None:
    torch.manual_seed(2)
    model = wake(torchvision.models.shufflenet_v2_x0_5(num_classes=5))
    policy = "policy p {{ phase thin {} {{ remove channels(conv2d) {{ ratio = {}, verify = off }} }} }}"
    example = (torch.randn(2, 3, 64, 64),)
    once = fxcompress.compile(policy.format("", "50%"), model, example)
    slow = fxcompress.compile(policy.format("over steps 0..2", "linear(10% -> 50%), every = 1 steps"), model, example)
    slow.step()
    slow.step()
    assert slow.done and shapes(slow.module) == shapes(once.module)


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_ranked_together_the_ratio_holds_over_all_that_was_there(scope: str) -> None:
    torch.manual_seed(2)
    settings = f"every = 2 steps, scope = {scope}, max_ratio = 80%"
    result = fxcompress.compile(THIN % ("0..8", "linear(0% -> 50%)", settings), Residual(), PICTURE)
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.01, momentum=0.9))
    generator, counts = torch.Generator().manual_seed(4), []
    names = ["stem", "a", "b", "c"]
    for _ in range(4):
        noise(result, optimizer, generator, 2)
        counts.append(sum(result.module.get_submodule(name).weight.shape[0] for name in names))  # type: ignore[misc]
    for time, count in zip((0.25, 0.5, 0.75, 1), counts, strict=True):
        assert abs(68 - count - 0.5 * time * 68) <= 2  # a channel of the sum counts twice: it leaves stem and b
    assert result.module.get_submodule("stem").weight.shape[0] == result.module.get_submodule("b").weight.shape[0]


def test_without_every_channels_leave_as_the_ramp_asks_for_them(
        model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(removing, "analyse", _counting(asked))
    result = fxcompress.compile(THIN % ("0..100", "linear(0% -> 25%)", "verify = off"), model, EXAMPLE)
    widths = []
    begun = len(asked)
    for _ in range(100):
        result.step()
        widths.append(result.module.get_parameter("fc1.weight").shape[0])
    assert sorted(set(widths), reverse=True) == [24, 23, 22, 21, 20, 19, 18]
    assert widths.index(23) == 8  # 1/48 of the channels: after 8.3 of 100 steps, so by the ninth
    assert len(asked) - begun <= 2 * 8  # carried out, and rehearsed: not at every step


def _counting(asked: list[float]) -> object:
    from fxcompress.graph.coupling import analyse

    def counted(*args: object) -> object:
        asked.append(0)
        return analyse(*args)  # type: ignore[arg-type]

    return counted


# Which


def test_each_step_ranks_by_the_weights_of_its_time_and_moments_follow(model: nn.Module) -> None:
    result = fxcompress.compile(THIN % ("0..6", "linear(0% -> 75%)", "every = 2 steps, by = l1"), model, EXAMPLE)
    optimizer, data = result.follow(torch.optim.Adam(result.module.parameters(), lr=0.05)), batches()
    parameters, module = list(result.module.parameters()), result.module
    conv = result.module.get_parameter("conv.weight")
    for _ in range(3):
        train(result, optimizer, data, 1)
        images, labels = next(data)
        optimizer.zero_grad()
        F.cross_entropy(result.module(images), labels).backward()
        optimizer.step()
        weight, moment = conv.detach().clone(), optimizer.state[conv]["exp_avg_sq"].clone()
        result.step()
        kept = weight.abs().sum((1, 2, 3)).topk(len(weight) - 2).indices.sort().values
        assert torch.equal(conv, weight[kept])
        assert torch.equal(optimizer.state[conv]["exp_avg_sq"], moment[kept])
    assert len(conv) == 2
    assert result.module is module and all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert all(value.shape == p.shape for p in parameters for value in optimizer.state[p].values() if value.dim())


def test_a_loss_that_is_still_held_does_not_keep_the_old_shape(model: nn.Module) -> None:
    result = fxcompress.compile(THIN % ("0..2", "linear(0% -> 50%)", "every = 1 steps"), model, EXAMPLE)
    optimizer, data = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.1)), batches()
    for _ in range(3):
        images, labels = next(data)
        optimizer.zero_grad()
        loss = F.cross_entropy(result.module(images), labels)
        loss.backward()  # with autograd's graph of the step before still alive in `loss`
        optimizer.step()
        result.step()
    assert result.done and loss.isfinite()


def test_the_model_equals_the_dense_one_with_readers_zeroed() -> None:
    torch.manual_seed(5)
    model = wake(nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Flatten(),
                               nn.Linear(20 * 144, 4)))
    result = fxcompress.compile(THIN % ("0..5", "linear(20% -> 60%)", "every = 1 steps, by = random"), model, PICTURE)
    for _ in range(5):
        result.step()
    kept: dict[str, dict[int, Tensor]] = {}
    for entry in result._executor.log:  # what stayed of what had stayed
        for name, cuts in entry.kept.items():
            for dim, indices in cuts:
                before = kept.setdefault(name, {}).get(dim, torch.arange(model.state_dict()[name].shape[dim]))
                kept[name][dim] = before[indices]
    assert len(kept["0.weight"][0]) == 5 and len(kept["2.weight"][0]) == 8
    result.module.eval()
    assert torch.allclose(result.module(*PICTURE), zeroed(model, kept)(*PICTURE), atol=1e-5)
    assert [bool(entry.kept) for entry in result._executor.log] == [False, *[True] * 6]  # set up, at once, five steps
    left = [origin for origin in result.captured.node("0").meta["origins"] if origin.left is not None]
    gone = sorted(index for origin in left for index in origin.left.indices)
    assert gone == sorted(set(range(12)) - set(kept["0.weight"][0].tolist()))


def test_a_selection_by_size_goes_on_when_its_layers_have_shrunk() -> None:
    torch.manual_seed(6)
    policy = """policy p { phase thin over steps 0..4 {
        remove channels(conv2d[out_channels >= 16]) { ratio = linear(25% -> 75%), every = 2 steps } } }"""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1))
    result = fxcompress.compile(policy, net, PICTURE)
    widths = []
    for _ in range(4):
        result.step()
        widths.append(result.module.get_parameter("0.weight").shape[0])
    assert widths == [12, 8, 8, 4] and result.module.get_parameter("2.weight").shape[0] == 12


@pytest.mark.parametrize("by", ["taylor", "hessian"])
def test_gradients_are_waited_for_and_are_those_of_the_time(model: nn.Module, by: str) -> None:
    result = fxcompress.compile(THIN % ("0..4", "linear(25% -> 50%)", f"every = 4 steps, by = {by}"), model, EXAMPLE)
    conv, data = result.module.get_parameter("conv.weight"), batches()
    assert len(conv) == 8
    result.step()
    assert len(conv) == 8 and not result.done  # still no gradient
    optimizer = torch.optim.SGD(result.module.parameters(), lr=0.05)
    images, labels = next(data)
    F.cross_entropy(result.module(images), labels).backward()
    optimizer.step()
    scores = (conv * conv.grad).abs().sum((1, 2, 3)) if by == "taylor" else (
        (conv * conv.grad).square().sum((1, 2, 3)))  # the linear layer's columns don't make channels
    kept, weight = scores.topk(5).indices.sort().values, conv.detach().clone()
    result.step()  # written late, so with the value of now: 37.5%
    assert torch.equal(conv, weight[kept])
    train(result, optimizer, data, 2)
    assert len(conv) == 4 and result.done


# Checkpoints


def data_for(result: fxcompress.Result) -> Iterator[tuple[Tensor, Tensor]]:
    data = batches()
    for _ in range(result.clock.steps):
        next(data)
    return data


RESUMED = {
    "local": THIN % ("0..12", "linear(10% -> 60%)", "every = 3 steps"),
    "global": THIN % ("1..12", "linear(10% -> 60%)", "every = 2 steps, scope = global, by = taylor"),
    "two": """policy p {
        phase thin over steps 0..8 { remove channels(conv2d) { ratio = linear(0% -> 50%), every = 2 steps } }
        phase dense over steps 3..10 { mask linear { sparsity = linear(0% -> 50%), every = 3 steps } }
        phase once over steps 6..7 { remove channels("fc1") { ratio = 50%, scope = global } }
    }""",
    "growing": THIN % ("0..7", "50%", "sparsify = growing, strength = 0.5, every = 1 steps"),
    "lasso": THIN % ("1..7", "50%", "sparsify = group_lasso, strength = 0.01, scope = global"),
}


@pytest.mark.parametrize("at", [2, 7])
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_taken_up_on_other_weights_and_changes_nothing(
        model: nn.Module, name: str, at: int, tmp_path: Path) -> None:
    def adam(result: fxcompress.Result) -> torch.optim.Optimizer:
        return result.follow(torch.optim.Adam(result.module.parameters(), lr=0.02))

    whole, first = (fxcompress.compile(RESUMED[name], model, EXAMPLE) for _ in range(2))
    train(whole, adam(whole), batches(), 13)
    optimizer = adam(first)
    train(first, optimizer, batches(), at)
    torch.save([first.state_dict(), first.module.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)

    torch.manual_seed(99)
    second = fxcompress.compile(RESUMED[name], Net(), EXAMPLE, resume=saved[0])
    second.module.load_state_dict(saved[1])
    again = adam(second)
    again.load_state_dict(saved[2])
    assert second.progress == first.progress
    train(second, again, data_for(first), 13 - at)
    assert second.done and second.module.code == whole.module.code
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[key]), key
    assert shapes(second.module) != shapes(model)
    assert second._executor.log[-1].same(whole._executor.log[-1])


def test_what_began_at_once_on_other_weights_is_refused_without_resume(model: nn.Module) -> None:
    policy = "policy p { remove channels(conv2d | linear) { ratio = 50%, scope = global } }"
    state = fxcompress.compile(policy, model, EXAMPLE).state_dict()
    fxcompress.compile(policy, model, EXAMPLE).load_state_dict(state)
    torch.manual_seed(7)
    with pytest.raises(PlanError) as caught:
        fxcompress.compile(policy, Net(), EXAMPLE).load_state_dict(state)
    assert code_of(caught) == "FXC0528"
    resumed = fxcompress.compile(policy, Net(), EXAMPLE, resume=state)
    assert resumed.captured.fingerprint() == state["graph"]


def test_a_bias_that_a_removal_made_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(8)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)).eval()

    policy, model, example = "policy p { remove channels(\"0\") { ratio = 50% } }", net(), (torch.randn(3, 6),)
    with torch.no_grad():
        model[0].weight[:4].zero_()  # constants, which the next layer takes into a bias
        model[0].bias[:4].fill_(0.5)
    first = fxcompress.compile(policy, model, example)
    assert "2.bias" in first.module.state_dict()
    second = fxcompress.compile(policy, net(), example, resume=first.state_dict())
    second.module.load_state_dict(first.module.state_dict())
    assert torch.equal(second.module(*example), first.module(*example))
    assert torch.allclose(first.module(*example), model(*example), atol=1e-6)


# With others


def test_masks_on_the_same_layers_move_along(model: nn.Module) -> None:
    policy = """policy p {
        phase thin over steps 0..8 { remove channels(conv2d | "fc1") { ratio = linear(0% -> 50%), every = 2 steps } }
        phase mask over steps 2..8 { mask conv2d | linear { sparsity = linear(0% -> 60%), every = 1 steps } }
    }"""
    result = fxcompress.compile(policy, model, EXAMPLE)
    optimizer, data = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.05, momentum=0.9)), batches()
    for step in range(1, 9):
        train(result, optimizer, data, 1)
        wide = int(8 * (1 - 0.5 * (step // 2) / 4) + 0.5)
        assert result.module.get_parameter("conv.weight").shape[0] == wide
        for name, mask in masks(result.module).items():
            weight = result.module.get_parameter(name)
            assert mask.shape == weight.shape
            hidden = round(0.6 * max(0, step - 2) / 6 * mask.numel())
            assert int((~mask).sum()) == hidden or step % 2 == 0  # a removal after the mask takes some of it along
    assert result.done
    deployed = result.finalize()
    assert list(deployed.state_dict()) == list(model.state_dict())
    assert deployed.get_parameter("fc1.weight").shape == (12, 64)
    assert {origin.verb for origin in result.captured.node("conv").meta["origins"]} == {"mask", "remove"}


def test_a_saved_model_is_removed_from_again_along_a_ramp(model: nn.Module, tmp_path: Path) -> None:
    policy = THIN % ("0..4", "linear(0% -> 50%)", "every = 2 steps")
    result = fxcompress.compile(policy, model, EXAMPLE)
    train(result, result.follow(torch.optim.SGD(result.module.parameters(), lr=0.05)), batches(), 3)
    with pytest.warns(UserWarning, match=r"the ratio of channels\(conv2d \| linear\) stopped at 25%, short of 50%"):
        half_way = result.finalize()
    assert [item.code for item in result.warnings] == ["FXC0524"]
    fxcompress.save(half_way, tmp_path / "half")
    loaded = fxcompress.load(tmp_path / "half")
    assert loaded.get_parameter("conv.weight").shape[0] == 6
    more = fxcompress.compile(policy, loaded, EXAMPLE)
    train(more, torch.optim.SGD(more.module.parameters(), lr=0.05), batches(), 4)
    assert more.done and more.module.get_parameter("conv.weight").shape[0] == 3  # half of the six that were there
    fxcompress.save(more.finalize(), tmp_path / "whole")
    again = fxcompress.load(tmp_path / "whole")
    assert torch.allclose(again(*EXAMPLE), more.finalize()(*EXAMPLE), atol=1e-6)


def test_a_step_that_fails_leaves_the_module_as_it_was(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    result = fxcompress.compile(THIN % ("0..4", "linear(0% -> 50%)", "every = 2 steps"), model, EXAMPLE)
    optimizer, data = result.follow(torch.optim.Adam(result.module.parameters(), lr=0.01)), batches()
    train(result, optimizer, data, 2)
    result.step()
    before, code = copy.deepcopy(result.module.state_dict()), result.module.code

    def fails(*_: object, **__: object) -> object:
        raise RewriteError([])

    with monkeypatch.context() as patch:
        patch.setattr(removing, "prove", fails)
        with pytest.raises(RewriteError):
            result.step()
    assert result.module.code == code
    assert all(torch.equal(value, before[name]) for name, value in result.module.state_dict().items())
    result.step()  # tried again
    assert result.done and result.module.get_parameter("conv.weight").shape[0] == 4


# What is planned and refused


def test_a_plan_shows_the_end_and_the_steps(model: nn.Module) -> None:
    text = THIN % ("0..10", "linear(10% -> 50%)", "every = EVERY steps")
    for every, steps in ((2, 6), (5, 3), (3, 5), (20, 2)):
        plan = fxcompress.plan(text.replace("EVERY", str(every)), model, EXAMPLE)
        assert f"in {steps} steps along linear(10% -> 50%)" in plan.show()
    assert "out_channels 8 -> 4" in plan.show()
    assert fxcompress.plan(THIN % ("0..10", "50%", ""), model, EXAMPLE).after == plan.after
    text = text.replace("EVERY", "2")
    with pytest.raises(PlanError) as caught:  # a budget is judged at the end
        fxcompress.plan(text.replace("phase", "budget params <= 20% of dense\nphase"), model, EXAMPLE)
    assert code_of(caught) == "FXC0320"
    assert fxcompress.plan(text.replace("phase", "budget params <= 30% of dense\nphase"), model, EXAMPLE)


def test_applied_from_python_a_ramp_is_at_its_end(model: nn.Module) -> None:
    captured = fxcompress.capture(model, EXAMPLE)
    ramp, once = Remove(ratio="cubic(0% -> 50%)", every="2 epochs"), Remove(ratio=0.5)
    found, wanted = (pass_.apply(captured, "conv2d", "channels") for pass_ in (ramp, once))
    state = wanted.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.module.state_dict().items())


@pytest.mark.parametrize(("settings", "code"), [
    ({"ratio": "linear(50% -> 10%)"}, "FXC0507"),
    ({"ratio": "linear(10% -> 50%)", "sparsify": "growing"}, "FXC0507"),
    ({"ratio": 0.5, "every": "2 epochs"}, "FXC0508"),
    ({"ratio": 0.5, "strength": 0.1}, "FXC0508"),
])
def test_settings_that_do_not_go_together(settings: dict[str, object], code: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Remove(**settings)  # type: ignore[arg-type]
    assert code_of(caught) == code and caught.value.diagnostics[0].help


def test_a_ramp_without_time_is_refused(model: nn.Module) -> None:
    with pytest.raises(PolicyError) as caught:
        fxcompress.plan("policy p { remove channels(conv2d) { ratio = linear(0% -> 50%) } }", model, EXAMPLE)
    assert code_of(caught) == "FXC0520"


def test_responses_are_measured_anew_at_each_step(model: nn.Module) -> None:
    model.conv.bias.data.fill_(-1.0)
    model.norm = nn.Identity()  # type: ignore[assignment]
    data = [torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(5))]
    policy = """policy p { phase thin over steps 0..2 {
        remove channels(conv2d) { ratio = linear(0% -> 50%),
                                    every = 1 steps, by = activation, compensate = false } } }"""
    result = fxcompress.compile(policy, model, EXAMPLE, calibration=data)
    conv = result.module.get_parameter("conv.weight")
    for left in (6, 4):
        with torch.no_grad():
            bias = result.module.get_parameter("conv.bias")
            bias.copy_(torch.linspace(-1, 1, len(bias)).roll(left))  # other channels are the quiet ones now
            response = F.relu(F.conv2d(data[0], conv, bias)).abs().mean((0, 2, 3))
        kept, weight = response.topk(left).indices.sort().values, conv.detach().clone()
        result.step()
        assert torch.equal(conv, weight[kept])
    assert result.done
