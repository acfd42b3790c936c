"""`remove blocks(S)` in plans, in training, with masks and channels, in artifacts; ranked on calibration data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blocks_nets import Tower, skipping
from torch import Tensor, nn

import fxcompress
from fxcompress import FxcError, capture
from fxcompress import compile as compile_
from fxcompress.graph.calibration import Calibration
from fxcompress.graph.captured import Captured
from fxcompress.graph.residual_blocks import find_blocks
from fxcompress.graph.site import Site
from fxcompress.inspect import explain
from fxcompress.passes import Remove
from fxcompress.passes.shared.blocks_scores import block_scores
from fxcompress.plan import read_policy

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tower(*kinds: str, steps: tuple[int, ...] = ()) -> Tower:
    torch.manual_seed(0)
    return Tower(kinds or ["plain"] * 4, steps).eval()


def labels(captured: Captured) -> set[str]:
    return {block.label for block in find_blocks(captured).blocks}


def small(net: Tower, *places: int) -> Tower:
    """The blocks at `places` do next to nothing."""
    with torch.no_grad():
        for place in places:
            for parameter in net.blocks[place].parameters():
                parameter.mul_(1e-3)
    return net


# Plans


def plan_of(text: str, net: nn.Module) -> fxcompress.Plan:
    return fxcompress.plan(f"policy p {{ {text} }}", net, (X,))


def test_a_plan_says_that_it_depends_on_weights_which_blocks_leave() -> None:
    plan = plan_of("remove blocks(*) { ratio = 50% }", tower())
    step = plan.steps[0]
    assert [change.after for change in step.changes] == ["(known after weights)"] * 4
    assert step.unknown == ("which blocks leave",) and "2 of 4 blocks leave" in step.notes
    captured = capture(tower(), (X,))
    assert plan.after.macs == Remove(ratio=0.5).apply(captured, "*", "blocks").facts.macs


def test_a_plan_knows_blocks_that_leave_in_any_case() -> None:
    plan = plan_of('remove blocks("blocks.1.**" | "blocks.3.**") { ratio = 100% }', tower())
    assert [(change.path, change.before, change.after) for change in plan.steps[0].changes] == [
        ("blocks.1", "x + f(x)", "x"), ("blocks.3", "x + f(x)", "x")]
    assert plan.steps[0].unknown == ()
    layers = {layer.path: layer.after for layer in plan.layers}
    assert layers["blocks.1.conv1"] is None and layers["blocks.2.conv1"] is not None


def test_a_skeleton_on_meta_is_planned() -> None:
    with torch.device("meta"):
        net = Tower(["plain"] * 4).eval()
    plan = fxcompress.plan("policy p { remove blocks(*) { ratio = 25% } }", net, (X,))
    assert plan.after.params < plan.before.params


def test_blocks_of_stages_that_differ_leave_the_plan_open() -> None:
    plan = plan_of("remove blocks(*) { ratio = 50%, scope = global }", tower(steps=(1,)))
    assert plan.steps[0].unknown == ("which blocks leave, and with them what the model saves",)


# In training


PHASES = """policy p {
    phase train over epochs 0..1 {}
    phase thin over epochs 1..2 after train { remove blocks(*) { ratio = 50% } }
    phase deploy after thin {}
}"""


@pytest.mark.parametrize("kind", ["adam", "momentum", "lbfgs"])
def test_an_optimizer_follows_when_blocks_leave_in_training(kind: str) -> None:
    result = compile_(PHASES, small(tower(), 1, 2), (X,))
    parameters = list(result.module.parameters())
    make = {"adam": lambda p: torch.optim.Adam(p, 1e-3), "momentum": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
            "lbfgs": lambda p: torch.optim.LBFGS(p, 1e-3, max_iter=2)}
    optimizer = result.follow(make[kind](parameters))

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = result.module(X).square().mean()
        value.backward()
        return value

    result.module.train()
    for _ in range(3):
        optimizer.step(loss)
        result.epoch_end()
    left = list(result.module.parameters())
    assert labels(result.captured) == {"blocks.0", "blocks.3"}
    assert {id(p) for p in left} < {id(p) for p in parameters}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in left]
    assert set(optimizer.state) <= set(left)
    module = result.finalize()
    assert module(X).shape == (4, 5)


def test_a_checkpoint_repeats_which_blocks_left() -> None:
    """The run's weights of the time chose blocks 1 and 2; a fresh compile, with other weights, takes out the same."""
    result = compile_(PHASES, tower(), (X,))
    result.epoch_end()
    # as if trained: only now are these two small
    state_before = labels(result.captured)
    assert len(state_before) == 2
    other = small(tower(), *(int(label[-1]) for label in state_before))
    again = compile_(PHASES, other, (X,))
    again.load_state_dict(result.state_dict())
    again.module.load_state_dict(result.module.state_dict())
    assert labels(again.captured) == state_before
    assert torch.equal(again.module.eval()(X), result.module.eval()(X))


