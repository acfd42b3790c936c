"""What `finalize` and `lift` leave, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from engine_nets import EXAMPLE, SPARSE, Net, batches, code_of, masks, sgd, train
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import PlanError, PolicyError
from fxcompress.graph.ops import kind_of


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def test_finalize_leaves_nothing_of_training(model: nn.Module) -> None:
    result = fxcompress.compile(SPARSE % ("steps 0..4", "linear(0% -> 50%)", "2 steps"), model, EXAMPLE)
    train(result, sgd(result), batches(), 4)
    deployed = result.finalize(target="cpu")
    assert not masks(deployed) and masks(result.module) and not deployed.training and result.module.training
    assert list(deployed.state_dict()) == list(model.state_dict())
    packed = result.finalize(target="cpu", pack=True)
    assert list(packed.state_dict()) == [name for name in model.state_dict() if not name.startswith("norm.")]
    assert torch.allclose(packed(*EXAMPLE), deployed(*EXAMPLE), atol=1e-5)
    assert not any(kind_of(node) in ("mask", "parameter") for node in deployed.graph.nodes)
    result.module.eval()
    assert torch.equal(deployed(*EXAMPLE), result.module(*EXAMPLE))
    for name, mask in masks(result.module).items():
        assert torch.equal(deployed.get_parameter(name), result.module.get_parameter(name) * mask)
        assert not torch.equal(deployed.get_parameter(name), result.module.get_parameter(name))  # it is dense there
    meta = deployed.meta["fxcompress"]
    assert set(meta) == {"policy", "plan", "report"} and "sparsify" in meta["policy"]
    assert meta["report"]["masks"] == pytest.approx(dict.fromkeys(masks(result.module), 0.5))


def test_lift_gives_the_dense_weights_back(model: nn.Module) -> None:
    result = fxcompress.compile(SPARSE % ("steps 0..8", "linear(20% -> 50%)", "2 steps"), model, EXAMPLE)
    train(result, sgd(result), batches(), 4)
    parameters = dict(result.module.named_parameters())
    dense = {name: p.detach().clone() for name, p in parameters.items()}
    module = result.lift()
    assert module is result.module and not masks(module)
    assert list(module.state_dict()) == list(model.state_dict())
    assert dict(module.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] and torch.equal(p, dense[name]) for name, p in module.named_parameters())
    reference = copy.deepcopy(model)
    reference.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(*EXAMPLE), reference.eval()(*EXAMPLE))
    train(result, sgd(result), batches(), 6)  # the ramp is over with the masks
    assert not masks(module)


def test_a_ramp_cut_short_is_said(model: nn.Module) -> None:
    result = fxcompress.compile(SPARSE % ("steps 0..10", "linear(0% -> 50%)", "2 steps"), model, EXAMPLE)
    train(result, sgd(result), batches(), 4)
    with pytest.warns(UserWarning, match="stopped at 20%, short of 50%"):
        deployed = result.finalize()
    warning = result.warnings[0]
    assert (warning.code, warning.severity) == ("FXC0524", "warning")
    assert warning.primary is not None and "mask conv2d" in warning.primary.span.text
    assert deployed.meta["fxcompress"]["report"]["warnings"][0]["code"] == "FXC0524"


def test_the_input_model_is_left_as_it_was(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fxcompress.compile("policy p { mask conv2d | linear { sparsity = 90% }\n "
                                "remove channels(conv2d) { ratio = 50% } }", model, EXAMPLE)
    train(result, sgd(result), batches(), 2)
    result.finalize()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("expect", "measured"), [
    ("expect sparsity(fc1) > 50%", "sparsity is 50%"),
    ("expect drift(output) < 1%", "drift is"),
    ("expect count(linear) == 3", "count is 2"),
    ("expect unchanged(fc1)", "1 parameters changed"),
    ("expect params <= 99% of dense", "params is 3,292"),
])
def test_expectations_are_measured_and_refused(model: nn.Module, expect: str, measured: str) -> None:
    text = f'policy p {{ let fc1 = linear[name == "fc1"]\n mask fc1 {{ sparsity = 50% }}\n {expect} else "too bad" }}'
    result = fxcompress.compile(text, model, EXAMPLE)
    with pytest.raises(PlanError) as caught:
        result.finalize()
    found = caught.value.diagnostics[0]
    assert found.code == "FXC0530" and measured in found.message
    assert found.notes == ("too bad",) and found.primary is not None and found.primary.span.text.startswith(expect)


def test_expectations_that_hold(model: nn.Module) -> None:
    result = fxcompress.compile("""policy p {
        let fc1 = linear[name == "fc1"]
        mask fc1 { sparsity = 25% }
        expect sparsity(fc1) == 25%
        expect unchanged(conv2d | batchnorm2d)
        expect drift(output) < 100%
        expect macs <= 100% of dense
    }""", model.eval(), EXAMPLE)
    deployed = result.finalize()
    measured = {item["text"]: item["value"] for item in deployed.meta["fxcompress"]["report"]["expects"]}
    before, after = model(*EXAMPLE).double(), deployed(*EXAMPLE).double()
    wanted = ((after - before).norm() / before.norm()).item()
    assert measured["expect drift(output) < 100%"] == pytest.approx(wanted, rel=1e-6) and wanted > 0


def test_a_budget_of_time_is_measured(model: nn.Module) -> None:
    text = "policy p {{ mask linear {{ sparsity = 50% }}\n budget latency <= {} }}"
    assert fxcompress.compile(text.format("100 s"), model, EXAMPLE).finalize() is not None
    with pytest.raises(PlanError) as caught:
        fxcompress.compile(text.format("0.00001 ms"), model, EXAMPLE).finalize()
    assert code_of(caught) == "FXC0531"


@pytest.mark.parametrize(("text", "code"), [
    ("policy p { mask linear { sparsity = linear(0% -> 50%) } }", "FXC0520"),
    ("policy p { mask linear { sparsity = 50%, every = 10 steps } }", "FXC0520"),
    ("policy p { phase a over 0%..50% of training { mask linear { sparsity = 50% } } }", "FXC0521"),
    ("policy p { phase a over epochs 1..2 { mask linear { sparsity = 50%, rewind = 2 epochs } } }", "FXC0522"),
])
def test_times_that_cannot_be_had_are_refused_at_once(model: nn.Module, text: str, code: str) -> None:
    with pytest.raises((PlanError, PolicyError)) as caught:
        fxcompress.compile(text, model, EXAMPLE)
    assert code_of(caught) == code
    assert caught.value.diagnostics[0].help and caught.value.diagnostics[0].primary


def test_an_unknown_target_is_refused(model: nn.Module) -> None:
    result = fxcompress.compile("policy p { mask linear { sparsity = 50% } }", model, EXAMPLE)
    with pytest.raises(PlanError) as caught:
        result.finalize(target="tpu")
    assert code_of(caught) == "FXC0527"


def test_a_plan_of_another_policy_is_refused(model: nn.Module) -> None:
    plan = fxcompress.plan("policy p { mask linear { sparsity = 50% } }", model, EXAMPLE)
    assert fxcompress.compile("policy p { mask linear { sparsity = 50% } }", model, EXAMPLE, plan=plan).done
    with pytest.raises(PlanError) as caught:
        fxcompress.compile("policy p { mask linear { sparsity = 60% } }", model, EXAMPLE, plan=plan)
    assert code_of(caught) == "FXC0330"


def test_a_notebook_shows_phases_and_masks(model: nn.Module) -> None:
    result = fxcompress.compile(SPARSE % ("steps 0..4", "linear(0% -> 50%)", "2 steps"), model, EXAMPLE)
    train(result, sgd(result), batches(), 2)
    html = result._repr_html_()
    assert "<td>fc1.weight</td><td>25.0%</td>" in html and "<td>sparsify</td><td>50%</td>" in html
    assert repr(result) == "Result(policy 'p' on Net: sparsify 50%)"


class Dropping(nn.Module):
    """Drops by module, by function, and by depth."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.depth = torchvision.ops.StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.first(x))
        return x + self.depth(nn.functional.dropout(self.second(x), 0.3, self.training))


def test_finalize_takes_out_what_only_acts_in_training() -> None:
    torch.manual_seed(0)
    model, x = Dropping(), torch.randn(5, 6)
    result = fxcompress.compile("policy p { mask linear { sparsity = 25% } }", model, (x,))
    deployed = result.finalize(target="cpu")
    assert {kind_of(node) for node in deployed.graph.nodes} == {"input", "linear", "add", "output"}
    assert list(deployed.state_dict()) == list(model.state_dict())
    deployed.train()
    assert torch.equal(deployed(x), result.module.eval()(x))
    assert "dropout" in {kind_of(node) for node in result.module.graph.nodes}  # what is trained keeps it
    loss = deployed(x).sum()
    loss.backward()
    assert all(p.grad is not None for p in deployed.parameters())
