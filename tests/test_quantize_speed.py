"""`quantize_speed.py`: its arithmetic, its tables, and its workers as processes. Times are not asserted."""

from __future__ import annotations

import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def row(contestant: str, speed: float | None, over: float = 1.0, **other: Any) -> dict[str, Any]:
    """A row as it is read from the CSV: all text."""
    cells = {"model": "resnet18", "batch": 1, "contestant": contestant, "cpu": "AVX2 with VNNI", "run": "a",
             "error": "", "rounds": "", "ms": "", "speed": "", "low": "", "high": "", "over_fp32": "", "drift": 0.01}
    if speed is not None:
        cells |= {"rounds": 5, "ms": 80 / speed, "speed": speed, "low": speed * 0.9, "high": speed * 1.1,
                  "over_fp32": over}
    return {key: str(value) for key, value in {**cells, **other}.items()}


def line(text: str, start: str, which: int = 0) -> list[str]:
    """The cells of the line of a Markdown table that begins with `start`."""
    found = [each for each in text.splitlines() if each.startswith(f"| {start}")]
    return [cell.strip() for cell in found[which].strip("|").split("|")]


def test_ratios_pair_the_rounds() -> None:
    from quantize_speed import ratios

    base, times = [8.0, 4.0, 6.0, 9.0, 10.0], [4.0, 1.0, 2.0, 3.0, 2.0]  # 2, 4, 3, 3, 5
    low, middle, high = ratios(base, times)
    assert middle == statistics.median([2, 4, 3, 3, 5]) == 3 and (low, high) == (3, 4)
    assert middle != statistics.median(base) / statistics.median(times)
    assert ratios([6.0], [2.0]) == (3, 3, 3)


def test_rows_hold_ratios_and_errors() -> None:
    from quantize_process import Measured
    from quantize_speed import rows_of

    found = Measured({"eager": [4.0, 8.0, 6.0], "ours_fp32": [2.0, 4.0, 3.0], "ort_int8": [1.0, 2.0, 1.5]},
                     {"ort_int8": {"drift": 0.25, "seconds": 3.0}}, {"ov_int8": "it\nbroke"})
    eager, ours, ort, openvino = rows_of("vgg11", 16, ["eager", "ours_fp32", "ort_int8", "ov_int8"], found, "now")
    assert eager["speed"] == 1 and ours["speed"] == 2 and ort["speed"] == 4 and ort["over_fp32"] == 2
    assert eager["ms"] == 6000 and ort["rounds"] == 3 and ort["drift"] == 0.25
    assert openvino["error"] == "it broke" and "speed" not in openvino
    (alone,) = rows_of("vgg11", 16, ["ort_int8"], Measured({"ort_int8": [1.0]}, {}, {"eager": "no"}), "now")
    assert "eager failed" in alone["error"]


def test_a_table_shows_the_fastest_of_a_kind_and_the_geometric_mean() -> None:
    from quantize_speed import table

    rows = [row("eager", 1.0), row("ours_fp32", 1.5), row("ao_x86", 2.0, 1.4), row("ao_onednn", 2.5, 1.7),
            *(row(name, speed, model="vgg11") for name, speed in (("eager", 1.0), ("ours_fp32", 1.2), ("ao_x86", 10.0),
                                                                  ("ao_onednn", 3.0)))]
    text = table(rows)
    assert line(text, "model") == ["model", "batch", "eager ms", "ours fp32", "torch.ao"]
    assert line(text, "resnet18") == ["resnet18", "1", "80", "1.50", "**2.50**"]
    assert line(text, "geometric") == ["geometric mean", "", "", "1.34", "5.00"]  # sqrt(1.5 * 1.2), sqrt(2.5 * 10)
    assert line(text, "resnet18", 1) == ["resnet18", "1", "80", "**1.70**"]  # over our fp32
    assert "without a gap" not in text and "Failed" not in text