def test_weights_of_the_start_come_back_for_what_is_left() -> None:
    net = small(tower(), 1, 2)
    result = compile_(PHASES, net, (X,))
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.add_(0.01)
    result.epoch_end()
    result.rewind()
    assert torch.allclose(result.module.eval()(X), skipping(net, {1, 2})(X), atol=1e-6)


def test_a_running_mask_lets_go_of_blocks_that_leave() -> None:
    text = """policy p {
        phase thin over steps 0..4 { mask conv2d { sparsity = linear(0% -> 50%) } }
        phase deep over steps 2..4 { remove blocks("blocks.1.**") { ratio = 100% } }
    }"""
    result = compile_(text, tower(), (X,))
    for _ in range(4):
        result.module(X).sum().backward()
        result.step()
    module = result.finalize()
    weights = [value for name, value in module.state_dict().items() if name.endswith("conv1.weight")]
    assert len(weights) == 3
    for weight in weights:
        assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_blocks_of_masked_layers_leave_with_their_masks() -> None:
    text = """policy p {
        phase one { mask conv2d { sparsity = 50% } }
        phase two after one { remove blocks("blocks.2.**") { ratio = 100% } }
    }"""
    result = compile_(text, tower(), (X,))
    assert not [name for name in result.module.state_dict() if name.startswith("blocks.2")]
    assert not [name for name, _ in result.module.named_modules() if name.startswith("blocks.2")]
    masked = result.finalize()
    net = tower()
    net.load_state_dict({**net.state_dict(), **masked.state_dict()})
    torch.testing.assert_close(masked(X), skipping(net, {2})(X))


# With the rest of `remove`, and in artifacts


def test_channels_after_blocks_and_blocks_after_channels() -> None:
    captured = capture(tower("plain", "scaled", "gated", "plain"), (X,))
    channels, blocks = ("conv2d[name ~ \"**.conv1\"]", "channels"), ('"blocks.1.**"', "blocks")
    results = []
    for order in ((channels, blocks), (blocks, channels)):
        copy = captured
        for selector, what in order:
            copy = Remove(ratio=1.0 if what == "blocks" else 0.5).apply(copy, selector, what)
        results.append(copy.module(X))
        assert labels(copy) == {"blocks.0", "blocks.2", "blocks.3"}
    torch.testing.assert_close(*results)


def test_saved_loaded_and_removed_from_again(tmp_path: Path) -> None:
    net = tower("plain", "depth", "nested", "norm", "shuffled")
    module = compile_('policy p { remove blocks("blocks.1.**") { ratio = 100% } }', net, (X,)).finalize()
    fxcompress.save(module, tmp_path / "art")
    loaded = fxcompress.load(tmp_path / "art")
    assert torch.equal(loaded(X), module(X))
    again = capture(loaded, (X,))
    assert labels(again) == {"blocks.0", "blocks.2", "blocks.3", "blocks.4"}
    once_more = Remove(ratio=1.0).apply(again, '"blocks.3.**" | "blocks.0.**"', "blocks")
    torch.testing.assert_close(once_more.module.eval()(X), skipping(net, {0, 1, 3})(X))


