"""The commands that need a model, end to end: exit codes, what is printed where, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fxcompress
from fxcompress import commands
from fxcompress.cli import run as run_command

Golden = Callable[[str, str], None]
ZOO = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))

def net():
    torch.manual_seed(0)
    return Net()

def wide():
    model = net()
    model.head = nn.Linear(8, 5)
    return model
"""
POLICY = """policy small(sparsity: percent = 60%) {
    input x: f32[N, 3, 8, 8]

    phase shrink over epochs 0..3 {
        remove channels(conv2d[name ~ "first"]) { ratio = 50% }
    }
    phase thin over steps 500..9000 after shrink {
        mask conv2d { sparsity = cubic(0% -> sparsity), every = 100 steps }
    }
    phase last over 50%..100% of training after thin {
        mask linear { sparsity = 50% }
    }
}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo.py").write_text(ZOO)
    (tmp_path / "small.fxc").write_text(POLICY)
    return tmp_path


def run(arguments: list[str]) -> int:
    """The exit code of a command line."""
    try:
        return run_command(arguments)
    except SystemExit as done:
        return int(done.code or 0)


def normal(text: str) -> str:
    return re.sub(r"zeroed, to \S+", "zeroed, to <rounding>", text)


def test_compile_without_training(here: Path, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "small.fxc", "--model", "zoo.py:net", "-o", "out"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    golden("commands/compile.txt", normal(printed.out))
    loaded = fxcompress.load("out")
    for name, share in (("first.weight", 0.6), ("second.weight", 0.6), ("head.weight", 0.5)):
        weight = loaded.get_parameter(name)
        assert int((weight == 0).sum()) == round(share * weight.numel()), name  # every ramp is at its end
    assert loaded.get_parameter("first.weight").shape[0] == 4
    assert not loaded.training and loaded(torch.randn(3, 3, 8, 8)).shape == (3, 4)
    report = json.loads(Path("out/report.json").read_text())
    assert report["trained"] == {"steps": 0, "epochs": 0} and set(report["phases"].values()) == {1.0}


def test_parameters_and_weights(here: Path) -> None:
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in _net_state().items()}
    safetensors.torch.save_file(state, "w.safetensors")
    arguments = ["compile", "small.fxc", "--model", "zoo.py:net", "-o", "out"]
    assert run([*arguments, "--weights", "w.safetensors", "--param", "sparsity=25%"]) == 0
    weight = fxcompress.load("out").get_parameter("second.weight")
    assert int((weight == 0).sum()) == weight.numel() // 4 and set(weight.unique().tolist()) == {0.0, 0.5}


def _net_state() -> dict[str, torch.Tensor]:
    space: dict[str, object] = {}
    exec(ZOO, space)
    return dict(space["net"]().state_dict())  # type: ignore[operator]


def test_plan_is_saved_and_required(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "small.fxc", "--model", "zoo.py:net", "-o", "plan.json"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("plan small for Net")
    assert printed.err == "the plan is in plan.json\n"
    assert fxcompress.Plan.from_json(Path("plan.json").read_text()).show() == printed.out
    compile_it = ["compile", "small.fxc", "--plan", "plan.json", "-o", "out", "--model"]
    assert run([*compile_it, "zoo.py:net"]) == 0
    capsys.readouterr()

    assert run([*compile_it, "zoo.py:wide"]) == 1
    assert "FXC0331" in capsys.readouterr().err
    Path("small.fxc").write_text(POLICY.replace("60%", "61%"))
    assert run([*compile_it, "zoo.py:net"]) == 1
    assert "FXC0330" in capsys.readouterr().err
    Path("small.fxc").write_text(POLICY.replace("policy small", "# a remark\npolicy  small"))
    assert run([*compile_it, "zoo.py:net"]) == 0  # neither remarks nor blanks count
    capsys.readouterr()
    for content in (None, "{}", "nonsense", "\udcff"):
        Path("plan.json").unlink(missing_ok=True)
        if content is not None:
            Path("plan.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        assert run([*compile_it, "zoo.py:net"]) == 1
        assert re.search("FXC0720|FXC0332", capsys.readouterr().err)


def test_plan_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "small.fxc", "--model", "zoo.py:net", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "small"
    assert run(["plan", "small.fxc", "--model", "zoo.py:net", "-o", "no/such/folder/p.json"]) == 1
    assert "FXC0721" in capsys.readouterr().err


def test_plan_layer_by_layer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "small.fxc", "--model", "zoo.py:net"]) == 0
    short = capsys.readouterr().out
    assert run(["plan", "small.fxc", "--model", "zoo.py:net", "--verbose"]) == 0
    full = capsys.readouterr().out
    assert len(full.splitlines()) > len(short.splitlines())
    assert re.search(r"^ +second +conv2d +in_channels +8 -> 4 ", full, re.MULTILINE)
    assert "in_channels" not in short


def test_inspect_diff_explain(here: Path, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    for name, share in (("one", "60%"), ("two", "80%")):
        arguments = ["compile", "small.fxc", "--model", "zoo.py:net", "--param", f"sparsity={share}", "-o", name]
        assert run(arguments) == 0
    capsys.readouterr()

    assert run(["inspect", "one"]) == 0
    golden("commands/inspect.txt", normal(capsys.readouterr().out))
    assert run(["inspect", "one", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "one"
    assert commands.inspect(Path("one"), "html") == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")

    assert run(["diff", "one", "two"]) == 0
    golden("commands/diff.txt", capsys.readouterr().out)
    assert run(["diff", "one", "two", "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["changed"]) == 2

    assert run(["explain", "one", "second"]) == 0
    golden("commands/explain.txt", capsys.readouterr().out)
    assert run(["explain", "one", "secnd"]) == 1
    assert "did you mean `second`" in capsys.readouterr().err
    for command in (["inspect", "zero"], ["diff", "one", "zero"], ["explain", "zero", "x"]):
        assert run(command) == 1
        assert "FXC0601" in capsys.readouterr().err


def test_check_with_a_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "small.fxc", "--model", "zoo.py:net"]) == 0
    assert capsys.readouterr().err == "1 file checked against zoo.py:net: no errors\n"
    Path("bad.fxc").write_text(POLICY.replace('"first"', '"frist"').replace("input x", "input y"))
    Path("worse.fxc").write_text(POLICY.replace("ratio = 50%", "ratio = 50"))
    assert run(["check", "small.fxc", "bad.fxc", "worse.fxc", "--model", "zoo.py:net"]) == 1
    printed = capsys.readouterr().err
    assert all(code in printed for code in ("FXC0202", "FXC0210", "FXC0105"))  # every error of every file
    assert run(["check", "bad.fxc", "--model", "zoo.py:net", "--format", "json"]) == 1
    assert {item["code"] for item in json.loads(capsys.readouterr().out)} == {"FXC0202", "FXC0210"}
    assert run(["check", "bad.fxc", "--model", "zoo.py:net", "--format", "sarif"]) == 1
    assert json.loads(capsys.readouterr().out)["version"] == "2.1.0"


@pytest.mark.parametrize("command", [
    ["check", "small.fxc"], ["plan", "small.fxc"], ["compile", "small.fxc", "-o", "out"]])
def test_a_wrong_spec_is_a_wrong_command_line(here: Path, command: list[str],
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--model", "zoo.py:nett"]) == 2
    assert "did you mean net" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_expectation_that_fails_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.fxc").write_text(POLICY.rstrip().removesuffix("}") + '    expect params <= 10 else "too large"\n}\n')
    assert run(["compile", "small.fxc", "--model", "zoo.py:net", "-o", "out"]) == 1
    assert "FXC0530" in capsys.readouterr().err and not Path("out").exists()


def test_a_score_that_needs_gradients_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("g.fxc").write_text("policy g {\n    input x: f32[N, 3, 8, 8]\n"
                             "    mask linear { sparsity = 50%, by = gradient }\n}\n")
    code = run(["compile", "g.fxc", "--model", "zoo.py:net", "-o", "out"])
    printed = capsys.readouterr().err
    assert code == 0 and "FXC0524" in printed and "seen no gradients" in printed


def test_the_program_itself(here: Path) -> None:
    command = [sys.executable, "-m", "fxcompress", "compile", "small.fxc", "--model", "zoo:net", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the artifact is in out\n")