def test_failures_and_garbage_are_shown_as_such() -> None:
    from quantize_speed import table

    rows = [row("eager", 1.0), row("ours_fp32", 1.5), row("ort_int8", 9.0, drift=0.9), row("ov_int8", 3.0),
            row("eager", 1.0, model="vgg11"), row("ours_fp32", 1.5, model="vgg11"), row("ort_int8", 2.0, model="vgg11"),
            row("ov_int8", None, model="vgg11", error="RuntimeError: a | b", run="b")]
    text = table(rows)
    assert line(text, "resnet18")[-2:] == ["9.00 (drift 90%)", "**3.00**"]
    assert line(text, "vgg11")[-2:] == ["**2.00**", "failed"] and line(text, "geometric")[-1] == "-"
    assert line(text, "of the 1 lines without a gap")[-1] == "3.00"
    assert "- vgg11, batch 1, `ov_int8`: RuntimeError: a / b" in text
    assert "Not all of one run: vgg11 at batch 1." in text


def test_garbage_is_not_the_fastest_of_its_kind() -> None:
    from quantize_speed import best

    rows = {"ao_x86": row("ao_x86", 5.0, drift="nan"), "ao_onednn": row("ao_onednn", 2.0, drift=0.1)}
    assert best(rows, ("ao_x86", "ao_onednn")) is rows["ao_onednn"]
    assert best({"ao_x86": rows["ao_x86"]}, ("ao_x86", "ao_onednn")) is rows["ao_x86"]
    assert best(rows, ("ov_int8",)) is None


def test_it_is_said_where_ours_are_behind_and_whether_quartiles_overlap() -> None:
    from quantize_speed import beside, by_pair

    def close(contestant: str, speed: float, **other: Any) -> dict[str, Any]:
        return row(contestant, speed, **other) | {"low": str(speed * 0.99), "high": str(speed * 1.01)}

    rows = [close(name, speed, model=model) for model, auto, int8 in (
        ("resnet18", 5.0, 4.0), ("resnet50", 4.95, 4.0), ("vgg11", 4.5, 3.0)) for name, speed in (
        ("ours_auto", auto), ("ov_int8", 5.0), ("ours_int8", int8), ("ao_x86", 3.5))]
    assert list(beside(by_pair([*rows, close("ort_int8", 9.0, drift=0.9)]))) == [
        "`auto` beside the fastest peer: ahead or equal on 1 line; behind, but quartiles overlap: resnet50 at batch 1 "
        "(1.0%); behind: vgg11 at batch 1 (10.0%).",
        "The int8 GraphModule beside torch.ao's faster engine: ahead or equal on 2 lines; behind: vgg11 at batch 1 "
        "(14.3%)."]


def test_rows_of_a_new_run_take_the_place_of_old_ones() -> None:
    from quantize_speed import contestants, done, merged

    old = [row("eager", 1.0), row("ours_int8", 2.0), row("eager", 1.0, model="vgg11")]
    new = [row("ours_int8", 3.0), row("ort_int8", 4.0)]
    assert [(each["model"], each["contestant"], each["speed"]) for each in merged(old, new)] == [
        ("resnet18", "eager", "1.0"), ("resnet18", "ours_int8", "3.0"), ("resnet18", "ort_int8", "4.0"),
        ("vgg11", "eager", "1.0")]
    assert done(old, "resnet18", 1, ["eager", "ours_int8"]) and not done(old, "vgg11", 1, ["eager", "ours_int8"])
    assert not done(old, "resnet18", 16, ["eager"])
    assert contestants("vgg11", False, ["ort_int8"]) == ["eager", "ours_fp32", "ort_int8"]
    told = contestants("vgg11", True, [], without_vnni=True)
    assert "ao_x86" in told and not {"ort_int8", "ov_int8", "ours_auto"} & set(told)
    assert "ort_dynamic" in contestants("vit_b_16", True, []) and "ort_dynamic" not in contestants("vgg11", True, [])


