"""CONTRIBUTING.md's "add a verb in five steps", taken literally: its code makes a package that lies outside of ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.passbase import VERBS

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMAND = Path(sys.executable).with_name("fxcompress")
POLICY = """policy p {
    clip linear { limit = 0.1 }
}
"""
MODEL = """import torch
from torch import nn

example_inputs = (torch.zeros(2, 16),)

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
"""


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)
    return str(found)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip would leave it: the module, and a dist-info with the entry point of step 3."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "clip.py").write_text(block("python"), encoding="utf-8")
    info = folder / "fxcompress_clip-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fxcompress-clip\nVersion: 1.0\n", encoding="utf-8")
    table = re.fullmatch(r'\[project\.entry-points\."(.*)"\]\n(\w+) = "(.*)"\n', block("toml"))
    assert table is not None
    (info / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*table.groups()), encoding="utf-8")
    (folder / "policy.fxc").write_text(POLICY, encoding="utf-8")
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    return folder


def run(package: Path, *args: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([COMMAND, *args], cwd=package, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_verb_is_unknown_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "policy.fxc").write_text(POLICY, encoding="utf-8")
    code, output = run(tmp_path, "check", "policy.fxc")
    assert code == 1
    assert "clip" in output


def test_check_and_verbs_know_it_by_its_entry_point(package: Path) -> None:
    assert run(package, "check", "policy.fxc")[0] == 0
    code, output = run(package, "verbs", "clip")
    assert code == 0
    assert "the largest magnitude a weight may keep" in output


def test_a_misspelt_parameter_of_it_is_suggested(package: Path) -> None:
    (package / "wrong.fxc").write_text(POLICY.replace("limit", "limt"), encoding="utf-8")
    code, output = run(package, "check", "wrong.fxc")
    assert code == 1
    assert "did you mean `limit`" in output


def test_plan_and_compile_run_it(package: Path) -> None:
    code, output = run(package, "plan", "policy.fxc", "--model", "model.py:build")
    assert code == 0, output
    assert "within 0.1" in output
    code, output = run(package, "compile", "policy.fxc", "--model", "model.py:build", "-o", "made")
    assert code == 0, output
    module = fxcompress.load(package / "made")
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    for name, weight in dense.named_parameters():
        want = weight.clamp(-0.1, 0.1) if name.endswith("weight") else weight
        assert torch.equal(module.get_parameter(name), want)


def test_by_decorator_and_from_python(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(package)
    monkeypatch.setattr(VERBS, "_added", dict(VERBS._added))
    from clip import Clip

    assert fxcompress.register_verb(Clip) is Clip
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)), (torch.zeros(1, 3, 6, 6),)
    want = [p.clamp(-0.05, 0.05) if p.dim() > 1 else p.clone() for p in model.parameters()]
    applied = Clip(limit=0.05).apply(fxcompress.capture(model, example), "conv2d | linear")
    for got, expected in zip(applied.module.parameters(), want, strict=True):
        assert torch.equal(got, expected)
    compiled = fxcompress.compile("policy p { clip conv2d | linear { limit = 0.05 } }", model, example)
    for got, expected in zip(compiled.module.parameters(), want, strict=True):
        assert torch.equal(got, expected)
