"""The Makefile and .ci/run: what a fresh machine is asked to do, without doing it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
                          env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make reads, without a .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_help_says_what_every_target_does(checkout: Path) -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    code, output = run("make", cwd=checkout)
    assert code == 0
    listed = {line.split()[1] for line in output.splitlines()}
    assert listed == set(phony.split()) - {"typed"}


@pytest.mark.parametrize(("target", "extra", "last"), [
    ("test", "test", 'pytest -n 2 --dist loadfile -m "not slow"'),
    ("test-all", "test", "pytest -n 2 --dist loadfile"),
    ("demo", "examples", "examples/lenet_mnist/demo.py"),
])
def test_a_target_makes_its_environment_first(checkout: Path, target: str, extra: str, last: str) -> None:
    code, output = run("make", "-n", target, cwd=checkout)
    assert code == 0
    steps = ("-m venv .venv", "-c constraints.txt torch torchvision", f'-c constraints.txt -e ".[{extra}]"', last)
    places = [output.index(step) for step in steps]
    assert places == sorted(places)
    assert "uv " not in output


def test_what_is_installed_is_not_installed_again(checkout: Path) -> None:
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    for name in (".base", ".with-test"):
        (checkout / ".venv" / name).touch()
    assert "pip" not in run("make", "-n", "test", cwd=checkout)[1]
    os.utime(checkout / "pyproject.toml", (2**31, 2**31))  # later than all stamps
    output = run("make", "-n", "test", cwd=checkout)[1]
    assert '-e ".[test]"' in output
    assert "torchvision" not in output


def test_an_old_python_is_named(checkout: Path) -> None:
    code, output = run("make", "test", "PYTHON=false", cwd=checkout)
    assert code != 0
    assert "fxcompress needs Python 3.11 or later" in output
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(("recipe", "fails"), [("@echo '== 3 passed in 1s =='", False), ("@exit 1", True)])
def test_ci_run_is_make_test(tmp_path: Path, recipe: str, fails: bool) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(f"test:\n\t{recipe}\n", encoding="utf-8")
    code, output = run("bash", ".ci/run", cwd=tmp_path)
    assert (code != 0) is fails
    assert fails or output.splitlines()[-1] == "== 3 passed in 1s =="
    assert os.access(ROOT / ".ci/run", os.X_OK)
