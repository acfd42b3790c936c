"""Workers of `quantize_speed.py`, or of another script, seen from outside: started, prepared two at a time, timed in
turn."""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize_models import made_by

WORKER = Path(__file__).with_name("quantize_worker.py")
OUT = Path(__file__).parent.parent / "out/quantize_speed"
# glibc gives large blocks back to the system and takes them again, page by page, at every pass: with these it keeps
# them, for all contestants. (A threshold for mmap isn't enough: glibc 2.36 still maps tensors of 50 MB each time.)
# Which pages of memory a process gets is chance, and moved times by 7%; huge ones leave less to it, and are faster.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_MMAP_MAX_": "0",
             "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
ENVIRONMENT = {**ALLOCATOR, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
               "TORCHINDUCTOR_CACHE_DIR": str(OUT / "inductor")}
# What keeps oneDNN, FBGEMM, MKL, ATen and Inductor to the instructions of a CPU with AVX2 and without VNNI.
TOLD = {"ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2"}
MADE_FIRST = ("ours_auto", "ours_removed_auto")  # what takes too much memory to be made beside all others
ANSWER = 300  # seconds that an order may take


class WorkerError(Exception):
    """A contestant that failed; the text is for the table."""


@dataclass
class Worker:
    """One contestant's process. `told` is what it said when it was ready."""

    name: str
    process: subprocess.Popen[bytes]
    told: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, model: str, batch: int, core: int, script: Path = WORKER) -> Worker:
        log = OUT / "logs" / f"{model}-b{batch}-{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["taskset", "-c", str(core), sys.executable, str(script), model, str(batch), name]
        with log.open("wb") as stderr:
            return cls(name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                                              bufsize=0, env={**os.environ, **ENVIRONMENT}))

    def answer(self, limit: float) -> dict[str, Any]:
        """The next line of it. Raises WorkerError where it says that it failed, ends, or takes longer than `limit`
        seconds."""
        assert self.process.stdout is not None
        line, end = b"", time.monotonic() + limit
        while not line.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                self.stop()
                raise WorkerError(f"took more than {limit:.0f} s")
            piece = self.process.stdout.read(1 << 16)
            if not piece:
                raise WorkerError(f"ended with {self.process.wait()}")
            line += piece
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise WorkerError(found["error"])
        return found

    def ask(self, order: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{order}\n".encode())
        except BrokenPipeError:
            raise WorkerError(f"ended with {self.process.wait()}") from None
        return self.answer(ANSWER)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def instructions() -> str:
    """The widest vectors of this CPU, whether it sums products of bytes without saturating (VNNI), and whether it
    multiplies tiles of bytes (AMX): as libraries are told, if they are."""
    if TOLD.items() <= os.environ.items():
        return "AVX2 without VNNI, told"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    return ("AVX-512" if "avx512f" in flags else "AVX2") + (
        " with VNNI" if {"avx512_vnni", "avx_vnni"} & set(flags) else " without VNNI") + (
        " and AMX" if "amx_int8" in flags else "")


@dataclass
class Measured:
    """`times`: seconds of one pass by contestant and round; `errors`: why the others have none."""

    times: dict[str, list[float]]
    told: dict[str, dict[str, Any]]
    errors: dict[str, str]


def ready(names: Sequence[str], model: str, batch: int, cores: Sequence[int], limit: float,
          script: Path = WORKER) -> tuple[dict[str, Worker], dict[str, str]]:
    """A worker for each name, ready, and why the others failed; as many are prepared at a time as there are cores."""
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in cores:
        free.put(core)

    def prepare(name: str) -> Worker | str:
        core = free.get()
        worker = Worker.start(name, model, batch, core, script)
        try:
            worker.told = worker.answer(limit)
        except WorkerError as error:
            worker.stop()
            return str(error)
        finally:
            free.put(core)
        print(f"  {name} is ready", file=sys.stderr, flush=True)
        return worker

    with ThreadPoolExecutor(len(cores)) as pool:
        found = dict(zip(names, pool.map(prepare, names), strict=True))
    return ({name: each for name, each in found.items() if isinstance(each, Worker)},
            {name: each for name, each in found.items() if isinstance(each, str)})


@dataclass(frozen=True)
class Rounds:
    """How long to measure: at most `most` rounds within `budget` seconds, but at least `least`; a contestant runs for
    `share` seconds in a round, or once. All that, `lives` times over, each with new processes."""

    most: int = 30
    least: int = 3
    budget: float = 60.0
    share: float = 0.05
    lives: int = 2

    @classmethod
    def of(cls, args: argparse.Namespace) -> Rounds:
        """What the options of `options` say."""
        return cls(most=args.rounds, least=min(args.rounds, cls.least), budget=args.budget, lives=args.lives)


def options(parser: argparse.ArgumentParser, results: Path) -> None:
    """The options that the scripts share."""
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=Rounds.most, help="at most (default %(default)s)")
    parser.add_argument("--budget", type=float, default=Rounds.budget, metavar="SECONDS",
                        help=f"to time each model and batch, {Rounds.least} rounds at least (default %(default)s)")
    parser.add_argument("--lives", type=int, default=Rounds.lives, help="processes that each contestant has, one after "
                        "another (default %(default)s)")
    parser.add_argument("--core", type=int, default=1, help="the core to measure on (default %(default)s)")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS",
                        help="to prepare a contestant (default %(default)s)")
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--show", action="store_true", help="print the tables of the CSV and stop")


