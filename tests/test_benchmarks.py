"""The benchmarks run. Times are not asserted; what is measured must be real work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fxcompress

ROOT = Path(__file__).parent.parent


def test_the_long_policy_has_its_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compile_time

    (phase,) = fxcompress.parse(compile_time.long_policy(1000)).phases
    assert len(phase.actions) == 1000


def test_the_policy_of_the_benchmark_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compile_time

    assert fxcompress.parse(compile_time.POLICY).name == "bench"


@pytest.mark.slow
def test_compile_time_prints_its_tables() -> None:
    command = [sys.executable, ROOT / "benchmarks/compile_time.py", "--repeat", "1"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.count("| --- |") == 3
    assert "| resnet50 | fxcompress |" in output
