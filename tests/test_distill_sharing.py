"""Stages that both models compute from the same frozen tensors, and when they don't."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import fxcompress
from fxcompress.diagnostics import PlanError

POLICY = 'policy p(teacher: model) { distill from teacher { pair output <- output { loss = mse } %s } %s }'


class Net(nn.Module):
    def __init__(self, stem: nn.Module, width: int) -> None:
        super().__init__()
        self.stem = stem
        self.conv, self.fc = nn.Conv2d(6, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(self.stem(x))).mean((2, 3)))


def frozen_stem() -> nn.Module:
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    norm.weight.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU()).requires_grad_(False)


def models(stem: nn.Module | None = None) -> tuple[Net, Net, Tensor]:
    stem = frozen_stem() if stem is None else stem
    torch.manual_seed(1)
    return Net(stem, 5), Net(stem, 9).eval(), torch.randn(3, 3, 8, 8)


def teachers_layers(module: nn.Module) -> set[str]:
    return {name.split(".")[1] for name, _ in module.get_submodule("distill.fused").named_buffers()
            if name.startswith("teacher.")}


def test_a_shared_frozen_stem_is_computed_once() -> None:
    student, teacher, x = models()
    text = POLICY % ("", "")
    assert any("computed once for both: stem" in note
               for note in fxcompress.plan(text, student, x, teacher=teacher).steps[0].notes)
    result = fxcompress.compile(text, student, x, teacher=teacher)
    assert teachers_layers(result.module) == {"conv", "fc"}
    found = result.module(x, losses=True)
    torch.testing.assert_close(found.total, F.mse_loss(student(x), teacher(x)))
    found.total.backward()
    F.mse_loss(student(x), teacher(x).detach()).backward()
    torch.testing.assert_close(result.module.get_parameter("conv.weight").grad, student.conv.weight.grad)
    assert list(result.strip().state_dict()) == list(student.state_dict())


@pytest.mark.parametrize("why", ["copied", "trained", "told not to", "masked", "by mode"])
def test_what_isnt_the_same_is_computed_twice(why: str) -> None:
    stem = frozen_stem()
    if why == "by mode":
        stem = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1)).requires_grad_(False)
    student, teacher, x = models(stem)
    if why == "copied":
        teacher = copy.deepcopy(teacher)
    if why == "trained":
        student.stem[0].requires_grad_(True)  # type: ignore[index]
    more = "mask \"stem.0\" { sparsity = 50% }" if why == "masked" else ""
    text = POLICY % ("\n share = false" if why == "told not to" else "", f"\n{more}")
    module = fxcompress.compile(text, student, x, teacher=teacher).module.eval()
    assert "stem" in teachers_layers(module)
    torch.testing.assert_close(module(x, losses=True).total, F.mse_loss(module(x), teacher(x)))


def test_the_same_start_of_a_stage_is_shared_up_to_where_it_differs() -> None:
    stem = frozen_stem()
    student, teacher, x = models(stem)
    teacher.stem = nn.Sequential(stem[0], nn.Sigmoid())  # type: ignore[index]
    module = fxcompress.compile(POLICY % ("", ""), student, x, teacher=teacher).module
    assert teachers_layers(module) == {"conv", "fc"} and "sigmoid" in module.get_submodule("distill.fused").code
    torch.testing.assert_close(module(x, losses=True).total, F.mse_loss(student(x), teacher(x)))


def test_self_distillation_of_a_masked_student_shares_its_frozen_stem() -> None:
    student, _, x = models()
    text = """policy p { distill from original { pair output <- output { loss = mse } }
        mask conv2d - "stem.0" { sparsity = 50% } }"""
    module = fxcompress.compile(text, student, x).module
    assert teachers_layers(module) == {"conv", "fc"}
    torch.testing.assert_close(module(x, losses=True).total, F.mse_loss(module(x), student(x)))


def test_a_shared_stage_may_not_be_rewritten_while_it_is_shared() -> None:
    student, teacher, x = models()
    text = """policy p(teacher: model) {
        phase learn over steps 0..10 { distill from teacher { pair output <- output { loss = mse } } }
        phase thin over steps 5..10 { mask conv2d { sparsity = 50% } }
    }"""
    for act in (fxcompress.plan, fxcompress.compile):
        with pytest.raises(PlanError, match="FXC0356"):
            act(text, student, x, teacher=teacher)
    after = text.replace("5..10", "10..20")
    with pytest.raises(PlanError, match="FXC0356"):
        fxcompress.plan(after, student, x, teacher=teacher)
    fxcompress.plan(after.replace("thin over", "thin after learn over").replace("thin after learn over steps 10..20",
                                                                                 "thin over steps 10..20 after learn"),
                    student, x, teacher=teacher)


class Pooling(nn.Module):
    """Rectifies, pools and clamps, and gives one of its rectified maps too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 7, 3, padding=1), nn.Linear(7, 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.one(F.relu(x))), 3, 2, 1)
        x = F.max_pool2d(self.act(self.two(x)), 2)
        return self.fc(F.relu6(x.mean((2, 3)) + 1))


@pytest.mark.parametrize("tap", ["output", "act"])
def test_a_teacher_that_pools_and_works_in_place_gives_the_same(tap: str) -> None:
    student, _, x = models()
    torch.manual_seed(2)
    teacher, given = Pooling().eval(), x.clone()
    text = POLICY.replace("pair output <- output { loss = mse }", f'pair output <- "{tap}" {{ loss = similarity }}') % (
        "", "")
    module = fxcompress.compile(text, student, x, teacher=teacher).module
    found, code = module(x, losses=True).total, module.get_submodule("distill.fused").code
    kept: list[Tensor] = []
    teacher.act.register_forward_hook(lambda _, __, output: kept.append(output))
    expected = teacher(x) if tap == "output" else (teacher(x), kept[0])[1]

    def similar(value: Tensor) -> Tensor:
        rows = value.flatten(1)
        return F.normalize(rows @ rows.T, dim=1)

    torch.testing.assert_close(found, ((similar(student(x)) - similar(expected)) ** 2).sum() / len(x) ** 2)
    assert torch.equal(x, given) and "inplace = True" in code
    assert ("relu(max_pool2d" in code) and (("_layout_0" in code) == (tap == "output"))
