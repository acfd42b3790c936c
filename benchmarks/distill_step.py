"""Seconds of a training step with a teacher: the fused graph, the usual loop over two models, and forward hooks.

    python benchmarks/distill_step.py [--only vgg11_shufflenet] [--modes eager compiled] [--core 0]
    python benchmarks/distill_step.py --show            # the table of the CSV, without running anything

The same models, batch (16 images of 64 x 64) and optimizer (SGD with momentum) for all; each contestant has its own
process, all of a setup are prepared before any is timed, and each is timed once a round, in an order that chance gives.
A round's ratio is the time of the loop over the contestant's in that round. Times are processor time of one thread on
one core: forward, backward and the optimizer's step. Compiled is all that makes the loss, by `torch.compile`; that of
the fused graph with `fullgraph=True`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from distill_worker import COMPILED, SETUPS, SIZE
from quantize_process import Measured, Rounds, measure, options
from quantize_speed import ratios
from tables import Row, markdown, number, read, write

WORKER = Path(__file__).with_name("distill_worker.py")
RESULTS = Path(__file__).parent / "results/distill_step.csv"
COLUMNS = ("setup", "batch", "contestant", "mode", "rounds", "ms", "speed", "low", "high", "memory_mib", "student",
           "teacher", "teacher_left", "loss", "prepare_s", "run", "error")
MODES = ("eager", "compiled")
BASE = "loop"
STEPS = {"student": "the student alone", "loop": "loop, two models", "hooks": "forward hooks", "fused": "**fused**",
         "cached": "**fused, logits cached**"}
SHOWN = {"vgg11_shufflenet": "vgg11 -> shufflenet_v2_x0_5, logits",
         "resnet34_resnet18": "resnet34 -> resnet18, three features",
         "masked_resnet18": "resnet18 -> itself masked, logits, frozen stem"}


def contestants(setup: str) -> list[str]:
    """Those that make sense: hooks where features are compared, cached logits where nothing else of the teacher is."""
    return ["student", BASE, *(["hooks"] if SETUPS[setup].features else []), "fused",
            *([] if SETUPS[setup].features else ["cached"])]


def rows_of(setup: str, batch: int, mode: str, names: Sequence[str], found: Measured, run: str) -> list[Row]:
    """A row for each contestant; one that failed has its error. Raises SystemExit where two that learn the same came
    to different losses."""
    suffix = COMPILED if mode == "compiled" else ""
    rows = []
    for name in names:
        full = name + suffix
        told = found.told.get(full, {})
        row: Row = {"setup": setup, "batch": batch, "contestant": name, "mode": mode, "run": run,
                    "memory_mib": told.get("memory", ""), "prepare_s": told.get("seconds", ""),
                    **{key: told.get(key, "") for key in ("student", "teacher", "teacher_left", "loss")}}
        if full in found.errors or BASE + suffix in found.errors:
            row["error"] = " ".join(found.errors.get(full, f"{BASE} failed").split())[:300]
        else:
            times = found.times[full]
            low, middle, high = ratios(found.times[BASE + suffix], times)
            row |= {"rounds": len(times), "ms": 1000 * statistics.median(times), "speed": middle, "low": low,
                    "high": high}
        rows.append(row)
    same = [float(row["loss"]) for row in rows if row["contestant"] != "student" and number(row, "loss") is not None]
    if same and max(same) > 1.01 * min(same):
        raise SystemExit(f"{setup}, {mode}: the losses behind the first steps differ: {same}")
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line for each setup and contestant, both modes beside each other."""
    head = ["models", "step", "parameters held", *(f"{mode} {what}" for mode in MODES for what in (
        "ms", "speed over the loop", "peak MiB"))]
    lines = []
    for setup in dict.fromkeys(row["setup"] for row in rows):
        for name in dict.fromkeys(row["contestant"] for row in rows if row["setup"] == setup):
            mine = {row["mode"]: row for row in rows if (row["setup"], row["contestant"]) == (setup, name)}
            cells = [cell for mode in MODES for cell in _cells(mine.get(mode))]
            lines.append([SHOWN[setup], STEPS[name], _held(name, next(iter(mine.values()))), *cells])
    return markdown(head, lines, words=2) + f"\n\n{_how(rows)}"


def _held(name: str, row: Row) -> str:
    left = {"student": 0.0, "loop": number(row, "teacher"), "hooks": number(row, "teacher")}.get(
        name, number(row, "teacher_left"))
    return "-" if left is None else f"{(float(row['student']) + left) / 1e6:.2f} M"


def _cells(row: Row | None) -> list[str]:
    if row is None or number(row, "ms") is None:
        return ["not run" if row is None else "failed", "-", "-"]
    spread = f" ({float(row['low']):.2f} to {float(row['high']):.2f})" if row["contestant"] != BASE else ""
    return [f"{float(row['ms']):.0f}", f"{float(row['speed']):.2f}{spread}", f"{float(row['memory_mib']):.0f}"]


def _how(rows: Sequence[Row]) -> str:
    counts = sorted({int(row["rounds"]) for row in rows if number(row, "rounds") is not None})
    batches = ", ".join(sorted({str(row["batch"]) for row in rows}))
    return (f"A step is forward, backward and SGD with momentum: batch {batches}, {SIZE} x {SIZE}, one thread on one "
            f"pinned core, processor time. Medians of paired ratios over {counts[0] if counts else 0} to "
            f"{counts[-1] if counts else 0} rounds, in brackets their quartiles. Memory is the most that the process "
            "had resident in two steps, Python and torch in it; glibc keeps its pages, as above, for all. Whoever "
            "learns the same comes to the same loss, to 1%. The frozen stem is `conv1` and `layer1`.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options(parser, RESULTS)
    parser.set_defaults(batches=[16])
    parser.add_argument("--only", nargs="+", choices=[*SETUPS], default=[*SETUPS], metavar="SETUP")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    args = parser.parse_args()
    rows = read(args.out)
    run = time.strftime("%Y-%m-%d %H:%M")
    for batch in args.batches if not args.show else ():
        for setup in args.only:
            for mode in args.modes:
                names = contestants(setup)
                suffix = COMPILED if mode == "compiled" else ""
                found = measure([name + suffix for name in names], setup, batch, Rounds.of(args), args.core, args.limit,
                                WORKER)
                new = rows_of(setup, batch, mode, names, found, run)
                rows = merged(rows, new)
                write(args.out, rows, COLUMNS)
                for row in new:
                    print(f"{setup} {mode} {row['contestant']}: {row.get('ms', row.get('error'))}", file=sys.stderr,
                          flush=True)
    print(table(read(args.out)))


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows in the order of setups, contestants and modes, the new ones in the place of the old."""
    kept = {tuple(str(row[key]) for key in ("setup", "batch", "contestant", "mode")): row for row in (*old, *new)}
    return sorted(kept.values(), key=lambda row: (
        [*SETUPS].index(row["setup"]), int(row["batch"]), [*STEPS].index(row["contestant"]), MODES.index(row["mode"])))


if __name__ == "__main__":
    main()
