"""SPECs of the command line: models, weights, example inputs, and what is said when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from fxcompress.policy import parse
from fxcompress.spec import BATCH, LENGTH, SpecError, declared_inputs, load_spec, load_weights

ZOO = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.body.weight

    def forward(self, first, second=None):
        return self.body(first) + self.tied(first)

def make():
    return Net()

def with_inputs():
    return Net()
with_inputs.example_inputs = (torch.ones(5, 4),)

def by_keyword():
    return Net()
by_keyword.example_inputs = lambda: {"first": torch.ones(2, 4), "second": None}

net = Net()
number = 3
wrong = by_keyword.__name__

def broken():
    raise KeyError("no such thing")

def bad_inputs():
    return Net()
bad_inputs.example_inputs = 3
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "zoo.py"
    path.write_text(ZOO)
    return path


def shapes(inputs: object) -> list[tuple[int, ...]]:
    assert isinstance(inputs, tuple)
    return [tuple(tensor.shape) for tensor in inputs]


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet18", [(1, 3, 224, 224)]), ("inception_v3", [(1, 3, 299, 299)]), ("r3d_18", [(1, 3, 16, 112, 112)]),
    ("raft_small", [(1, 3, 128, 128), (1, 3, 128, 128)]),
])
def test_torchvision(name: str, expected: list[tuple[int, ...]]) -> None:
    loaded = load_spec(f"torchvision:{name}")
    assert type(loaded.model) is type(torchvision.models.get_model(name))
    assert shapes(loaded.example_inputs) == expected and not loaded.model.training


def test_a_backbone_is_never_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    assert isinstance(load_spec("torchvision:lraspp_mobilenet_v3_large").model, nn.Module)


def test_timm() -> None:
    pytest.importorskip("timm")
    loaded = load_spec("timm:test_vit")
    assert shapes(loaded.example_inputs) == [(1, 3, 160, 160)]
    with pytest.raises(SpecError, match="did you mean test_vit"):
        load_spec("timm:test_vitt")


def test_a_file(zoo: Path) -> None:
    loaded = load_spec("zoo.py:with_inputs")
    assert type(loaded.model).__name__ == "Net" and shapes(loaded.example_inputs) == [(5, 4)]
    assert load_spec(f"{zoo}:by_keyword").example_inputs.keys() == {"first", "second"}  # type: ignore[union-attr]


def test_an_importable_module_and_a_ready_model(zoo: Path) -> None:
    policy = parse("policy p {\n input first: f32[N, 4]\n mask linear { sparsity = 50% }\n}")
    assert type(load_spec("zoo:make", None, policy.inputs).model).__name__ == "Net"
    assert shapes(load_spec("zoo:net", None, policy.inputs).example_inputs) == [(BATCH, 4)]


@pytest.mark.parametrize(("spec", "code", "words"), [
    ("resnet18", "FXC0710", "torchvision:NAME"),
    ("torchvision:", "FXC0710", "doesn't say"), (":x", "FXC0710", "doesn't say"), ("", "FXC0710", "doesn't say"),
    ("torchvision:resnet81", "FXC0711", "did you mean resnet18"),
    ("zoo.py:mkae", "FXC0713", "did you mean make"), ("zoo2.py:make", "FXC0713", "no file zoo2.py"),
    ("zoo2:make", "FXC0713", "no module `zoo2`"), ("torch.nothing:x", "FXC0713", "no module `torch.nothing`"),
    ("zoo.py:broken", "FXC0714", "KeyError"), ("zoo.py:number", "FXC0715", "a int"),
    ("zoo.py:make", "FXC0717", "example_inputs"), ("zoo.py:bad_inputs", "FXC0717", "a int"),
    ("torchvision.models:resnet18", "FXC0717", "declare them"),
])
def test_mistakes(zoo: Path, spec: str, code: str, words: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec(spec)
    (found,) = error.value.diagnostics
    assert found.code == code and words in str(error.value) and found.help


def test_the_users_own_error_names_its_place_and_keeps_its_traceback(zoo: Path) -> None:
    with pytest.raises(SpecError) as error:
        load_spec("zoo.py:broken")
    line = ZOO.splitlines().index('    raise KeyError("no such thing")') + 1
    assert error.value.diagnostics[0].notes == (f"raised at zoo.py:{line}",)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_module_that_imports_a_missing_one(zoo: Path) -> None:
    zoo.with_name("needs.py").write_text("import no_such_library\n")
    with pytest.raises(SpecError) as error:
        load_spec("needs:make")
    assert error.value.diagnostics[0].code == "FXC0714" and "no_such_library" in str(error.value)


class Two(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        return ids


def test_declared_inputs() -> None:
    text = ("policy p {{\n {}\n mask linear {{ sparsity = 50% }}\n}}")
    model = Two()

    def inputs(*lines: str) -> object:
        return declared_inputs(parse(text.format("\n ".join(lines))).inputs, model)

    found = inputs("input ids: i64[N, T]", "input mask: bool[N, T]")
    assert isinstance(found, tuple)
    assert [(t.dtype, tuple(t.shape)) for t in found] == [
        (torch.int64, (BATCH, LENGTH)), (torch.bool, (BATCH, LENGTH))]
    assert all(bool((t == 1).all()) for t in found)  # a token of every vocabulary, a mask that hides nothing
    by_name = inputs("input extra: bf16[N, 3]", "input ids: u8[4, 4]")
    assert isinstance(by_name, dict) and {k: v.dtype for k, v in by_name.items()} == {
        "extra": torch.bfloat16, "ids": torch.uint8}
    assert isinstance(inputs("input image: f32[N, 3]"), tuple)  # a name of the policy's own
    again = inputs("input image: f32[N, 3]")
    assert torch.equal(again[0], inputs("input image: f32[N, 3]")[0])  # type: ignore[index]


def test_weights(zoo: Path) -> None:
    first, second = load_spec("zoo.py:with_inputs").model, load_spec("zoo.py:with_inputs").model
    state = {"body.weight": first.state_dict()["body.weight"], "body.bias": first.state_dict()["body.bias"]}
    safetensors.torch.save_file(state, "tied_once.safetensors")
    load_weights(second, "tied_once.safetensors")
    x = torch.randn(2, 4)
    assert torch.equal(first(x), second(x))
    assert torch.equal(load_spec("zoo.py:with_inputs", "tied_once.safetensors").model(x), first(x))


@pytest.mark.parametrize(("changes", "expected"), [
    ({"body.bias": None}, ["`body.bias` is missing"]),
    ({"body.bias": torch.zeros(4)}, ["`body.bias` is [4] in the file and [3] in the model"]),
    ({"body.bias": None, "body.bais": torch.zeros(3)},
     ["`body.bias` is missing (the file has `body.bais`)", "`body.bais` is not in the model"]),
    ({"body.weight": None, "tied.weight": None}, ["`body.weight` is missing", "`tied.weight` is missing"]),
])
def test_weights_that_do_not_fit(zoo: Path, changes: dict[str, Tensor | None], expected: list[str]) -> None:
    state = {name: tensor.clone() for name, tensor in load_spec("zoo.py:with_inputs").model.state_dict().items()}
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    safetensors.torch.save_file(state, "w.safetensors")
    with pytest.raises(SpecError) as error:
        load_spec("zoo.py:with_inputs", "w.safetensors")
    assert list(error.value.diagnostics[0].notes) == expected
    count = "1 tensor doesn't fit" if len(expected) == 1 else f"{len(expected)} tensors don't fit"
    assert error.value.diagnostics[0].message.endswith(count)


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 10])
def test_weights_that_are_no_weights(zoo: Path, content: bytes | None) -> None:
    if content is not None:
        Path("w.safetensors").write_bytes(content)
    with pytest.raises(SpecError) as error:
        load_spec("zoo.py:with_inputs", "w.safetensors")
    assert error.value.diagnostics[0].code == "FXC0716"


def test_many_misfits_are_counted(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(SpecError) as error:
        load_spec("torchvision:resnet18", tmp_path / "w.safetensors")
    notes = error.value.diagnostics[0].notes
    assert len(notes) == 13 and notes[-1].startswith("and ")
