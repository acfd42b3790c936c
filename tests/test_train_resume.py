"""Checkpoints of a training: whole at any moment, and resumed to the same weights bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_killed import MORE
from train_nets import POLICY, Net, environment, noisy, samples, state_of, trainer

from fxcompress.diagnostics import PlanError
from fxcompress.training import checkpoint
from fxcompress.training.run import Run

HERE = Path(__file__).parent


class Stop(Exception):  # noqa: N818 (nothing went wrong)
    """In place of a crash."""


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_killed_ten_times_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", given=noisy(), **MORE).fit()
    assert whole.result.done and len(whole.history) == 6
    done = subprocess.run([sys.executable, HERE / "train_killed.py", tmp_path / "killed", "10", "5"], check=False,
                          capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["killed", "10"]
    found = checkpoint.load(tmp_path / "killed" / checkpoint.NAME)
    expected = checkpoint.load(tmp_path / "whole" / checkpoint.NAME)
    assert same(found["model"], expected["model"])
    assert found["history"] == expected["history"] and found["best"]["epoch"] == whole.best_epoch
    assert same(found["best"]["weights"], expected["best"]["weights"])
    for name in ("metrics.jsonl", "metrics.csv"):  # what was logged behind the last checkpoint is there once
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "killed").glob(".checkpoint*"))
    weights = "artifact/weights.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.parametrize("more", [
    {"optimizer": "SGD(lr=0.05, momentum=0.9)", "scheduler": "OneCycleLR(max_lr=0.1)"},
    {"accumulate": 2, "scheduler": "ReduceLROnPlateau(patience=0)", "workers": 1},
], ids=["onecycle", "plateau"])
def test_stopped_between_two_checkpoints(tmp_path: Path, more: dict[str, Any]) -> None:
    whole = trainer(**more, given=noisy()).fit()

    def stop(run: Run, moment: str) -> None:
        if run.steps in (8, 22) and moment == "step" and run.steps not in seen:
            seen.append(run.steps)
            raise Stop

    seen: list[int] = []
    for resume in (False, True):
        with pytest.raises(Stop):
            trainer(tmp_path, **more, given=noisy(), checkpoint_every=4).fit(resume=resume, told=stop)
    again = trainer(tmp_path, **more, given=noisy()).fit(resume=True)
    assert seen == [8, 22] and same(state_of(again), state_of(whole))
    assert again.history == whole.history


def test_a_finished_run_is_finished_again(tmp_path: Path) -> None:
    first = trainer(tmp_path, epochs=6).fit()
    again = trainer(tmp_path, epochs=6).fit(resume=True)
    assert same(state_of(first), state_of(again)) and first.history == again.history


def test_early_stopping_is_remembered(tmp_path: Path) -> None:
    policy = "policy p { mask linear { sparsity = 50% } }"
    more: dict[str, Any] = {"optimizer": "SGD(lr=0.0)", "scheduler": None, "patience": 2, "monitor": "loss",
                            "model": None}
    first = trainer(tmp_path, policy, **{**more, "model": Net(dropout=0)}).fit()
    assert first.result.clock.epochs < 6 and "stopped behind" in " ".join(first.notes)
    again = trainer(tmp_path, policy, **{**more, "model": Net(dropout=0)}).fit(resume=True)
    assert again.history == first.history


def refused(error: pytest.ExceptionInfo[PlanError]) -> str:
    found = error.value.diagnostics[0]
    assert found.code == "FXC0805"
    return "\n".join([found.message, *found.notes])


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        trainer(tmp_path).fit(resume=True)
    assert "no checkpoint" in refused(caught)
    trainer(tmp_path).fit()
    for more in ({"batch": 8}, {"optimizer": "SGD(lr=0.1)"}, {"seed": 1}):
        with pytest.raises(PlanError) as caught:
            trainer(tmp_path, **more).fit(resume=True)
        assert f"`{next(iter(more))}` was" in refused(caught)
    with pytest.raises(PlanError) as caught:
        trainer(tmp_path, model=Net(seed=1)).fit(resume=True)
    assert "doesn't begin with the weights" in refused(caught)
    with pytest.raises(PlanError) as other:
        trainer(tmp_path, POLICY.replace("60%", "61%")).fit(resume=True)
    assert other.value.diagnostics[0].code == "FXC0525"
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PlanError) as caught:
        trainer(tmp_path).fit(resume=True)
    assert "can't be read" in refused(caught)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def test_a_checkpoint_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": 1, "model": Bomb()}, tmp_path / checkpoint.NAME)
    with pytest.raises(PlanError) as caught:
        checkpoint.load(tmp_path / checkpoint.NAME)
    assert "can't be read" in refused(caught) and "it ran" not in capsys.readouterr().out


def test_a_failing_write_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, {"step": 1})

    def fails(file: Any) -> None:
        file.write(b"half")
        raise Stop

    with pytest.raises(Stop):
        checkpoint.write_bytes(path, fails)
    assert checkpoint.load(path)["step"] == 1 and [each.name for each in tmp_path.iterdir()] == [checkpoint.NAME]


def test_a_new_run_is_not_resumed_from_the_old_one(tmp_path: Path) -> None:
    def stop(run: Run, moment: str) -> None:
        raise Stop

    trainer(tmp_path).fit()
    with pytest.raises(Stop):
        trainer(tmp_path).fit(told=stop)
    with pytest.raises(PlanError) as caught:
        trainer(tmp_path).fit(resume=True)
    assert "no checkpoint" in refused(caught)


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    trained = trainer(tmp_path).fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    assert steps == list(range(4, 37, 4))
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["validation"] for row in epochs] == [row["validation"] for row in trained.history]
    assert len(samples(3, 1)) == 3 and epochs[-1]["sparsity"] == pytest.approx(0.6, abs=0.02)
