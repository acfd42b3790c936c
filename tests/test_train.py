"""`Trainer`: what is trained, in which order, and what it comes to, against loops and formulas written out here."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_nets import EXAMPLE, POLICY, SETTINGS, Net, Plain, data, masks, samples, state_of, trainer

import fxcompress
from fxcompress.cli import run as run_command
from fxcompress.diagnostics import FxcError, PlanError
from fxcompress.nn import Mask
from fxcompress.training import Settings
from fxcompress.training.data import Order
from fxcompress.training.run import Run
from fxcompress.training.settings import make_optimizer, make_schedule
from fxcompress.training.step import Whole, agree, has_unread, prediction, signature


def run(arguments: list[str]) -> int:
    """The exit code of a command line."""
    try:
        return run_command(arguments)
    except SystemExit as done:
        return int(done.code or 0)


def code_of(error: pytest.ExceptionInfo[FxcError]) -> str:
    return error.value.diagnostics[0].code


@pytest.fixture
def fresh() -> Iterator[None]:
    """Accelerate as in a new process: it keeps one precision a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


# The loop

def by_hand(policy: str, model: nn.Module, epochs: int = 6, batch: int = 16) -> fxcompress.Result:
    """The same training as a plain loop of torch: AdamW, a cosine by the epoch, a clipped norm."""
    images, labels = data()[0].tensors
    order = Order(len(labels), batch, 0)
    result = fxcompress.compile(policy, model, EXAMPLE, epochs=epochs, steps_per_epoch=order.steps)
    optimizer = result.follow(torch.optim.AdamW(result.module.parameters(), lr=0.01))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    result.module.train()
    for epoch in range(epochs):
        order.begin(epoch)
        places = [index for _, index in order]
        for start in range(0, len(places), batch):
            chosen = places[start:start + batch]
            optimizer.zero_grad()
            F.cross_entropy(result.module(images[chosen]), labels[chosen]).backward()
            nn.utils.clip_grad_norm_(result.module.parameters(), 1.0)
            optimizer.step()
            result.step()
        result.epoch_end()
        scheduler.step()
    return result


def test_it_is_the_plain_loop() -> None:
    model = Net(dropout=0)
    expected = by_hand(POLICY, model).module.state_dict()
    trained = trainer(model=model, keep_best=False).fit()
    found = state_of(trained)
    assert found.keys() == expected.keys() and trained.result.done
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert found["conv.weight"].shape[0] == 4 and trained.result.clock.steps == 36


def test_a_batch_may_be_cut_into_parts() -> None:
    more = {"optimizer": "SGD(lr=0.05, momentum=0.9)", "policy": "policy p { mask linear { sparsity = 50% } }"}
    whole = state_of(trainer(model=Plain(), **more).fit())
    parts = state_of(trainer(model=Plain(), accumulate=4, **more).fit())
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


def test_the_norm_of_the_gradient_is_clipped() -> None:
    model = Plain()
    before = copy.deepcopy(model.state_dict())
    after = state_of(trainer(policy="policy p { mask linear { sparsity = 0% } }", model=model, clip=0.25, epochs=1,
                             given=(samples(16, 2), samples(16, 3)), optimizer="SGD(lr=1.0)", scheduler=None).fit())
    moved = torch.cat([(after[name] - value).flatten() for name, value in before.items()])
    assert moved.norm().item() == pytest.approx(0.25, rel=1e-4)  # one step of -1.0 times the clipped gradient


def test_scores_of_a_phase_between_epochs_see_the_last_gradients() -> None:
    policy = "policy p { phase late over epochs 1..2 { remove channels(conv2d) { ratio = 50%, by = taylor } } }"
    assert state_of(trainer(policy=policy, epochs=2).fit())["conv.weight"].shape[0] == 4


# Best weights, early stopping

def test_the_best_weights_are_those_of_the_best_epoch() -> None:
    seen: dict[int, dict[str, Tensor]] = {}

    def keep(run: Run, moment: str) -> None:
        if moment == "epoch":
            seen[run.epoch] = {name: value.clone() for name, value in run.module.state_dict().items()}

    policy = "policy p { phase a over epochs 0..3 { mask linear { sparsity = linear(0% -> 90%) } } }"
    trained = trainer(policy=policy, optimizer="SGD(lr=0.3)", scheduler=None, monitor="loss").fit(told=keep)
    losses = {row["epoch"]: row["validation"]["loss"] for row in trained.history if row["epoch"] >= 3}
    best = min(losses, key=lambda epoch: losses[epoch])
    assert trained.best_epoch == best  # not one of those before the masks are at rest
    assert all(torch.equal(value, seen[int(best)][name]) for name, value in state_of(trained).items())
    assert trained.final["loss"] == pytest.approx(losses[best], rel=1e-5)


