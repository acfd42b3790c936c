"""Run by test_train_resume.py: trains in forked children and kills each at a random moment, until it has killed enough;
then trains to the end. Forked, for torch takes longer to load than the training takes.

    python train_killed.py FOLDER KILLS SEED
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from train_nets import SETTINGS, noisy, trainer

MORE = {**SETTINGS, "batch": 8, "checkpoint_every": 2}  # 12 steps an epoch


def child(folder: Path, resume: bool, pipe: int) -> None:
    trained = trainer(folder, given=noisy(), **MORE).fit(
        resume=resume, told=lambda run, moment: os.write(pipe, moment[:1].encode()))
    assert trained.result.done


def fork(folder: Path, events: int | None, wait: float) -> bool:
    """Train in a child; kill it `wait` seconds behind its event number `events`. Whether it was killed."""
    resume = (folder / "checkpoint.pt").exists()
    readable, writable = os.pipe()
    process = os.fork()
    if not process:
        os.close(readable)
        try:
            child(folder, resume, writable)
        except BaseException:  # noqa: BLE001 (the parent sees the exit code)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writable)
    seen = 0
    while (events is None or seen < events) and (got := os.read(readable, 1)):
        seen += len(got)
    if events is not None and seen == events:
        time.sleep(wait)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    os.close(readable)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the training failed"
    return os.WIFSIGNALED(status)


def main() -> None:
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    folder.mkdir(parents=True, exist_ok=True)
    killed = sum(fork(folder, rng.randint(1, 10), rng.uniform(0, 0.006)) for _ in range(kills))
    print(f"killed {killed}")
    assert not fork(folder, None, 0)


if __name__ == "__main__":
    main()
