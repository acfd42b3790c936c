"""`distill`: what the joined module gives, what it keeps apart, and what is left when the teacher goes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import PlanError, PolicyError
from fxcompress.nn.distillation import Losses
from fxcompress.nn.frozen import Frozen
from fxcompress.passes import Distill, pair

STEPS = "phase learn over steps 0..10 {{ distill from {} {{ {} }} }}"


def number(value: Tensor) -> float:
    return float(value.detach())


def policy(*pairs: str, teacher: str = "teacher", settings: str = "") -> str:
    """A policy that distils from the start until it is stripped."""
    head = "" if teacher == "original" else "(teacher: model)"
    lines = "\n".join([settings, *pairs])
    return f"policy p{head} {{\n distill from {teacher} {{\n{lines}\n}}\n}}"


class Student(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.bn(self.conv(x))))
        return self.fc(F.dropout(x.mean((2, 3)), 0.5, self.training))


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.norm = nn.BatchNorm2d(12)  # behind a pool: it can't be folded
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.body(self.stem(x))).mean((2, 3))))


def models(seed: int = 0) -> tuple[Student, Teacher, Tensor, Tensor]:
    torch.manual_seed(seed)
    student, teacher = Student(), Teacher()
    teacher(torch.randn(16, 3, 8, 8))  # statistics that are not those of the start
    return student, teacher.eval(), torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])


ALL = ('pair output <- output { loss = kl, temperature = 4, weight = 0.9 }',
       'pair output <- targets { loss = cross_entropy, weight = 0.1 }',
       'pair "body" <- "body" { loss = mse }')


def test_terms_are_those_of_the_two_models() -> None:
    student, teacher, x, y = models()
    result = fxcompress.compile(policy(*ALL), student, x, teacher=teacher)
    module = result.module.eval()
    student.eval()
    found = module(x, targets=y, losses=True)
    assert isinstance(found, Losses) and torch.equal(found.output, student(x)) and torch.equal(module(x), student(x))
    assert result.terms == tuple(found.terms) == ("output_kl", "output_cross_entropy", "body_mse")
    with torch.no_grad():
        s, t = student(x), teacher(x)
        kl = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
        features = student.body(F.relu(student.bn(student.conv(x)))), teacher.body(teacher.stem(x))
        adapter = module.get_submodule("distill.fused.adapters.body_mse")
        expected = [kl, F.cross_entropy(s, y), F.mse_loss(adapter(features[0]), features[1])]
    torch.testing.assert_close(list(found.terms.values()), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.total, 0.9 * kl + 0.1 * expected[1] + expected[2])
    assert result.weights == pytest.approx({"output_kl": 0.9, "output_cross_entropy": 0.1, "body_mse": 1.0})
    assert result.temperatures == {"output_kl": 4.0}


def test_gradients_are_those_of_the_loop_over_two_models() -> None:
    student, teacher, x, y = models()
    result = fxcompress.compile(policy(*ALL[:2]), student, x, teacher=teacher)
    torch.manual_seed(1)
    result.module.train()(x, targets=y, losses=True).total.backward()
    torch.manual_seed(1)
    s = student.train()(x)
    with torch.no_grad():
        t = teacher(x)
    loss = 0.9 * 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
    (loss + 0.1 * F.cross_entropy(s, y)).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(result.module.get_parameter(name).grad, parameter.grad)


def test_the_teacher_can_be_neither_trained_nor_saved_nor_put_into_training_mode() -> None:
    student, teacher, x, y = models()
    before = copy.deepcopy(teacher.state_dict())
    result = fxcompress.compile(policy(*ALL), student, x, teacher=teacher)
    module = result.module
    named = dict(module.named_parameters())
    assert set(named) - set(dict(student.named_parameters())) == {
        f"distill.fused.adapters.body_mse.map.{name}" for name in ("weight", "bias")}
    assert [key for key in module.state_dict() if "teacher" in key] == []
    assert [key for key in module.state_dict() if not key.startswith("distill.")] == list(student.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, weight_decay=0.5)
    held = {name: value.clone() for name, value in module.named_buffers() if ".teacher." in name}
    assert held
    module.train()
    for _ in range(3):
        optimizer.zero_grad()
        module(x, targets=y, losses=True).total.backward()
        optimizer.step()
    for name, value in module.named_buffers():
        if name in held:
            assert torch.equal(value, held[name]) and not value.requires_grad
    frozen = [part for part in module.modules() if isinstance(part, Frozen)]
    assert frozen and not any(part.inner.training for part in frozen), "the norm that can't be folded"
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), "the model that was given is left as it is"


def test_no_gradient_flows_through_the_teacher() -> None:
    """Not even to inputs that want one, and what it computes keeps nothing for a backward pass."""
    student, teacher, x, _ = models()
    result = fxcompress.compile(policy(ALL[2]), student, x, teacher=teacher)
    x.requires_grad_(True)
    saved: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        found = result.module.eval()(x, losses=True)
    held = {value.data_ptr() for name, value in result.module.named_buffers() if ".teacher." in name}
    assert not held & {value.data_ptr() for value in saved}
    found.total.backward()
    loop = F.mse_loss(result.module.get_submodule("distill.fused.adapters.body_mse")(
        student.eval().body(F.relu(student.bn(student.conv(z := x.detach().clone().requires_grad_(True)))))),
        teacher.body(teacher.stem(x)).detach())
    loop.backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_what_lies_behind_the_last_tap_is_removed() -> None:
    student, teacher, x, _ = models()
    text = policy('pair "body" <- "stem" { loss = mse }')
    plan = fxcompress.plan(text, student, x, teacher=teacher)
    assert any("no tap needs body.0, norm, fc" in note for note in plan.steps[0].notes), plan
    result = fxcompress.compile(text, student, x, teacher=teacher)
    fused = result.module.get_submodule("distill.fused")
    names = {name.split(".")[1] for name, _ in fused.named_buffers() if name.startswith("teacher.")}
    assert names == {"stem"}
    assert "batch_norm" not in fused.code and not [part for part in fused.modules() if isinstance(part, nn.BatchNorm2d)]


def test_strip_gives_the_plain_student() -> None:
    student, teacher, x, _ = models()
    result = fxcompress.compile(policy(*ALL), student, x, teacher=teacher)
    module = result.module
    stripped = result.strip()
    assert stripped is module is result.module and result.terms == ()
    assert list(stripped.state_dict()) == list(student.state_dict())
    assert torch.equal(stripped.eval()(x), student.eval()(x))
    with pytest.raises(TypeError):
        stripped(x, losses=True)
    deployed = fxcompress.compile(policy(*ALL), student, x, teacher=teacher).finalize()
    assert list(deployed.state_dict()) == list(student.state_dict())
    torch.testing.assert_close(deployed(x), student(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
                         ids=["deepcopy", "pickle"])
def test_copies_keep_the_teacher_apart(how: Any) -> None:
    student, teacher, x, y = models()
    module = fxcompress.compile(policy(*ALL), student, x, teacher=teacher).module.eval()
    copied = how(module)
    copied.recompile()
    assert list(copied.state_dict()) == list(module.state_dict())
    assert dict(copied.named_parameters()).keys() == dict(module.named_parameters()).keys()
    assert torch.equal(copied(x, targets=y, losses=True).total, module(x, targets=y, losses=True).total)
    assert torch.equal(copied.train().eval()(x), module(x))


def test_labels_are_asked_for_where_they_are_needed() -> None:
    student, teacher, x, _ = models()
    result = fxcompress.compile(policy(ALL[1]), student, x, teacher=teacher)
    with pytest.raises(ValueError, match="targets=labels"):
        result.module(x, losses=True)


def test_the_whole_step_compiles_to_one_graph() -> None:
    student, teacher, x, y = models()
    pairs = (*ALL, 'pair output <- output { loss = decoupled, temperature = adaptive(l2) }',
             'pair "body" <- "body" { loss = relation }', 'pair "conv" <- "stem" { loss = nst }',
             'pair output <- output { loss = dist, temperature = learned }')
    module = fxcompress.compile(policy(*pairs), student, x, teacher=teacher).module.eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, targets=y, losses=True), module(x, targets=y, losses=True)
    assert isinstance(found, Losses) and list(found.terms) == list(expected.terms)
    torch.testing.assert_close(found.total, expected.total)
    found.total.backward()
    grads = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    module.zero_grad()
    module(x, targets=y, losses=True).total.backward()
    assert grads.keys() == {name for name, value in module.named_parameters() if value.grad is not None}
    for name, value in grads.items():
        torch.testing.assert_close(value, module.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_a_schedule_compiles_nothing_anew() -> None:
    student, teacher, x, _ = models()
    text = "policy p(teacher: model) { " + STEPS.format(
        "teacher", "pair output <- output { loss = kl, temperature = linear(8 -> 1), weight = cosine(1 -> 0) }") + " }"
    result = fxcompress.compile(text, student, x, teacher=teacher)
    seen: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(1)
        return graph.forward

    compiled = torch.compile(result.module.eval(), fullgraph=True, backend=backend)
    totals = []
    for _ in range(5):
        totals.append(number(compiled(x, losses=True).total.detach()))
        result.step()
    assert len(seen) == 1 and len(set(totals)) == 5


def test_original_is_the_model_before_any_rewrite() -> None:
    student, _, x, _ = models()
    text = policy('pair output <- output { loss = mse }', 'pair "body" <- "body" { loss = mse }', teacher="original")
    text = text[:-1] + "\n mask conv2d { sparsity = 50% }\n}"
    result = fxcompress.compile(text, student, x)
    module = result.module.eval()
    found = module(x, losses=True)
    student.eval()
    assert number(found.terms["output_mse"]) == pytest.approx(number(F.mse_loss(module(x), student(x))), rel=1e-4)
    assert number(found.terms["output_mse"]) > 0
    plain = fxcompress.compile("policy p { mask conv2d { sparsity = 50% } }", student, x).module.eval()
    assert torch.equal(plain(x), module(x))
    same = fxcompress.compile(policy(ALL[0]), student, x, teacher="original").module.eval()(x, losses=True)
    assert number(same.total) == pytest.approx(0.0, abs=1e-6)


def test_a_pass_from_python() -> None:
    student, teacher, x, _ = models()
    captured = fxcompress.capture(student, x)
    distill = Distill(terms=(pair("output", "output", loss="kl", temperature=2), pair("body", "body", loss="mse")))
    module = distill.apply(captured, teacher=teacher).module.eval()
    assert list(module(x, losses=True).terms) == ["output_kl", "body_mse"]
    assert "distill" not in captured.module._modules
    with pytest.raises(PolicyError):
        pair("output", "output", los="kl")
    with pytest.raises(PlanError, match="FXC0353"):
        distill.apply(captured)


def test_a_model_that_comes_with_its_teacher() -> None:
    """Compiled from a captured model that a pass from Python has joined to one; and captured anew from the module."""
    student, teacher, x, _ = models()
    distill = Distill(terms=(pair("output", "output", loss="mse"),))
    joined = distill.apply(fxcompress.capture(student, x), teacher=teacher)
    result = fxcompress.compile("policy p { mask conv2d { sparsity = 50% } }", joined)
    assert result.terms == ("output_mse",)
    found = result.module.eval()(x, losses=True)
    torch.testing.assert_close(found.total, F.mse_loss(result.module(x), teacher(x)))
    assert list(result.finalize().state_dict()) == list(student.state_dict())
    result.strip()
    assert result.terms == () and not [name for name, _ in result.module.named_buffers() if "teacher" in name]
    again = fxcompress.capture(joined.module, x)
    assert torch.equal(again.module.eval()(x), student.eval()(x)), "what is captured is the student"


def test_two_teachers_add_up() -> None:
    student, teacher, x, _ = models()
    other = models(seed=7)[1]
    text = """policy p(a: model, b: model) {
        distill from a { pair output <- output { loss = mse, name = "first" } }
        distill from b { pair output <- output { loss = mse, name = "second", weight = 2 } }
    }"""
    result = fxcompress.compile(text, student, x, params={"a": teacher, "b": other})
    found = result.module.eval()(x, losses=True)
    student.eval()
    expected = [number(F.mse_loss(student(x), model(x))) for model in (teacher, other)]
    assert list(found.terms) == ["first", "second"] == list(result.terms)
    assert [number(value) for value in found.terms.values()] == pytest.approx(expected)
    assert number(found.total) == pytest.approx(expected[0] + 2 * expected[1])
    assert list(result.strip().state_dict()) == list(student.state_dict())
    torch.testing.assert_close(result.module(x), student(x))


class Loose(nn.Module):
    """Parameters that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.part = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)
        self.part.register_parameter("shift", nn.Parameter(torch.randn(3)))
        self.box = nn.Module()
        self.box.token = nn.Parameter(torch.randn(3))
        self.box.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.box.fc(self.part(x * self.scale) + self.part.shift + self.box.token)