def test_explain_says_which_rule_took_a_layer_out(tmp_path: Path) -> None:
    module = compile_('policy p { remove blocks("blocks.1.**") { ratio = 100% } }', tower(), (X,)).finalize()
    fxcompress.save(module, tmp_path / "art")
    text = explain(tmp_path / "art", "blocks.1.conv1").show()
    assert "gone" in text and "1. remove, phase (start)" in text and "left with the block blocks.1" in text
    assert "no rule touched it" in explain(tmp_path / "art", "blocks.3.conv1").show()


def test_a_budget_solves_how_many_leave() -> None:
    result = compile_("policy p { remove blocks(*) {}\n budget macs <= 60% of dense }", tower(*["plain"] * 10), (X,))
    stem, block, head = 64 * 3 * 4 * 9, 64 * (4 * 4 * 9 + 4 * 4), 4 * 5  # MACs at 8x8
    counts = [count for count in range(11) if stem + count * block + head <= 0.6 * (stem + 10 * block + head)]
    assert len(labels(result.captured)) == max(counts)
    assert result.plan.after.macs == stem + max(counts) * block + head


def test_provenance_says_what_is_read_past() -> None:
    captured = Remove(ratio=1.0).apply(capture(tower(), (X,)), '"blocks.1.**"', "blocks")
    details = [entry.detail for node in captured.graph.nodes for entry in node.meta.get("origins", ())]
    assert details and set(details) == {"reads past blocks.1"}


def test_the_input_is_left_as_it_was_and_modes_and_flags_stay() -> None:
    net = tower()
    net.blocks[0].conv1.weight.requires_grad_(False)
    captured = capture(net.train(), (X,))
    before = {name: value.clone() for name, value in captured.module.state_dict().items()}
    removed = Remove(ratio=0.5, verify="float64").apply(captured, "*", "blocks")
    assert all(torch.equal(value, before[name]) for name, value in captured.module.state_dict().items())
    assert captured.module.training and removed.module.training
    assert all(p.dtype == torch.float32 for p in removed.module.parameters())
    frozen = [name for name, p in removed.module.named_parameters() if not p.requires_grad]
    assert set(frozen) <= {"blocks.0.conv1.weight"}


# Ranked on data


def test_activation_is_the_block_influence() -> None:
    """1 - cos(x, y) over channels (Men et al., 2024), computed here by hooks on the model itself."""
    net = tower("scaled", "scaled", "scaled", "scaled")
    with torch.no_grad():
        for factor, block in zip((1.0, 0.2, 3.0, 0.05), net.blocks, strict=True):
            block.scale.mul_(factor)
    influence = []
    hooks = [block.register_forward_hook(lambda _, given, result: influence.append(
        (1 - nn.functional.cosine_similarity(given[0], result, dim=1)).mean().item())) for block in net.blocks]
    net(X)
    for hook in hooks:
        hook.remove()
    least = sorted(range(4), key=lambda place: influence[place])[:2]
    captured = capture(net, (X,))
    removed = Remove(ratio=0.5, by="activation").apply(captured, "*", "blocks", calibration=[X[:1], X[1:]])
    assert labels(captured) - labels(removed) == {f"blocks.{place}" for place in least}
    site = Site((), calibration=Calibration.of([X], captured))
    scores = block_scores(Remove(ratio=0.5, by="activation"), captured, site, list(find_blocks(captured).blocks))
    assert scores.tolist() == pytest.approx(influence, rel=1e-4)


def test_activation_wants_data() -> None:
    with pytest.raises(FxcError, match="FXC0346"):
        Remove(ratio=0.5, by="activation").apply(capture(tower(), (X,)), "*", "blocks")


def test_a_ramp_of_blocks_is_refused_by_the_plan() -> None:
    text = "policy p { phase a over epochs 0..4 { remove blocks(*) { ratio = linear(0% -> 50%), every = 1 epoch } } }"
    with pytest.raises(FxcError, match="FXC0507"):
        fxcompress.plan(read_policy(text), tower(), (X,))
