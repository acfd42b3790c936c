"""The benchmarks run. Times are not asserted; what is measured must be real work."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_the_long_policy_has_its_actions() -> None:
    import compile_time

    (phase,) = fxcompress.parse(compile_time.long_policy(1000)).phases
    assert len(phase.actions) == 1000


def test_the_policy_of_the_benchmark_is_right() -> None:
    import compile_time

    assert fxcompress.parse(compile_time.POLICY).name == "bench"


@pytest.mark.slow
def test_compile_time_prints_its_tables() -> None:
    command = [sys.executable, ROOT / "benchmarks/compile_time.py", "--repeat", "1"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert sum(line.startswith("| --- |") for line in output.splitlines()) == 3
    assert "| resnet50 | fxcompress |" in output


# Accuracy at the same MACs


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 24, 3, padding=1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)).eval()


def test_the_residual_network_has_the_parameters_it_names() -> None:
    import remove_accuracy as accuracy

    model = accuracy.ResNet14()
    stem, head = 9 * 16 + 32, 650
    blocks = 2 * (2 * 9 * 16 * 16 + 64) + (9 * 16 * 32 + 9 * 32 * 32 + 128 + 16 * 32 + 64) + (2 * 9 * 32 * 32 + 128) + (
        9 * 32 * 64 + 9 * 64 * 64 + 256 + 32 * 64 + 128) + (2 * 9 * 64 * 64 + 256)
    assert sum(p.numel() for p in model.parameters()) == stem + blocks + head
    assert f"{stem + blocks + head:,} parameters" in " ".join((model.__doc__ or "").split())
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_contestants_are_matched_by_macs(small: nn.Module) -> None:
    import remove_accuracy as accuracy
    from digits import digits

    pytest.importorskip("torch_pruning")
    split, _ = digits(0)
    full = accuracy.macs(small)
    target = full / 2
    makers = {who: make(small, accuracy.Setting("l2"), split) for who, make in accuracy.CONTESTANTS.items()}
    ratios: dict[str, float] = {}
    found = accuracy.chosen(makers, target, full, ratios)
    ours, theirs = (found[who].macs for who in (accuracy.OURS, accuracy.PEER))
    assert abs(ours - theirs) <= 0.01 * target and abs(ours - target) < 0.1 * target
    again = accuracy.chosen(makers, 0, full, ratios)
    assert [point.macs for point in again.values()] == [ours, theirs]


def test_the_table_of_accuracies_is_arithmetic() -> None:
    import remove_accuracy as accuracy

    shared = {"model": "net", "by": "l2", "scope": "global", "target": "0.5", "dense": "0.98", "pruned": "0.5"}
    rows = [{**shared, "seed": str(seed), "who": who, "macs": macs, "tuned": str(tuned)}
            for seed, ours, theirs in ((0, 0.96, 0.95), (1, 0.94, 0.92))
            for who, macs, tuned in ((accuracy.OURS, "0.5", ours), (accuracy.PEER, "0.496", theirs))]
    _, _, line, *rest = accuracy.table(rows).splitlines()
    assert line == ("| net | `l2`, global | 50% | 50.0 ± 0.0 | 50.0 ± 0.0 | 95.0 ± 1.4 | 93.5 ± 2.1 | +1.5 ± 0.5 |")
    assert "at most 0.8% apart" in rest[-1] and "(2 seeds)" in rest[-1]


@pytest.mark.slow
def test_accuracy_runs(tmp_path: Path) -> None:
    rows = _run_benchmark("remove_accuracy.py", tmp_path, "--quick", "--seeds", "1", "--only", "LeNet-5")
    assert {row["who"] for row in rows} == {"fxcompress", "Torch-Pruning"}
    assert all(float(row["tuned"]) > 0.6 for row in rows)


# Latency, speed and the zoo


def _run_benchmark(name: str, folder: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of the CSV that a benchmark writes, after it printed a table."""
    place = folder / "out.csv"
    command = [sys.executable, BENCHMARKS / name, "--out", place, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| ---" in done.stdout
    with place.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_latency_runs(tmp_path: Path) -> None:
    (row,) = _run_benchmark("remove_latency.py", tmp_path, "--only", "resnet50", "--rounds", "3", "--align", "8")
    assert 0.2 < float(row["macs_left"]) < 0.3
    assert 0 < float(row["low"]) <= float(row["latency_left"]) <= float(row["high"])


@pytest.mark.slow
def test_speed_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    (row,) = _run_benchmark("remove_speed.py", tmp_path, "--only", "resnet18", "--repeat", "1")
    parts = [float(row[f"seconds_{part}"]) for part in ("capture", "analyse", "rewrite")]
    assert float(row["ours"]) == pytest.approx(sum(parts), rel=1e-2)
    assert float(row["ratio"]) == pytest.approx(float(row["ours"]) / float(row["peer"]), rel=1e-2)


@pytest.mark.slow
def test_the_zoo_runs_resumes_and_shows(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    first = _run_benchmark("remove_zoo.py", tmp_path, "--only", "squeezenet1_1", "--only", "timm/resmlp_12_224")
    assert [(row["ok"], row["kind"]) for row in first] == [("True", "convolution"), ("True", "other")]
    again = _run_benchmark("remove_zoo.py", tmp_path, "--only", "squeezenet1_*", "--resume")
    assert [row["model"] for row in again] == ["squeezenet1_0", "squeezenet1_1", "resmlp_12_224"]
    assert again[1] == first[0]


def _worker(name: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, BENCHMARKS / "zoo_worker.py", "torchvision", name, "0", *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


def test_the_worker_tells_what_became_of_a_model() -> None:
    row = _worker("mobilenet_v3_small")
    assert row["ok"] and row["backward"] and row["error"] < 1e-4 and row["kind"] == "convolution"
    assert row["macs_after"] < 0.4 * row["macs_before"]


@pytest.mark.slow
def test_a_brief_worker_leaves_the_proof_out() -> None:
    row = _worker("squeezenet1_1", "--brief")
    assert row["ok"] and "seconds_prove" not in row and "error" not in row
    assert row["params_after"] < row["params_before"]


def test_the_summary_counts() -> None:
    import zoo_summary

    good = {"suite": "timm", "model": "a", "ok": "True", "kind": "convolution", "macs_before": "100",
            "macs_after": "30", "seconds_capture": "1", "seconds_analyse": "2", "seconds_rewrite": "3",
            "seconds_prove": "4", "error": "2e-06", "backward": "True", "peer_ok": "True", "peer_seconds": "12",
            "time_ratio": "0.5", "share_thinner": "1.0", "peer_share_thinner": "0.5"}
    rows = [good, {**good, "model": "b", "macs_after": "20", "error": "", "peer_ok": "False"},
            {"suite": "timm", "model": "c", "ok": "False", "refused": "True", "stage": "rewrite",
             "reason": "FXC0340\nx"},
            {"suite": "timm", "model": "d", "ok": "False", "stage": "", "reason": "took more than 120 s"}]
    text = zoo_summary.summary(rows)
    assert ("| timm | 4 | 1 | 1 | 2 | 1 | 1 | 25%, at most 30% | - | 1.00 + 2.00 + 3.00 + 4.00 | 2e-06 |") in text
    assert "| timm | 2 | 2 | 1 | 100% | 50% | 6.00 | 12.00 | 0.50 |" in text  # of those that the peer was run on
    assert text.splitlines()[-2:] == ["- `timm/c`, refused (rewrite): FXC0340",
                                      "- `timm/d`, wrong (time): took more than 120 s"]


class Attending(nn.Module):
    """Patches that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(("model", "kind"), [
    (Attending(), "attention"),
    (nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(16, 16)), "other"),
    (nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 1)), "convolution"),
])
def test_models_are_told_apart_by_how_they_mix_places(model: nn.Module, kind: str) -> None:
    import zoo_worker

    assert zoo_worker.kind_of_model(fxcompress.capture(model.eval(), torch.zeros(2, 3, 16, 16))) == kind