def in_turn(workers: Mapping[str, Worker], rounds: Rounds, core: int, seed: int = 0) -> Measured:
    """Time each worker once a round, in an order that chance gives. A contestant that fails on the way is out."""
    found = Measured({name: [] for name in workers}, {name: each.told for name, each in workers.items()}, {})
    repeats: dict[str, int] = {}
    chance = random.Random(seed)

    def ask(name: str, order: str) -> float:
        try:
            return float(workers[name].ask(order).get("seconds", 0.0))
        except WorkerError as error:
            found.errors[name] = str(error)
            del found.times[name]
            return 0.0

    for name in workers:  # a pass to get warm, and one that says how many make a round
        ask(name, f"pin {core}")
        if name in found.times:
            ask(name, "run 1")
        if name in found.times:
            repeats[name] = max(1, round(rounds.share / max(ask(name, "run 1"), 1e-6) + 0.5))
    begin = time.monotonic()
    for number in range(rounds.most):
        if number >= rounds.least and time.monotonic() - begin > rounds.budget:
            break
        for name in chance.sample(sorted(found.times), len(found.times)):
            seconds = ask(name, f"run {repeats[name]}")
            if name in found.times:
                found.times[name].append(seconds)
    return found


def measure(names: Sequence[str], model: str, batch: int, rounds: Rounds, core: int, limit: float,
            script: Path = WORKER) -> Measured:
    """Prepare all, time all, end all, and once more. `script` is what each contestant runs. They are prepared in an
    order that chance gives: on a virtual machine equal processes were found to be the slower, by up to half, the
    earlier they started."""
    cores = [core, *sorted(os.sched_getaffinity(0) - {core})[:1]]
    total = Measured({name: [] for name in names}, {}, {})
    try:
        for name in names:
            if name in MADE_FIRST:
                for worker in ready([name], model, batch, cores, limit, script)[0].values():
                    total.told[name] = worker.told
                    worker.stop()
        for life in range(rounds.lives):
            left = [name for name in names if name not in total.errors]
            workers, errors = ready(random.sample(left, len(left)), model, batch, cores, limit, script)
            try:
                found = in_turn(workers, rounds, core, seed=life)
            finally:
                for worker in workers.values():
                    worker.stop()
            total.errors |= found.errors | errors
            total.told |= {name: told for name, told in found.told.items() if name not in total.told}
            for name, times in found.times.items():
                total.times[name] += times
    finally:
        shutil.rmtree(made_by(os.getpid()), ignore_errors=True)
    for name in total.errors:
        total.times.pop(name, None)
    return total
