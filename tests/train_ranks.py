"""Run by test_train_ranks.py under `accelerate launch`: each process writes what it ends with.

    accelerate launch ... train_ranks.py FOLDER COMMAND...
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch
from train_nets import DISTILL, Teacher, data, state_of, trainer

from fxcompress.cli import run
from fxcompress.passbase import VERBS
from fxcompress.training import Trained, Trainer
from fxcompress.training import trainer as module
from fxcompress.training.run import Run

FOLDER = Path(sys.argv[1])


def keep(name: str, trained: Trained, rank: int) -> None:
    torch.save({"state": state_of(trained), "code": trained.result.module.code, "history": list(trained.history)},
               FOLDER / f"{name}{rank}.pt")


class Watched(Trainer):
    """What the command trains with, seen from here."""

    def fit(self, **keywords: object) -> Trained:  # type: ignore[override]
        trained = super().fit(**keywords)  # type: ignore[arg-type]
        keep("command", trained, self.accelerator.process_index)
        return trained


def stop(run: Run, moment: str) -> None:
    """In place of a crash, of all processes at the same step."""
    if moment == "step" and run.steps == 23:
        raise StopIteration


def main() -> None:
    from fxcompress import train

    train.Trainer = module.Trainer = Watched  # type: ignore[misc]
    try:
        run(sys.argv[2:])
    except SystemExit as done:
        assert not done.code, done.code
    # With a norm over the batch and dropout the processes see different things; they must come to the same anyway.
    again = trainer(given=data())
    keep("norm", again.fit(), again.accelerator.process_index)
    with suppress(StopIteration):
        trainer(FOLDER / "stopped", given=data(), checkpoint_every=5).fit(told=stop)
    again = trainer(FOLDER / "stopped", given=data())
    keep("resumed", again.fit(resume=True), again.accelerator.process_index)
    if "distill" in VERBS:
        taught = trainer(policy=DISTILL, given=data(), teacher=Teacher())
        keep("distill", taught.fit(), taught.accelerator.process_index)


if __name__ == "__main__":
    main()