def test_loose_parameters_are_frozen_too() -> None:
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(6, 3), Loose(), torch.randn(4, 6)
    module = fxcompress.compile(policy('pair output <- output { loss = mse }'), student, x, teacher=teacher).module
    assert [key for key in module.state_dict() if "teacher" in key] == []
    for way in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert number(way(x, losses=True).total) == pytest.approx(number(F.mse_loss(student(x), teacher(x))), rel=1e-5)
        assert len(list(way.parameters())) == 2


class Outputs(nn.Module):
    """Gives a dict, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.other(x), "logits": self.fc(x)}


def test_parts_of_a_result() -> None:
    torch.manual_seed(0)
    student, teacher, x = Outputs(), Outputs(), torch.randn(4, 6)
    result = fxcompress.compile(policy('pair output <- output { loss = mse }',
                                       'pair "output.hidden" <- "output.hidden" { loss = mse }'),
                                student, x, teacher=teacher)
    found = result.module(x, losses=True)
    one, two = student(x), teacher(x)
    assert number(found.terms["output_mse"]) == pytest.approx(number(F.mse_loss(one["logits"], two["logits"])))
    assert number(found.terms["output_hidden_mse"]) == pytest.approx(number(F.mse_loss(one["hidden"], two["hidden"])))
    assert set(found.output) == {"hidden", "logits"}


class Wilful(nn.Module):
    """Decides by the value of a tensor, as no graph can; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.extra = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.fc(x.flatten(1)))
        return y + self.extra if float(y.detach().sum()) > 0 else y - self.extra


