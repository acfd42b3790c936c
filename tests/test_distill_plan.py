"""What `check --model` and `plan` say of a distillation before any work, and what the language takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import commands
from fxcompress.diagnostics import PlanError, PolicyError
from fxcompress.nn.losses import Loss
from fxcompress.passbase import LOSSES
from fxcompress.passes.shared.distill_adapting import adapter_for
from fxcompress.passes.shared.distill_taps import Missed, find
from fxcompress.plan import check_model
from fxcompress.plan.make import learning, read_policy
from fxcompress.policy import format_policy, parse
from fxcompress.policy.values import SteadyRamp

VGG = """policy small(teacher: model) {
    phase learn over epochs 0..9 {
        distill from teacher {
            pair output <- output { loss = kl, temperature = linear(10 -> 1, by 0.07 per step), weight = 0.9 }
            pair output <- targets { loss = cross_entropy, label_smoothing = 10%, weight = cosine(0 -> 0.1) }
            pair "stage2" <- "features.10" { loss = mse }
            pair "stage3" <- "features.15" { loss = activation_kl, temperature = adaptive(l2), name = "hidden" }
            pair "conv5" <- "features.18" { loss = attention }
        }
    }
}
"""


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def test_the_plan_shows_terms_taps_shapes_adapters_and_what_is_cut(golden: Callable[[str, str], None]) -> None:
    student = on_meta(lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5))
    teacher = on_meta(lambda: torchvision.models.vgg11(num_classes=5))
    x = torch.zeros(4, 3, 64, 64)
    shown = fxcompress.plan(VGG, student, x, teacher=teacher).show()
    cut = VGG
    for old, new in (("pair output <- output", 'pair "stage4" <- "features.5"'), ("features.15", "features.7"),
                     ("loss = kl, temperature = linear(10 -> 1, by 0.07 per step)", "loss = nst"),
                     ('pair "conv5" <- "features.18"', 'pair "stage2" <- "features.2"')):
        cut = cut.replace(old, new)
    golden("distill.txt", shown + "\n" + fxcompress.plan(cut, student, x, teacher=teacher).show())


def test_it_reads_and_formats() -> None:
    assert format_policy(VGG) == VGG
    squeezed = VGG.replace("linear(10 -> 1, by 0.07 per step)", "linear(10->1,by  0.07   per step )")
    assert format_policy(squeezed) == VGG
    ramp = parse(VGG).phases[0].actions[0].pairs[0].values["temperature"]
    assert ramp == SteadyRamp("linear", 10.0, 1.0, 0.07, "steps")
    assert parse(VGG).phases[0].actions[0].pairs[1].teacher == "targets"


@pytest.mark.parametrize("temperature, code", [
    ("linear(10 -> 1, at 0.07 per step)", "FXC0105"), ("cubic(10 -> 1, by 0.07 per step)", "FXC0105"),
    ("linear(10 -> 1, by 0 per step)", "FXC0106"), ("linear(10 -> 1, by 1 per sample)", "FXC0105"),
    ("linear(10 -> 0)", "FXC0106"), ("adaptive(l1)", "FXC0116"), ("adaptive(l2, 3)", "FXC0116"), ("0", "FXC0106"),
])
def test_wrong_temperatures(temperature: str, code: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse(VGG.replace("linear(10 -> 1, by 0.07 per step)", temperature))
    assert [item.code for item in error.value.diagnostics] == [code]


def test_a_teacher_may_be_the_original_by_name_only() -> None:
    text = "policy p { distill from %s { pair output <- output { loss = kl } } }"
    assert parse(text % "original").phases[0].actions[0].teacher == "original"
    with pytest.raises(PolicyError, match="FXC0136"):
        parse(text % "orginal")
    with pytest.raises(PolicyError, match="FXC0135"):
        parse('policy p { distill from original { pair targets <- "fc" { loss = kl } } }')


def test_check_finds_ends_that_are_not_there_in_both_models() -> None:
    student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    captured = fxcompress.capture(student, torch.zeros(2, 4))
    policy = read_policy('policy p(t: model) { distill from t { pair "x" <- "5" { loss = mse } } }', None, teacher)
    found = check_model(policy, learning(policy, captured, student))
    assert [(item.code, item.message) for item in found] == [
        ("FXC0350", "there is no module or node `x` in the student"),
        ("FXC0350", "there is no module or node `5` in the teacher")]


def test_ends() -> None:
    model = torchvision.models.resnet18(num_classes=5)
    captured = fxcompress.capture(model, torch.zeros(1, 3, 64, 64))
    layer3, relu = find(captured, "layer3"), find(captured, "relu_1")
    assert isinstance(layer3, torch.fx.Node) and layer3.meta["fxc"].shape == (1, 256, 4, 4)
    assert isinstance(relu, torch.fx.Node) and relu.name == "relu_1"
    fc, output = find(captured, "fc"), find(captured, "output")
    assert fc is output
    assert isinstance(find(captured, "layer1.0.relu"), Missed), "it is called twice"


MSE, KL, AT, SP = (LOSSES[name] for name in ("mse", "kl", "attention", "similarity"))


@pytest.mark.parametrize("student, teacher, loss, adapt, expected", [
    ((2, 8, 4, 4), (2, 8, 4, 4), MSE, "auto", "none"),
    ((2, 8, 4, 4), (2, 16, 4, 4), MSE, "auto", "conv1x1 8 -> 16"),
    ((2, 8, 8, 8), (2, 16, 4, 4), MSE, "auto", "pool to 4×4, conv1x1 8 -> 16"),
    ((2, 8, 2, 2), (2, 16, 4, 4), MSE, "auto", "conv1x1 8 -> 16, interpolate to 4×4"),
    ((2, 8, 4, 4), (2, 8, 4, 4), MSE, "conv1x1", "conv1x1 8 -> 8"),
    ((2, 8), (2, 16), MSE, "auto", "linear 8 -> 16"),
    ((2, 6, 8), (2, 6, 16), MSE, "auto", "linear 8 -> 16"),
    ((2, 8, 4, 4), (2, 16), MSE, "auto", "pool to one vector, linear 8 -> 16"),
    ((2, 8, 3, 4, 4), (2, 16, 3, 4, 4), MSE, "auto", "conv1x1 8 -> 16"),
    ((2, 8, 8, 8), (2, 16, 4, 4), AT, "auto", "pool to 4×4"),
    ((2, 8, 8, 8), (2, 16), SP, "auto", "none"),
    ((2, 10), (2, 10), KL, "auto", "none"),
    ((2, 10), (2, 12), KL, "linear", "linear 10 -> 12"),
    ((2, 8, 8, 8), (2, 8, 4, 4), MSE, "pool", "pool to 4×4"),
])
def test_adapters(student: tuple[int, ...], teacher: tuple[int, ...], loss: type[Loss], adapt: str, expected: str,
                  ) -> None:
    from fxcompress.nn.adapters import Adapter

    plan = adapter_for(student, teacher, loss, adapt)
    assert str(plan) == expected and not isinstance(plan, str)
    adapter = Adapter(plan.rank, plan.channels, plan.pool, plan.interpolate)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == plan.parameters
    result = adapter(torch.randn(student))
    if loss is MSE or loss is KL:
        assert result.shape == teacher
    elif loss is AT:
        assert result.shape[2:] == teacher[2:]


@pytest.mark.parametrize("student, teacher, loss, adapt", [
    ((2, 10), (2, 12), KL, "auto"), ((2, 8, 4, 4), (2, 16, 4, 4), MSE, "none"), ((2, 6, 8), (2, 7, 8), MSE, "auto"),
    ((2, 8), (2, 8, 4, 4), MSE, "auto"), ((2, 8, 4, 4), (2, 16, 4, 4), MSE, "pool"), ((2, 8), (3, 8), MSE, "auto"),
    ((2, 8, 8, 8), (2, 8, 4, 4), MSE, "interpolate"), ((2, 8), (2, 16), MSE, "conv1x1"), ((2, 8), (2, 8), AT, "auto"),
])
def test_shapes_that_nothing_joins(student: tuple[int, ...], teacher: tuple[int, ...], loss: type[Loss], adapt: str,
                                   ) -> None:
    assert isinstance(adapter_for(student, teacher, loss, adapt), str)


def test_a_loss_of_ones_own() -> None:
    @fxcompress.register_loss("huber")
    class Huber(Loss):
        def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
            return F.huber_loss(student, teacher)

    try:
        torch.manual_seed(0)
        student, teacher, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
        result = fxcompress.compile("policy p(t: model) { distill from t { pair output <- output { loss = huber } } }",
                                    student, x, teacher=teacher)
        torch.testing.assert_close(result.module(x, losses=True).total, F.huber_loss(student(x), teacher(x)))
    finally:
        LOSSES.unregister("huber")


def test_the_command_line_takes_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.fxc"
    path.write_text(VGG.replace("policy small(teacher: model) {", "policy small(teacher: model) {\n"
                                "    input x: f32[N, 3, 64, 64]"))
    student, teacher = "torchvision:shufflenet_v2_x0_5", "torchvision:vgg11"
    assert commands.check_model([path], student, teacher=teacher) == 0
    assert commands.plan(path, student, teacher=teacher) == 0
    assert "output_kl" in capsys.readouterr().out
    assert commands.plan(path, student, teacher="torchvision:resnet18") == 1
    assert "features.10" in capsys.readouterr().err
    assert commands.plan(path, student) == 1
    assert "--teacher SPEC" in capsys.readouterr().err


def test_transformers_with_inputs_by_keyword() -> None:
    transformers = pytest.importorskip("transformers")

    def make(layers: int, width: int) -> nn.Module:
        config = transformers.BertConfig(vocab_size=50, hidden_size=width, num_hidden_layers=layers,
                                         num_attention_heads=2, intermediate_size=2 * width,
                                         max_position_embeddings=16, num_labels=3)
        model: nn.Module = transformers.BertForSequenceClassification(config).eval()
        return model

    torch.manual_seed(0)
    student, teacher = make(1, 8), make(2, 12)
    inputs = {"input_ids": torch.randint(0, 50, (3, 8)), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    text = """policy p(t: model) { distill from t {
        pair output <- output { loss = kl }
        pair "bert.encoder.layer.0" <- "bert.encoder.layer.1" { loss = cosine }
    } }"""
    module = fxcompress.compile(text, student, inputs, teacher=teacher).module.eval()
    found = module(**inputs, losses=True)
    with torch.no_grad():
        s, t = student(**inputs).logits, teacher(**inputs).logits
    expected = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
    torch.testing.assert_close(found.terms["output_kl"].detach(), expected, rtol=1e-3, atol=1e-6)
    hidden = [model(**inputs, output_hidden_states=True).hidden_states[-1] for model in (student, teacher)]
    adapter = module.get_submodule("distill.fused.adapters.bert_encoder_layer_0_cosine")
    cosine = (1 - F.cosine_similarity(adapter(hidden[0]), hidden[1], dim=-1)).mean()
    torch.testing.assert_close(found.terms["bert_encoder_layer_0_cosine"], cosine, rtol=1e-4, atol=1e-5)
    assert [key for key in module.state_dict() if "teacher" in key] == []
    found.total.backward()


def test_every_error_of_a_distillation_is_told_in_one_run() -> None:
    student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    text = """policy p { distill from original {
        pair "7" <- "0" { loss = mse }
        pair "0" <- output { loss = mse, temperature = 3 }
        pair output <- "0" { loss = kl }
    } }"""
    with pytest.raises((PolicyError, PlanError)) as error:
        fxcompress.plan(text.replace('pair "7" <- "0" { loss = mse }', ""), student, torch.zeros(2, 4))
    assert [item.code for item in error.value.diagnostics] == ["FXC0352", "FXC0351"]
