"""A training with a teacher: its terms are the loss, they are logged, and a run that was stopped goes on the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_nets import DISTILL, Teacher, noisy, state_of, trainer

from fxcompress.passbase import VERBS
from fxcompress.training.run import Run

pytestmark = pytest.mark.skipif("distill" not in VERBS, reason="needs the verb `distill`")


class Stop(Exception):  # noqa: N818 (nothing went wrong)
    """In place of a crash."""


def test_terms_and_temperature_are_in_the_history() -> None:
    said: list[str] = []
    trained = trainer(policy=DISTILL, teacher=Teacher()).fit(say=said.append)
    first, last = trained.history[0], trained.history[-1]
    assert set(first["terms"]) == {"output_kl", "output_cross_entropy", "conv_hint"} and "terms" not in last
    kl, hard, hint = first["terms"].values()
    assert first["loss"] == pytest.approx(0.9 * kl + 0.1 * hard + 0.01 * hint, rel=1e-5)
    assert [row["temperatures"]["output_kl"] for row in trained.history[:3]] == pytest.approx([6.25, 4.5, 2.75])
    assert "T(output_kl) 6.25" in said[0] and "output_kl" not in said[-1]
    assert trained.result.done and trained.deployed is not None
    assert not [name for name in state_of(trained) if "teacher" in name]


@pytest.mark.parametrize("at", [4, 10, 30])
def test_it_is_resumed_the_same_with_its_adapters(tmp_path: Path, at: int) -> None:
    def stop(run: Run, moment: str) -> None:
        if moment == "step" and run.steps == at:
            raise Stop

    whole = trainer(policy=DISTILL, teacher=Teacher(), given=noisy()).fit()
    with pytest.raises(Stop):
        trainer(tmp_path, DISTILL, teacher=Teacher(), given=noisy(), checkpoint_every=3).fit(told=stop)
    again = trainer(tmp_path, DISTILL, teacher=Teacher(), given=noisy()).fit(resume=True)
    expected = state_of(whole)
    assert state_of(again).keys() == expected.keys() and again.history == whole.history
    assert all(torch.equal(value, expected[name]) for name, value in state_of(again).items())