def test_a_teacher_that_cant_be_captured_is_one_frozen_module() -> None:
    student, _, x, _ = models()
    teacher = Wilful().eval()
    text = policy('pair output <- output { loss = mse }')
    [step] = fxcompress.plan(text, student, x, teacher=teacher).steps
    assert any("can't be captured" in note for note in step.notes)
    result = fxcompress.compile(text, student, x, teacher=teacher)
    module = result.module.train()
    stats = teacher.norm.running_mean.clone()  # type: ignore[union-attr]
    found = module(x, losses=True)
    assert [key for key in module.state_dict() if "whole" in key] == []
    assert dict(module.named_parameters()).keys() == dict(student.named_parameters()).keys()
    found.total.backward()
    module.eval()
    assert number(module(x, losses=True).total) == pytest.approx(number(F.mse_loss(module(x), teacher(x))))
    held = [value for name, value in module.named_buffers() if name.endswith("running_mean") and "whole" in name]
    assert len(held) == 1 and torch.equal(held[0], stats), "its norm doesn't train"
    with pytest.raises(PlanError, match="can't be captured"):
        fxcompress.plan(policy('pair "body" <- "fc" { loss = mse }'), student, x, teacher=teacher)


def test_a_teacher_captured_by_export() -> None:
    student, teacher, x, _ = models()
    exported = fxcompress.capture(teacher, x, way="export")
    assert exported.way == "export"
    text = policy(ALL[0], ALL[2])
    by_export = fxcompress.compile(text, student, x, teacher=exported).module.eval()(x, losses=True)
    by_fx = fxcompress.compile(text, student, x, teacher=teacher).module.eval()(x, losses=True)
    torch.testing.assert_close(by_export.total, by_fx.total)