def test_it_stops_when_nothing_gets_better() -> None:
    policy = "policy p { phase a over epochs 0..2 { mask linear { sparsity = linear(0% -> 50%) } } }"
    trained = trainer(policy=policy, optimizer="SGD(lr=0.0)", scheduler=None, epochs=9, patience=2, monitor="loss",
                      model=Net(dropout=0)).fit()
    assert trained.result.clock.epochs < 9 and trained.result.done


@pytest.mark.parametrize("text", ["SGD(**{'lr': 1})", "SGD(0.1)", "torch.optim.SGD(lr=1)", "SGD(lr=open('x'))", "",
                                  "LBFGS", "SGD(lr=0.1", "(" * 500, "Optimizer"])
def test_names_with_settings_are_not_evaluated(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_optimizer(text, [nn.Parameter(torch.zeros(1))])
    assert code_of(caught) == "FXC0803"


def test_metrics_of_ones_own_and_their_names() -> None:
    def top2(output: Tensor, target: Tensor) -> Tensor:
        return (output.topk(2, 1).indices == target[:, None]).any(1).double().mean()

    trained = trainer(metrics={"top2": top2}, monitor="top2").fit()
    for row in trained.history:
        assert row["validation"]["top2"] >= row["validation"]["accuracy"]
    with pytest.raises(PlanError) as caught:
        trainer(monitor="top2").fit()
    assert code_of(caught) == "FXC0804"


# All phases, in order

DEPLOY = """policy whole {
    phase shrink { remove channels(conv2d) { ratio = 50% } }
    phase sparsify over epochs 0..2 after shrink { mask linear { sparsity = cubic(0% -> 50%), every = 2 steps } }
    phase deploy after sparsify { quantize conv2d | linear { calibrate = 64 samples } }
}
"""


def test_all_phases_run_and_the_artifact_is_saved(tmp_path: Path) -> None:
    trained = trainer(tmp_path, DEPLOY, epochs=3).fit()
    assert trained.result.progress == {"shrink": 1.0, "sparsify": 1.0, "deploy": 1.0}
    assert trained.deployed is not None and trained.artifact == tmp_path / "artifact"
    kinds = {type(module).__name__ for module in trained.deployed.modules()}
    assert kinds & {"IntLinear", "IntConv2d"}  # quantizers have ranges: training data were shown to them
    loaded = fxcompress.load(tmp_path / "artifact")
    images = data()[1].tensors[0]
    assert torch.equal(loaded(images), trained.deployed(images))
    report = trained.deployed.meta["fxcompress"]["report"]
    assert report["trained"] == {"steps": 18, "epochs": 3}
    assert report["training"]["epochs"][-1]["validation"] == trained.history[-1]["validation"]
    assert trained.final["accuracy"] == (loaded(images).argmax(1) == data()[1].tensors[1]).double().mean().item()


def test_a_policy_that_needs_no_data_is_given_none() -> None:
    result = trainer().fit().result
    assert result._executor.calibration is None


@pytest.mark.parametrize(("window", "fits"), [("epochs 0..6", True), ("epochs 0..7", False), ("steps 0..36", True),
                                              ("steps 0..37", False)])
def test_a_training_has_to_last(window: str, fits: bool) -> None:
    policy = f"policy p {{ phase a over {window} {{ mask linear {{ sparsity = linear(0% -> 50%) }} }} }}"
    if fits:
        assert trainer(policy=policy).fit().result.done
        return
    with pytest.raises(PlanError) as caught:
        trainer(policy=policy)
    assert code_of(caught) == "FXC0808"


# Lottery tickets (Frankle and Carbin, 2019), and pruning with fine-tuning

TICKET = """policy ticket {
    phase find over epochs 2..6 {
        mask linear { sparsity = linear(20% -> 60%), every = 2 epochs, scope = global, rewind = initial }
    }
}
"""


def iterate(rewind: bool, rounds: tuple[tuple[int, float], ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train, prune the smallest of all weights that the linear layers have, rewind (or not), repeat, with plain SGD.
    Each round is (epochs, sparsity); the last one only trains. Returns weights and masks."""
    torch.manual_seed(0)
    model = Plain()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["fc1.weight", "fc2.weight"]
    keep = {name: torch.ones_like(start[name], dtype=torch.bool) for name in names}
    images, labels = data()[0].tensors
    order, epoch = Order(len(labels), 16, 0), 0
    for epochs, sparsity in rounds:
        for _ in range(epochs):
            order.begin(epoch)
            places = [index for _, index in order]
            for at in range(0, len(places), 16):
                chosen = places[at:at + 16]
                dense = dict(model.named_parameters())
                seen = {name: value * keep[name] if name in keep else value for name, value in dense.items()}
                loss = F.cross_entropy(torch.func.functional_call(model, seen, (images[chosen],)), labels[chosen])
                gradients = torch.autograd.grad(loss, list(dense.values()))
                for value, gradient in zip(dense.values(), gradients, strict=True):
                    value.data -= 0.05 * gradient
            epoch += 1
        if sparsity < 0:
            break
        scores = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in names])
        count = round(sparsity * len(scores))
        limit = scores.sort().values[count]
        keep = {name: model.get_parameter(name).detach().abs() >= limit for name in names}
        if rewind:
            model.load_state_dict(start)
    return {name: value.detach() for name, value in model.named_parameters()}, keep


@pytest.mark.parametrize("rewind", [True, False], ids=["rewound", "fine-tuned"])
def test_iterative_magnitude_pruning(rewind: bool) -> None:
    policy = TICKET if rewind else TICKET.replace(", rewind = initial", "")
    trained = trainer(policy=policy, model=Plain(), epochs=8, optimizer="SGD(lr=0.05)", scheduler=None, clip=None,
                      keep_best=False).fit()
    weights, keep = iterate(rewind, ((2, 0.2), (2, 0.4), (2, 0.6), (2, -1.0)))
    found = masks(trained.result.module)
    assert {name: int(mask.sum()) for name, mask in found.items()} == {name: int(m.sum()) for name, m in keep.items()}
    for name, mask in keep.items():
        assert torch.equal(found[name], mask)
    for name, value in weights.items():
        torch.testing.assert_close(trained.result.module.get_parameter(name).detach(), value, rtol=1e-4, atol=1e-6)


# What a step is made of

def test_terms_of_a_distillation_are_the_loss() -> None:
    """The seam to `distill`, by a stand-in for its module."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, targets: Tensor | None = None, losses: bool = False) -> Any:
            output = self.linear(x)
            if not losses:
                return output
            assert targets is not None
            terms = {"hard": F.cross_entropy(output, targets), "soft": output.square().mean()}
            return SimpleNamespace(output=output, terms=terms, total=0.1 * terms["hard"] + 0.9 * terms["soft"])

    torch.manual_seed(0)
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    result: Any = SimpleNamespace(module=Fused(), terms=("hard", "soft"))
    loss, terms = Whole(result, F.cross_entropy)((x,), {}, labels)
    output = result.module(x)
    assert torch.equal(loss, 0.1 * F.cross_entropy(output, labels) + 0.9 * output.square().mean())
    assert list(terms) == ["hard", "soft"]
    result.terms = ()  # its phase has ended: the task's loss again
    loss, terms = Whole(result, F.cross_entropy)((x,), {}, labels)
    assert torch.equal(loss, F.cross_entropy(output, labels)) and terms == {}


def test_outputs_of_many_kinds_have_a_prediction() -> None:
    x = torch.randn(2, 3)
    for output in (x, (x, None), {"logits": x, "loss": None}, {"out": x}, SimpleNamespace(logits=x)):
        assert prediction(output) is x


def test_a_cut_parameter_is_wrapped_anew() -> None:
    model = Net()
    before = signature(model)
    assert signature(model) == before
    model.conv.weight.data = model.conv.weight.data[:4].clone()
    assert signature(model) != before


def test_parameters_that_nothing_reads_are_found() -> None:
    result = fxcompress.compile("policy p { mask linear { sparsity = 50% } }", Net(), EXAMPLE)
    assert not has_unread(result.module)
    result.module.register_parameter("spare", nn.Parameter(torch.zeros(1)))
    assert has_unread(result.module)


def test_buffers_are_averaged_over_processes() -> None:
    model = Net()
    model.mask = Mask((3,), "gradient")
    model.norm.running_mean += 2.0

    class Two:
        num_processes = 2

        def reduce(self, value: Tensor, reduction: str) -> Tensor:
            assert reduction == "mean"
            return (value + torch.zeros_like(value)) / 2  # as if the other process had zeros

    weights = {name: value.clone() for name, value in model.named_parameters()}
    agree(Two(), model)  # type: ignore[arg-type]
    assert torch.equal(model.norm.running_mean, torch.ones(8)) and bool(model.mask.mask.all())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("text", ["CosineAnnealingLR", "OneCycleLR(max_lr=0.2)", "ReduceLROnPlateau(patience=0)",
                                  "StepLR(step_size=1)", "LinearLR"])
def test_groups_that_come_later_follow_the_scheduler(text: str) -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = make_optimizer("AdamW(lr=0.1)", [first])
    schedule = make_schedule(Settings(4, scheduler=text, device="cpu"), optimizer, 3)
    assert schedule is not None
    for step in range(10):
        if step == 4:
            optimizer.add_param_group({"params": [second]})
        first.grad = second.grad = torch.ones(1)
        optimizer.step()
        schedule.follow(optimizer)
        schedule.step()
        if step % 3 == 2:
            schedule.epoch_end(1.0)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
    assert rates != {0.1}


# Precision

def test_bf16_is_computed_in_and_weights_stay_float32(fresh: None) -> None:
    seen: set[torch.dtype] = set()

    class Spy(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    def watch(run: Run, moment: str) -> None:
        if not seen:
            run.module.get_submodule("conv1").register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))

    policy = "policy p {\n    precision = bf16\n    mask linear { sparsity = 50% }\n}\n"
    trained = trainer(policy=policy, model=Spy()).fit(told=watch)
    assert torch.bfloat16 in seen
    assert {value.dtype for value in trained.result.module.parameters()} == {torch.float32}
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert trained.deployed is not None and trained.deployed(data()[1].tensors[0]).dtype == torch.float32


def test_rewrites_are_seen_under_bf16(fresh: None) -> None:
    """Accelerate puts a forward function of its own onto what it wraps: that must not be the module of a policy."""
    trained = trainer(policy=POLICY.replace("policy small {", "policy small {\n    precision = bf16")).fit()
    assert trained.result.done and state_of(trained)["conv.weight"].shape[0] == 4


def test_fp16_needs_a_gpu_and_a_process_has_one_precision(fresh: None) -> None:
    policy = "policy p {\n    precision = %s\n    mask linear { sparsity = 50%% }\n}\n"
    with pytest.raises(PlanError) as caught:
        trainer(policy=policy % "fp16")
    assert code_of(caught) == "FXC0807" and "needs a GPU" in caught.value.diagnostics[0].message
    trainer(policy=policy % "bf16")
    with pytest.raises(PlanError) as caught:
        trainer(policy=policy % "fp32")
    assert code_of(caught) == "FXC0807" and "can't train so" in caught.value.diagnostics[0].message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(fresh: None, tmp_path: Path, precision: str) -> None:
    policy = POLICY.replace("policy small {", f"policy small {{\n    precision = {precision}")
    trained = trainer(tmp_path, policy=policy, device="auto").fit()
    assert trained.result.done and next(trained.result.module.parameters()).is_cuda
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert (trainer(tmp_path, policy=policy, device="auto").fit(resume=True)).history == trained.history


def test_precision_in_the_language() -> None:
    from fxcompress.policy import format_policy, parse
    from fxcompress.policy.check import check_source
    from fxcompress.source import Source

    def codes(text: str) -> list[str]:
        return [item.code for item in check_source(Source("p.fxc", text)).diagnostics if item.severity == "error"]

    action = "mask linear { sparsity = 50% }"
    assert parse(f"policy p {{ precision = bf16, {action} }}").precision == "bf16"
    assert parse(f"policy p {{ {action} }}").precision is None
    assert codes(f"policy p {{ precision = bf8, {action} }}") != []
    assert codes(f"policy p {{ precision = 16, {action} }}") != []
    assert codes(f"policy p {{ precision = bf16, precision = fp16, {action} }}") == ["FXC0104"]
    assert codes(f"policy p {{ sparsity = 5%, {action} }}") == ["FXC0011"]
    assert codes(f"policy p {{ phase a {{ precision = bf16, {action} }} }}") == ["FXC0011"]
    text = f"policy p {{\n    precision = bf16\n    {action}\n}}\n"
    assert format_policy(text) == text


def test_without_validation_data_the_last_weights_are_kept() -> None:
    trained = trainer(given=fxcompress.training.Data(samples(96, 2))).fit()
    assert trained.best_epoch is None and trained.final == {} and "validation" not in trained.history[0]
    assert SETTINGS["epochs"] == len(trained.history)


def test_policies_in_the_manual_are_right() -> None:
    from fxcompress.policy import check_source, format_policy
    from fxcompress.source import Source

    text = (Path(__file__).parent.parent / "docs/training.md").read_text(encoding="utf-8")
    policies = re.findall(r"^```fxc\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(policies) == 2
    for policy in policies:
        assert check_source(Source("manual", policy)).diagnostics == () and format_policy(policy) == policy
    options = set(re.findall(r"`(--[a-z-]+)", text)) - {"--cpu", "--multi_gpu", "--no-keep-best"}
    from typer.main import get_command

    from fxcompress.app import app

    command: Any = get_command(app)
    known = {name for option in command.commands["train"].params for name in option.opts}
    assert options <= known