def test_what_cant_be_told_to_do_without_vnni_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantize_process import TOLD, instructions
    from quantize_speed import table_without_vnni

    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    assert instructions() == "AVX2 without VNNI, told"
    text = table_without_vnni([row("eager", 1.0), row("ours_int8", 2.0), row("ao_x86", 1.5)])
    assert line(text, "resnet18") == ["resnet18", "1", "80", "**2.00**", "1.50"] and "OpenVINO |" not in text


def test_the_sum_is_compared_with_the_best_peer() -> None:
    from quantize_and_remove import NAMES, table

    speeds = dict(zip(NAMES, (1.0, 2.5, 3.0, 8.0, 12.0, 3.2, 4.0), strict=True))
    text = table([row(name, speed, model="resnet50") for name, speed in speeds.items()])
    assert text.endswith("over the best peer's int8 of the dense model: x 2.00 by int8 at batch 1, x 3.00 by `auto` at "
                         "batch 1.")
    assert line(text, "OpenVINO, int8") == ["OpenVINO, int8", "1", "20", "4.00 (3.60 to 4.40)"]


def test_drift_is_relative_and_takes_the_forms_that_peers_answer_in() -> None:
    from quantize_worker import drift

    expected = torch.tensor([3.0, 4.0])
    assert drift(expected, expected) == 0 and drift([(expected * 1.1).numpy()], expected) == pytest.approx(0.1)
    assert drift({"y": torch.zeros(2)}, expected) == 1


def test_what_is_cached_is_made_once(tmp_path: Path) -> None:
    from quantize_models import cached

    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("x")

    for _ in range(2):
        assert cached(tmp_path / "a/b.onnx", make).read_text() == "x"
    assert len(made) == 1 and made[0].suffix == ".onnx" and not made[0].exists()


def test_a_worker_obeys_its_orders() -> None:
    from quantize_worker import serve

    calls, answers = [], []
    serve(lambda: calls.append(1), io.StringIO("run 3\nrun 2\n"), answers.append)
    assert len(calls) == 5 and [set(each) for each in answers] == [{"seconds"}] * 2
    with pytest.raises(ValueError, match="no such order: jump"):
        serve(lambda: None, io.StringIO("jump 1\n"), answers.append)


# A worker that is no model: it says what the real ones say.
SCRIPT = """
import json, sys, time
name = sys.argv[3]
if name == "mute": time.sleep(60)
if name == "dies": sys.exit(3)
print(json.dumps({"error": "no kernel"} if name == "fails" else {"ready": True, "drift": 0.5}), flush=True)
for line in sys.stdin:
    order, number = line.split()
    if name == "breaks" and order == "run": sys.exit(4)
    print(json.dumps({"seconds": 0.02 if order == "run" else 0.0}), flush=True)
"""


def test_processes_are_timed_in_turn_and_failures_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quantize_process as process

    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(process, "OUT", tmp_path)
    core = min(process.os.sched_getaffinity(0))
    names = ["one", "two", "fails", "dies", "breaks"]
    found = process.measure(names, "net", 1, process.Rounds(most=4, budget=60, lives=2), core, limit=60, script=script)
    assert found.times == {"one": [0.02] * 8, "two": [0.02] * 8} and found.told["one"]["drift"] == 0.5
    assert found.errors == {"fails": "no kernel", "dies": "ended with 3", "breaks": "ended with 4"}
    mute = process.Worker.start("mute", "net", 1, core, script)
    with pytest.raises(process.WorkerError, match="took more than 1 s"):
        mute.answer(1)
    assert mute.process.poll() is not None  # it was ended


@pytest.mark.slow
def test_a_real_worker_answers() -> None:
    import subprocess

    done = subprocess.run([sys.executable, BENCHMARKS / "quantize_worker.py", "shufflenet_v2_x0_5", "1", "ours_int8"],
                          input="run 1\n", capture_output=True, text=True, check=True)
    ready, timed = map(json.loads, done.stdout.splitlines())
    assert 0 < ready["drift"] < 0.5 and timed["seconds"] > 0