class BySize(Teacher):
    """Takes another way for large batches, which only `torch.export` records."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] <= 8 else super().forward(x) * 2


def test_a_teacher_that_only_export_captures() -> None:
    student, _, x, _ = models()
    teacher = BySize().eval()
    assert fxcompress.capture(teacher, x).way == "export"
    text = policy(ALL[2], 'pair output <- output { loss = mse }')
    assert any("batch sizes of" in note for note in fxcompress.plan(text, student, x, teacher=teacher).steps[0].notes)
    module = fxcompress.compile(text, student, x, teacher=teacher).module.eval()
    found, t = module(x, losses=True), teacher.body(teacher.stem(x))
    adapter = module.get_submodule("distill.fused.adapters.body_mse")
    s = student.eval().body(F.relu(student.bn(student.conv(x))))
    torch.testing.assert_close(found.terms["body_mse"], F.mse_loss(adapter(s), t))
    torch.testing.assert_close(found.terms["output_mse"], F.mse_loss(student(x), teacher(x)))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, losses=True).total, found.total)


def test_recurrent_models() -> None:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, width, num_layers=2, dropout=0.5, batch_first=True)
            self.fc = nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    student, teacher, x, y = Net(8), Net(16).eval(), torch.randn(5, 6, 2), torch.tensor([0, 1, 2, 3, 0])
    result = fxcompress.compile(policy(*ALL[:2]), student, x, teacher=teacher)
    module = result.module.train()
    with torch.no_grad():
        t = teacher(x)
    found = module(x, targets=y, losses=True)
    s = found.output
    kl = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
    torch.testing.assert_close(found.terms["output_kl"], kl)
    found.total.backward()
    copied = copy.deepcopy(module).eval()
    torch.testing.assert_close(copied(x, targets=y, losses=True).terms["output_kl"],
                               module.eval()(x, targets=y, losses=True).terms["output_kl"])


def test_real_models_with_three_pairs() -> None:
    torch.manual_seed(0)
    teacher = torchvision.models.resnet34(num_classes=5).eval()
    student = torchvision.models.resnet18(num_classes=5)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    pairs = [f'pair "layer{n}" <- "layer{n}" {{ loss = mse }}' for n in (1, 2, 3)]
    result = fxcompress.compile(policy(*ALL[:2], *pairs), student, x, teacher=teacher)
    found = result.module.eval()(x, targets=y, losses=True)
    taps: dict[str, list[Tensor]] = {}
    for model in (student.eval(), teacher):
        for n in (1, 2, 3):
            model.get_submodule(f"layer{n}").register_forward_hook(
                lambda module, given, value, n=n: taps.setdefault(f"layer{n}_mse", []).append(value))
        model(x)
    for name, (s, t) in taps.items():
        torch.testing.assert_close(found.terms[name], F.mse_loss(s, t), rtol=1e-4, atol=1e-6)


def test_vgg_teaches_shufflenet() -> None:
    torch.manual_seed(0)
    teacher = torchvision.models.vgg11(num_classes=5).eval()
    student = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    x, y = torch.randn(3, 3, 64, 64), torch.tensor([1, 3, 0])
    text = policy(*ALL[:2], 'pair "stage3" <- "features.15" { loss = activation_kl }',
                  'pair "stage2" <- "features.10" { loss = attention }')
    plan = fxcompress.plan(text, student, x, teacher=teacher)
    assert plan.before == plan.after, "a teacher is no part of the model"
    result = fxcompress.compile(text, student, x, teacher=teacher)
    module = result.module.train()
    optimizer = result.follow(torch.optim.SGD(module.parameters(), lr=0.05))
    totals = []
    for _ in range(6):
        optimizer.zero_grad()
        found = module(x, targets=y, losses=True)
        found.total.backward()
        optimizer.step()
        result.step()
        totals.append(number(found.total.detach()))
    assert totals[-1] < totals[0]
    assert list(result.strip().state_dict()) == list(student.state_dict())
