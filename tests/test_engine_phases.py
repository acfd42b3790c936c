"""Phases in training: rewrites in place, optimizers that follow, checkpoints, lottery tickets, passes that fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from engine_nets import EXAMPLE, SPARSE, Net, batches, code_of, masks, sgd, sparsity, train
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import PlanError, RewriteError
from fxcompress.engine.follow import Followers
from fxcompress.graph import Captured
from fxcompress.graph.ops import call
from fxcompress.graph.site import Outcome, Site
from fxcompress.passbase import VERBS, Facet, Pass
from fxcompress.plan import Plan


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


LATER = """
policy p {
    phase sparsify over steps 0..6 { mask linear { sparsity = linear(0% -> 50%), every = 2 steps } }
    phase thin after sparsify { remove channels(conv2d) { ratio = 50%, by = l1 } }
    phase more over steps 8..10 after thin { mask conv2d { sparsity = 50% } }
}
"""


def test_later_phases_rewrite_the_same_module_and_the_optimizer_stays_valid(model: nn.Module) -> None:
    result = fxcompress.compile(LATER, model, EXAMPLE)
    optimizer = result.follow(torch.optim.Adam(result.module.parameters(), lr=0.01))
    module, parameters, data = result.module, list(result.module.parameters()), batches()
    train(result, optimizer, data, 5)
    conv = module.get_parameter("conv.weight")
    weights, moment = conv.detach().clone(), optimizer.state[conv]["exp_avg"].clone()
    assert conv.shape[0] == 8
    step = next(data)
    optimizer.zero_grad()
    F.cross_entropy(module(step[0]), step[1]).backward()
    optimizer.step()
    weights, moment = conv.detach().clone(), optimizer.state[conv]["exp_avg"].clone()
    result.step()
    assert result.module is module
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    kept = weights.abs().sum((1, 2, 3)).topk(4).indices.sort().values
    assert torch.equal(conv, weights[kept])
    assert torch.equal(optimizer.state[conv]["exp_avg"], moment[kept])
    assert all(value.shape == p.shape for p in parameters
               for value in optimizer.state[p].values() if value.dim())
    assert masks(module)["fc1.weight"].shape == (24, 64)
    train(result, optimizer, data, 4)
    assert result.done and masks(module).keys() == {"conv.weight", "fc1.weight", "fc2.weight"}
    deployed = result.finalize()
    assert list(deployed.state_dict()) == list(model.state_dict())


def test_actions_without_a_window_wait_for_the_phases_before_them(model: nn.Module) -> None:
    result = fxcompress.compile(LATER, model, EXAMPLE)
    assert result.progress == {"sparsify": 0, "thin": 0, "more": 0}
    with pytest.raises(PlanError) as caught:
        result.finalize()
    assert [item.code for item in caught.value.diagnostics] == ["FXC0523", "FXC0523"]


@pytest.mark.parametrize("at", [4, 7])
def test_a_checkpoint_in_the_middle_changes_nothing(model: nn.Module, at: int) -> None:
    whole = fxcompress.compile(LATER, model, EXAMPLE)
    first = fxcompress.compile(LATER, model, EXAMPLE)
    for result in (whole, first):
        result.follow(sgd(result))
    data = batches()
    train(whole, whole._followers.optimizers[0], batches(), 12)
    optimizer = first._followers.optimizers[0]
    train(first, optimizer, data, at)
    saved = copy.deepcopy([first.state_dict(), first.module.state_dict(), optimizer.state_dict()])

    second = fxcompress.compile(LATER, model, EXAMPLE)
    second.load_state_dict(saved[0])
    second.module.load_state_dict(saved[1])
    again = second.follow(sgd(second))
    again.load_state_dict(saved[2])
    train(second, again, data, 12 - at)
    assert second.done
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name
    assert whole.module.code == second.module.code


def test_a_checkpoint_survives_torch_save_without_pickled_code(model: nn.Module, tmp_path: Path) -> None:
    result = fxcompress.compile(SPARSE % ("steps 0..6", "linear(0% -> 50%)", "2 steps"), model, EXAMPLE)
    train(result, sgd(result), batches(), 3)
    torch.save(result.state_dict(), tmp_path / "schedule.pt")
    loaded = torch.load(tmp_path / "schedule.pt", weights_only=True)
    other = fxcompress.compile(SPARSE % ("steps 0..6", "linear(0% -> 50%)", "2 steps"), model, EXAMPLE)
    other.load_state_dict(loaded)
    assert other.progress == result.progress
    foreign = fxcompress.compile(SPARSE % ("steps 0..7", "linear(0% -> 50%)", "2 steps"), model, EXAMPLE)
    with pytest.raises(PlanError) as caught:
        foreign.load_state_dict(loaded)
    assert code_of(caught) == "FXC0525"


# Lottery tickets


def test_a_lottery_ticket_is_found_and_rewound(model: nn.Module) -> None:
    policy = """
    policy ticket {
        phase find over epochs 1..4 {
            mask conv2d | linear { sparsity = linear(0% -> 60%), every = 1 epochs, rewind = initial, scope = global }
        }
    }
    """
    result = fxcompress.compile(policy, model, EXAMPLE)
    initial = {name: value.clone() for name, value in result.module.state_dict().items()}
    optimizer, data = result.follow(sgd(result)), batches()
    for epoch in range(4):
        train(result, optimizer, data, 2)
        images, labels = next(data)
        optimizer.zero_grad()
        F.cross_entropy(result.module(images), labels).backward()
        optimizer.step()
        trained = {name: p.detach().clone() for name, p in result.module.named_parameters()}
        result.step()
        result.epoch_end()
        if epoch == 0:  # the ramp begins at 0%: nothing is masked, nothing to go back for
            assert all(torch.equal(p, trained[name]) for name, p in result.module.named_parameters())
            continue
        assert all(torch.equal(p, initial[name]) for name, p in result.module.named_parameters())
        assert not optimizer.state
        found = masks(result.module)
        assert sparsity(result.module) == pytest.approx(0.2 * epoch, abs=1e-3)
        ranking = torch.cat([trained[name].abs().flatten() for name in found])
        keep = torch.cat([mask.flatten() for mask in found.values()])
        assert ranking[keep].min() >= ranking[~keep].max()  # chosen by the trained weights, before the rewind


def test_rewinding_to_early_weights(model: nn.Module) -> None:
    policy = """
    policy ticket {
        phase thin { remove channels(conv2d) { ratio = 25% } }
        phase find over steps 5..9 after thin { mask linear { sparsity = 50%, every = 2 steps, rewind = 2 steps } }
    }
    """
    result = fxcompress.compile(policy, model, EXAMPLE)
    optimizer, data = sgd(result), batches()
    train(result, optimizer, data, 2)
    early = {name: p.detach().clone() for name, p in result.module.named_parameters()}
    train(result, optimizer, data, 3)
    assert all(torch.equal(p, early[name]) for name, p in result.module.named_parameters())
    train(result, optimizer, data, 1)
    result.rewind("2 steps")
    assert torch.equal(result.module.get_parameter("conv.weight"), early["conv.weight"])
    result.rewind()
    assert result.module.get_parameter("conv.weight").shape[0] == 6
    rows = {tuple(row.flatten().tolist()) for row in model.conv.weight.detach()}
    assert {tuple(row.flatten().tolist()) for row in result.module.get_parameter("conv.weight").detach()} < rows
    with pytest.raises(PlanError) as caught:
        result.rewind("3 epochs")
    assert code_of(caught) == "FXC0526"


# A pass that breaks something


@dataclass(frozen=True)
class Spoil(Pass):
    """A verb with a mistake: its node has no provenance."""

    verb: ClassVar[str] = "spoil"
    facet: ClassVar[Facet] = Facet.TOPOLOGY

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        node = site.nodes[0]
        with graph.graph.inserting_after(node):
            new = call(graph.graph, "relu", node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        with torch.no_grad():
            for parameter in graph.module.parameters():
                parameter.zero_()
        return Outcome(())


def test_a_pass_that_breaks_an_invariant_leaves_the_module_as_it_was(
        model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VERBS, "_added", {**VERBS._added, Spoil.verb: Spoil})
    policy = "policy p {\n phase late over steps 1..2 {\n spoil conv2d\n }\n}"
    with pytest.raises(RewriteError):  # the plan finds it
        fxcompress.compile(policy, model, EXAMPLE)
    plan = fxcompress.plan("policy p { phase late over steps 1..2 { mask conv2d { sparsity = 50% } } }", model, EXAMPLE)
    monkeypatch.setattr(Plan, "require", lambda *_: None)  # as if it had passed there, and failed on real weights
    result = fxcompress.compile(policy, model, EXAMPLE, plan=plan)
    before = {name: value.clone() for name, value in result.module.state_dict().items()}
    code, nodes = result.module.code, list(result.module.graph.nodes)
    with pytest.raises(RewriteError) as caught:
        result.step()
    found = caught.value.diagnostics[0]
    assert found.code == "FXC0558" and "`spoil`" in found.message
    assert found.primary is not None and found.primary.span.line == 3
    assert list(result.module.graph.nodes) == nodes and result.module.code == code
    assert all(torch.equal(value, before[name]) for name, value in result.module.state_dict().items())


# Optimizers, apart from a policy


@pytest.mark.parametrize(("make", "kept"), [
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), True),
    (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), True),
    (lambda p: torch.optim.Adafactor(p, lr=0.1), False),
    (lambda p: torch.optim.LBFGS(p, lr=0.1), False),
], ids=["sgd", "adamw", "adafactor", "lbfgs"])
def test_state_is_cut_or_begins_anew(make: Callable[[object], torch.optim.Optimizer], kept: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(8, 6)
    optimizer = make(layer.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(x[:, :layer.weight.shape[1]]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    followers = Followers(layer, [optimizer])
    before = {key: value.clone() for key, value in optimizer.state[layer.weight].items() if isinstance(value, Tensor)}
    index = torch.tensor([0, 2, 5])
    layer.weight.data, layer.weight.grad = layer.weight.data[:, index], None
    notes = followers.update({layer.weight: ((1, index),)})
    if kept:
        assert not notes
        for key, value in optimizer.state[layer.weight].items():
            assert torch.equal(value, before[key][:, index] if before[key].dim() else before[key])
    else:
        assert len(notes) == 1 and "begins anew" in notes[0]
    optimizer.step(closure)
    assert layer.weight.isfinite().all()


def test_parameters_that_come_and_go() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    followers = Followers(module, [optimizer])
    gone, module[1] = module[1], nn.Linear(3, 2)
    assert followers.update({}) == ["2 new parameters train in a group of their own, with the optimizer's defaults"]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in module.parameters()}
    assert not any(p is q for p in trained for q in gone.parameters())


def test_a_checkpoint_says_what_left_so_other_weights_follow_it() -> None:
    policy = """policy p {
        phase thin over steps 1..2 { remove channels(linear - last(linear)) { ratio = 50%, scope = global } }
    }"""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    first = fxcompress.compile(policy, net, (torch.randn(2, 4),))
    with torch.no_grad():
        first.module.get_parameter("0.weight")[:7].mul_(1e-3)  # as if it had trained: now the first layer gives most
    first.step()
    second = fxcompress.compile(policy, net, (torch.randn(2, 4),))
    second.load_state_dict(first.state_dict())
    assert second.module.get_parameter("0.weight").shape == first.module.get_parameter("0.weight").shape == (1, 4)
    assert second.captured.fingerprint() == first.captured.fingerprint()
