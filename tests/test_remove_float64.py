"""`verify = float64`: the proof of a removal in double precision is sharper by nine digits."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fxcompress import FxcError, capture
from fxcompress import compile as compile_
from fxcompress.graph.captured import Captured
from fxcompress.graph.coupling import analyse
from fxcompress.graph.coupling_apply import remove as apply_removal
from fxcompress.graph.coupling_proof import prove
from fxcompress.graph.residual_blocks import find_blocks
from fxcompress.graph.residual_drop import drop_blocks, prove_dropped
from fxcompress.policy import parse

IMAGE = (torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=7).eval()


def notes_of(verify: str) -> str:
    text = f"policy p {{ remove channels(conv2d) {{ ratio = 50%, verify = {verify} }} }}"
    return next(note for note in compile_(text, resnet(), IMAGE).notes if note.startswith("proven"))


def error_of(note: str) -> float:
    """The figure in a note of a proof."""
    found = re.search(r"to (\d\S*)", note)
    assert found is not None, note
    return float(found[1])


def test_the_error_falls_to_that_of_double_precision() -> None:
    on, double = notes_of("on"), notes_of("float64")
    assert "float64" not in on and double.endswith("in float64")
    coarse, fine = error_of(on), error_of(double)
    assert 1e-9 < coarse < 1e-4
    assert 0 < fine < 1e-13


def halves(captured: Captured) -> tuple[Captured, object, object]:
    """`captured` with the first half of `layer1.0.conv1` gone, and what a proof of it needs."""
    coupling = analyse(captured)
    made = coupling.produced[captured.node("layer1.0.conv1")][0]
    doomed = coupling.touched(made.labels[: len(made.labels) // 2])
    trial = captured.copy()
    apply_removal(analyse(trial), doomed)
    return trial, coupling, doomed[coupling.component]


def test_double_precision_catches_what_single_precision_takes_for_rounding() -> None:
    captured = capture(resnet(), IMAGE)
    trial, coupling, gone = halves(captured)
    assert prove(captured, trial, coupling, gone, double=True).dtype == torch.float64
    with torch.no_grad():
        trial.module.get_parameter("layer1.0.conv1.weight").mul_(1 + 1e-6)  # a wrong rewrite, by very little
    assert prove(captured, trial, coupling, gone).holds
    with pytest.raises(FxcError, match="FXC0541"):
        prove(captured, trial, coupling, gone, double=True)


def test_blocks_are_proven_too() -> None:
    captured = capture(resnet(), IMAGE)
    blocks = find_blocks(captured).blocks[1:3]
    trial = captured.copy()
    drop_blocks(trial, blocks)
    for double in (False, True):
        assert prove_dropped(captured, trial, blocks, double=double).error == 0.0
    with pytest.raises(FxcError, match="FXC0541"):
        prove_dropped(captured, trial, blocks[:1])
    with torch.no_grad():
        trial.module.get_parameter("layer3.0.conv1.weight").mul_(1 + 1e-6)
    assert prove_dropped(captured, trial, blocks).holds
    with pytest.raises(FxcError, match="FXC0541"):
        prove_dropped(captured, trial, blocks, double=True)


class Cast(nn.Module):
    """A half-precision model that names precisions itself, as those of Llama's norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 64), nn.Linear(64, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.tanh(self.one(x)).float().square().to(torch.bfloat16))
        return self.three(nn.functional.softmax(x, -1, dtype=torch.float32).to(torch.bfloat16))


def test_precisions_that_the_graph_names_are_lifted_and_the_model_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Cast().bfloat16().eval()
    text = 'policy p { remove channels("one") { ratio = 50%, verify = float64 } }'
    result = compile_(text, model, (torch.randn(2, 4, dtype=torch.bfloat16),))
    error = error_of(next(note for note in result.notes if note.startswith("proven")))
    assert 0 < error < 1e-13
    assert {parameter.dtype for parameter in result.module.parameters()} == {torch.bfloat16}
    softmax = result.captured.node("softmax")
    assert torch.float32 in (*softmax.args, *softmax.kwargs.values())


def test_the_language_knows_three_ways() -> None:
    with pytest.raises(FxcError) as error:
        parse("policy p { remove channels(conv2d) { ratio = 50%, verify = float32 } }")
    assert "float64" in str(error.value)
