"""`distill` in time: phases, ramps, checkpoints, optimizers, and other passes beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from engine_nets import EXAMPLE, Net, batches
from torch import Tensor, nn

import fxcompress
from fxcompress.engine import Result
from fxcompress.graph.distilled import distillations

TEXT = """policy p(teacher: model) {
    phase learn over steps 0..6 {
        distill from teacher {
            pair output <- output { loss = kl, temperature = %s, weight = 0.9 }
            pair "conv" <- "conv" { loss = hint }
        }
        %s
    }
    %s
}"""


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 11, 3), nn.Linear(11 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def start(text: str, **more: object) -> tuple[Result, Net, Wide]:
    torch.manual_seed(0)
    student, teacher = Net(), Wide()
    return fxcompress.compile(text, student, EXAMPLE, teacher=teacher, **more), student, teacher  # type: ignore[arg-type]


def learn(result: Result, optimizer: torch.optim.Optimizer, steps: int, seed: int = 2, skip: int = 0) -> None:
    data = batches(seed)
    for _ in range(skip):
        next(data)
    for _ in range(steps):
        images, labels = next(data)
        optimizer.zero_grad()
        if result.terms:
            found = result.module(images, targets=labels, losses=True)
            loss = found.total + 0.1 * F.cross_entropy(found.output, labels)
        else:
            loss = F.cross_entropy(result.module(images), labels)
        loss.backward()
        optimizer.step()
        result.step()


def test_a_temperature_moves_by_the_step_and_stops_at_its_floor() -> None:
    text = TEXT.replace("0..6", "0..200") % ("linear(10 -> 1, by 0.07 per step)", "", "")
    result = start(text)[0]
    for step in range(140):
        assert result.temperatures["output_kl"] == pytest.approx(max(1.0, 10 - 0.07 * step), abs=1e-5), step
        result.step()
    assert result.temperatures["output_kl"] == 1.0


def test_a_rate_by_the_epoch() -> None:
    text = TEXT.replace("steps 0..6", "epochs 0..9") % ("linear(2 -> 8, by 1.5 per epoch)", "", "")
    result = start(text, steps_per_epoch=4)[0]
    seen = []
    for _ in range(6):
        for _ in range(4):
            seen.append(result.temperatures["output_kl"])
            result.step()
        result.epoch_end()
    assert seen == [value for value in (2.0, 3.5, 5.0, 6.5, 8.0, 8.0) for _ in range(4)]


def test_the_teacher_goes_when_its_phase_ends() -> None:
    result, student, _ = start(TEXT % ("linear(8 -> 1)", "", ""))
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.05, momentum=0.9))
    module, names = result.module, set(dict(student.named_parameters()))
    assert set(dict(module.named_parameters())) > names
    learn(result, optimizer, 5)
    assert result.terms and not result.done
    learn(result, optimizer, 1)
    assert result.terms == () and result.done and result.module is module
    assert set(dict(module.named_parameters())) == names and list(module.state_dict()) == list(student.state_dict())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == set(map(id, module.parameters())), "adapters leave the optimizer"
    assert all(id(parameter) in trained for parameter in optimizer.state)
    learn(result, optimizer, 2)
    assert list(result.finalize().state_dict()) == list(student.state_dict())


def test_adapters_of_a_later_phase_join_the_optimizer_that_follows() -> None:
    text = (TEXT % ("4", "", "")).replace("0..6", "3..9")
    result = start(text)[0]
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.05))
    learn(result, optimizer, 3)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert result.terms and trained == set(map(id, result.module.parameters()))
    adapter = result.module.get_parameter("distill.fused.adapters.conv_hint.map.weight")
    before = adapter.detach().clone()
    learn(result, optimizer, 1)
    assert not torch.equal(adapter, before)


@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_run_that_is_taken_up_ends_with_the_same_weights(stop: int) -> None:
    """Before, at, and behind the end of the teaching; behind it channels leave, which a teacher would hold."""
    more = "phase thin over steps 7..10 after learn { remove channels(\"fc1\") { ratio = 25% } }"
    text = TEXT % ("linear(8 -> 1, by 0.5 per step)", "mask linear { sparsity = cubic(0% -> 50%) }", more)

    def begin() -> tuple[Result, torch.optim.Optimizer]:
        result = start(text)[0]
        return result, result.follow(torch.optim.Adam(result.module.parameters(), lr=0.01))

    whole, optimizer = begin()
    learn(whole, optimizer, 12)
    first, optimizer = begin()
    learn(first, optimizer, stop)
    kept = {"result": first.state_dict(), "module": first.module.state_dict(), "optimizer": optimizer.state_dict()}
    second = start(text)[0]
    second.load_state_dict(kept["result"])
    second.module.load_state_dict(kept["module"])
    optimizer = second.follow(torch.optim.Adam(second.module.parameters(), lr=0.01))
    optimizer.load_state_dict(kept["optimizer"])
    assert second.terms == first.terms and second.temperatures == first.temperatures
    learn(second, optimizer, 12 - stop, skip=stop)
    assert list(whole.module.state_dict()) == list(second.module.state_dict())
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[key]), key


def test_stripping_by_hand_is_kept_in_a_checkpoint() -> None:
    text = TEXT % ("linear(8 -> 1)", "", "")
    result = start(text)[0]
    result.step()
    result.strip()
    other = start(text)[0]
    other.load_state_dict(result.state_dict())
    assert other.terms == () and list(other.module.state_dict()) == list(result.module.state_dict())
    for _ in range(6):
        other.step()
    assert other.done


def test_masks_that_ramp_beside_the_teacher() -> None:
    result, _, teacher = start(TEXT % ("4", "mask linear { sparsity = cubic(0% -> 80%), every = 2 steps }", ""))
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.05))
    learn(result, optimizer, 4)
    x = EXAMPLE[0]
    found = result.module.eval()(x, losses=True)
    expected = 16 * F.kl_div(F.log_softmax(found.output / 4, 1), F.softmax(teacher(x) / 4, 1), reduction="batchmean")
    torch.testing.assert_close(found.terms["output_kl"], expected)
    learn(result, optimizer, 2)
    final = result.finalize()
    assert float((final.get_parameter("fc1.weight") == 0).float().mean()) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("mode", ["qat", "static", "weight_only"])
def test_quantized_students_learn_from_their_dense_original(mode: str) -> None:
    text = """policy p {
        phase learn over steps 0..8 {
            distill from original { pair output <- output { loss = mse } pair "fc1" <- "fc1" { loss = mse } }
            quantize conv2d | linear { mode = %s }
        }
    }""".replace(" } pair", " }\n pair") % mode
    torch.manual_seed(0)
    student = Net()
    data = [next(batches())[0] for _ in range(3)]
    result = fxcompress.compile(text, student, EXAMPLE, calibration=None if mode == "weight_only" else data)
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.01))
    for _ in range(6):
        learn(result, optimizer, 1)
    found = result.module.eval()(EXAMPLE[0], losses=True)
    torch.testing.assert_close(found.terms["output_mse"], F.mse_loss(found.output, student.eval()(EXAMPLE[0])))
    assert float(found.terms["output_mse"].detach()) > 0
    learn(result, optimizer, 3)
    assert result.terms == ()
    final = result.finalize()
    assert not distillations(final.graph) and final(EXAMPLE[0]).shape == (4, 4)


def test_channels_leave_behind_the_teaching_and_not_where_it_reads() -> None:
    removal = 'remove channels("fc1") { ratio = 50% }'
    text = TEXT % ("4", "", f"phase thin after learn {{ {removal} }}")
    result, student, teacher = start(text)
    plan = fxcompress.plan(text, student, EXAMPLE, teacher=teacher)
    assert plan.after.params < plan.before.params, "the plan takes the teacher out, too"
    for _ in range(6):
        result.step()
    assert result.done and result.module.get_parameter("fc1.weight").shape == (12, 128)


def test_channels_that_a_tap_reads_stay_while_it_does() -> None:
    """A removal along a ramp, beside the teaching: what is tapped is held, and everything else leaves."""
    text = (TEXT % ("4", 'remove channels(conv2d | "fc1") { ratio = linear(0% -> 50%), every = 2 steps }', "")).replace(
        'pair "conv" <- "conv"', 'pair "relu" <- "relu"')
    result, _, teacher = start(text)
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.01))
    learn(result, optimizer, 5)
    assert result.module.get_parameter("conv.weight").shape[0] == 8, "read by the tap"
    assert result.module.get_parameter("fc1.weight").shape[0] < 24
    found = result.module.eval()(EXAMPLE[0], losses=True)
    expected = 16 * F.kl_div(F.log_softmax(found.output / 4, 1), F.softmax(teacher(EXAMPLE[0]) / 4, 1),
                             reduction="batchmean")
    torch.testing.assert_close(found.terms["output_kl"], expected)
    learn(result, optimizer, 1)
    assert result.done and result.module.get_parameter("fc1.weight").shape[0] == 12


def test_quantizers_that_come_while_a_teacher_is_there() -> None:
    text = """policy p(teacher: model) {
        phase learn over steps 0..8 {
            distill from teacher { pair "norm" <- "conv" { loss = similarity } }
        }
        phase round over steps 3..9 { quantize conv2d | linear { mode = qat } }
    }"""
    result = start(text)[0]
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.01))
    learn(result, optimizer, 5)
    assert result.terms == ("norm_similarity",)
    learn(result, optimizer, 4)
    assert result.terms == () and result.done
    assert result.finalize()(EXAMPLE[0]).shape == (4, 4)


def test_a_teacher_that_is_given_in_training_mode_teaches_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    student, teacher = Net(), Net().train()
    x = EXAMPLE[0]
    result = fxcompress.compile("policy p(t: model) { distill from t { pair output <- output { loss = mse } } }",
                                student, x, teacher=teacher)
    found = result.module.eval()(x, losses=True)
    assert teacher.training and teacher.norm.training
    torch.testing.assert_close(found.total, F.mse_loss(found.output, teacher.eval()(x)))


def test_budgets_do_not_count_the_teacher() -> None:
    text = (TEXT % ("4", "", "budget params <= 100% of dense"))
    assert start(text)[0].plan.budgets[0].state == "met"


def test_ddp_trains_the_joined_module(tmp_path: Path) -> None:
    """One process (gloo): hooks run in `forward`, buffers of the teacher aren't sent about, adapters take part."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        result = start(TEXT % ("4", "", ""))[0]
        wrapped = nn.parallel.DistributedDataParallel(result.module)
        images, labels = next(batches())
        wrapped(images, targets=labels, losses=True).total.backward()
        plain = start(TEXT % ("4", "", ""))[0].module
        plain(images, targets=labels, losses=True).total.backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(result.module.get_parameter(name).grad, parameter.grad)
        assert [name for name in wrapped.parameters_to_ignore if "teacher" in name]
    finally:
        torch.distributed.destroy_process_group()


def test_a_ramp_wants_time() -> None:
    with pytest.raises(fxcompress.PolicyError, match="FXC0520"):
        start("policy p(teacher: model) { distill from teacher { pair output <- output "
              "{ loss = kl, temperature = linear(8 -> 1) } } }")


def test_the_adapter_is_drawn_by_the_seed() -> None:
    weights = []
    for draw in (1, 2):
        torch.manual_seed(0)
        student, teacher = Net(), Wide()
        torch.manual_seed(draw)
        result = fxcompress.compile(TEXT % ("4", "", ""), student, EXAMPLE, teacher=teacher, seed=5)
        weights.append(result.module.get_parameter("distill.fused.adapters.conv_hint.map.weight"))
    assert torch.equal(*weights)
