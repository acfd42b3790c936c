"""Every example runs. The demo is shortened; its full run is `make demo`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMAND = Path(sys.executable).with_name("fxcompress")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The demo with 3 epochs for 30: what it printed, and its artifact."""
    folder = tmp_path_factory.mktemp("demo")
    script, artifact = EXAMPLES / "lenet_mnist/demo.py", folder / "lenet"
    return run(sys.executable, script, "--epochs", "3", "--out", artifact, cwd=folder), artifact


def test_the_demo_shows_what_it_promises(demo: tuple[str, Path]) -> None:
    output, artifact = demo
    for row in ("accuracy", "parameters", "not zero", "MACs", "weights file", "latency"):
        assert re.search(rf"{row}.*│.*\d.*│.*\d", output), f"no row {row!r} in\n{output}"
    assert "plan lenet" in output
    assert f"artifact: {artifact}" in output


def test_the_demo_compresses(demo: tuple[str, Path]) -> None:
    record = json.loads(demo[1].with_suffix(".json").read_text(encoding="utf-8"))
    before, after = record["before"], record["after"]
    assert before["params"] == before["nonzero"] == 61_706  # LeNet-5
    assert before["macs"] == 416_520  # 117,600 + 240,000 + 48,000 + 10,080 + 840
    assert after["params"] <= 0.4 * before["params"]
    assert after["nonzero"] <= 0.35 * after["params"]
    assert after["macs"] <= 0.5 * before["macs"]
    assert after["file"] <= 0.45 * before["file"]
    assert after["accuracy"] > before["accuracy"] - 0.05
    in_use = [count for _, count in record["history"]["compressed"]]
    assert in_use[0] > in_use[-1] == after["nonzero"]


def test_a_second_process_says_the_same(demo: tuple[str, Path]) -> None:
    output, artifact = demo
    loaded = run(sys.executable, EXAMPLES / "lenet_mnist/evaluate.py", artifact, cwd=artifact.parent)
    record = json.loads(artifact.with_suffix(".json").read_text(encoding="utf-8"))
    assert float(loaded) == round(record["after"]["accuracy"], 4)
    assert "loaded by a second process" in output


def test_digits_are_split_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "lenet_mnist")
    from digits import digits

    train, test = digits()
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    seen = {image.numpy().tobytes() for image in train.images}
    assert not [i for i, image in enumerate(test.images) if image.numpy().tobytes() in seen]


def test_resnet18_plan(golden: Callable[[str, str], None], tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "resnet18/policy.fxc", tmp_path)
    text = run(COMMAND, "plan", "policy.fxc", "--model", "torchvision:resnet18", cwd=tmp_path)
    golden("examples/resnet18_plan.txt", text)


def test_python_only(golden: Callable[[str, str], None], tmp_path: Path) -> None:
    golden("examples/python_only.txt", run(sys.executable, EXAMPLES / "python_only/compress.py", cwd=tmp_path))


def test_iterative(tmp_path: Path) -> None:
    output = run(sys.executable, EXAMPLES / "iterative/tune.py", cwd=tmp_path)
    lines = re.findall(r"epoch +\d+: (\d+) of 32 channels .* accuracy ([\d.]+)%", output)
    assert [int(width) for width, _ in lines] == [29, 26, 26, 24, 24, 21, 21, 19, 19, 16, 16, 16]
    assert float(lines[-1][1]) > 90
    assert "21,642 parameters -> 5,578" in output


@pytest.mark.parametrize("policy", sorted(EXAMPLES.rglob("*.fxc")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_policies_are_checked_and_formatted(policy: Path) -> None:
    run(COMMAND, "check", policy, cwd=policy.parent)
    run(COMMAND, "fmt", "--check", policy, cwd=policy.parent)


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        "iterative", "lenet_mnist", "resnet18", "python_only", "lstm", "lenet_ticket", "minilm", "vgg11_to_shufflenet"}
