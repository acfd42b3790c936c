"""Remove half of the channels of many models, prove each result, and write what came of it to a CSV.

    python benchmarks/remove_zoo.py --suite timm --out zoo.csv          # torchvision, segmentation, video, timm or all
    python benchmarks/remove_zoo.py --only 'vit*' --peer                # beside Torch-Pruning, in turn

Everything is selected, and nothing is told of the model. Weights are untrained (constant ones are drawn at random, so
that no branch is zero). Each model has its own process, one thread on one pinned core, and a time limit; with `--peer`
Torch-Pruning runs right after, in a process of its own. Prints a summary as Markdown tables.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from zoo_models import SUITES, Entry, entries

WORKER = Path(__file__).parent / "zoo_worker.py"
COLUMNS = (
    "suite", "model", "ok", "reason", "stage", "input", "way", "nodes", "params_before", "params_after", "macs_before",
    "macs_after", "share_thinner", "seconds_capture", "seconds_analyse", "seconds_rewrite", "seconds_prove",
    "error", "inexact", "barriers", "shortfalls", "backward", "seconds_total", "peak_mib")
PEER = ("peer_ok", "peer_reason", "peer_params_after", "peer_share_thinner", "peer_seconds", "time_ratio")
Row = dict[str, Any]


def run(entry: Entry, core: int, limit: float, *options: str) -> Row:
    """What the worker says of one model; a death or a timeout is a result too."""
    command = [sys.executable, str(WORKER), entry.suite, entry.name, str(core), *options, *["--full"] * entry.full]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    except subprocess.TimeoutExpired:
        return {"ok": False, "reason": f"took more than {limit:g} s", "seconds_total": limit}
    lines = done.stdout.splitlines()
    row: Row = json.loads(lines[-1]) if done.returncode == 0 and lines else {
        "ok": False, "reason": f"the process ended with {done.returncode}: {done.stderr[-500:].strip()}"}
    return {**row, "seconds_total": time.perf_counter() - start}


def row_of(entry: Entry, core: int, limit: float, beside: bool) -> Row:
    """One row of the CSV."""
    row = {"suite": entry.suite, "model": entry.name, **run(entry, core, limit)}
    if beside:
        other = run(entry, core, limit, "--peer")
        row.update({f"peer_{key}": other.get(key) for key in ("ok", "reason", "params_after", "share_thinner")})
        if other["ok"]:
            row["peer_seconds"] = other["seconds_trace"] + other["seconds_prune"]
        if other["ok"] and row["ok"]:
            row["time_ratio"] = seconds(row) / row["peer_seconds"]
    return row


def seconds(row: Mapping[str, Any]) -> float:
    """Capture, analysis and rewriting, without the proof."""
    return sum(float(row[f"seconds_{part}"]) for part in ("capture", "analyse", "rewrite"))


def read(path: Path) -> list[Row]:
    """The rows of a CSV written before; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    """Write all rows; lists become text, numbers are rounded."""
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    scratch.replace(path)


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " | ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else value


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A cell as a number, None where it is empty."""
    value = row.get(key)
    return None if value in (None, "") else float(value)


def yes(row: Mapping[str, Any], key: str = "ok") -> bool:
    """A cell as a truth value."""
    return str(row.get(key)) == "True"


def median(values: Iterable[float | None]) -> str:
    """The median of those that are there."""
    present = [value for value in values if value is not None]
    return f"{statistics.median(present):.2f}" if present else "-"


def summary(rows: list[Row], beside: bool) -> str:
    """One line a suite, then each model that failed."""
    head = ["suite", "models", "valid and trainable", "all inexact", "MACs left", "parameters left", "layers thinner",
            "worst error", "capture s", "analyse s", "rewrite s", "prove s"]
    head += ["Torch-Pruning valid", "its s", "our time / its"] if beside else []
    lines = [head, ["---"] * len(head)]
    for suite in SUITES:
        here = [row for row in rows if row["suite"] == suite]
        if not here:
            continue
        good = [row for row in here if yes(row)]
        errors = [error for row in good if (error := number(row, "error")) is not None]
        counts = [len(here), len(good), len(good) - len(errors)]
        line = [suite, *map(str, counts), _left(good, "macs"), _left(good, "params"),
                median(number(row, "share_thinner") for row in good), f"{max(errors, default=0.0):.1g}",
                *(median(number(row, f"seconds_{part}") for row in good)
                  for part in ("capture", "analyse", "rewrite", "prove"))]
        if beside:
            line += [str(sum(yes(row, "peer_ok") for row in here)), median(number(row, "peer_seconds") for row in here),
                     median(number(row, "time_ratio") for row in here)]
        lines.append(line)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    failed = [f"- `{row['suite']}/{row['model']}` ({row.get('stage')}): {str(row.get('reason')).splitlines()[0][:200]}"
              for row in rows if not yes(row)]
    note = ("Each result was proven equal to the model with the channels zeroed, save those where all that left is "
            "inexact. Medians over the models that passed; seconds of processor time, one thread.")
    return "\n".join([table, "", note, "", *failed])


def _left(rows: list[Row], what: str) -> str:
    return median(float(row[f"{what}_after"]) / float(row[f"{what}_before"]) for row in rows)


def wanted(args: argparse.Namespace) -> list[Entry]:
    """The models asked for."""
    patterns = args.only or ["*"]
    return [replace(entry, full=args.full) for entry in entries(args.suite) if entry.name not in args.skip
            and any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (entry.name, entry.key))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--only", action="append", help="a pattern of names; may be given several times")
    parser.add_argument("--skip", action="append", default=[], help="a name to leave out")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each on its own core")
    parser.add_argument("--core", type=int, default=1, help="the first core to use")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for each model")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in the CSV that are ok or refused")
    parser.add_argument("--again", action="store_true", help="with --resume: run those that failed again")
    parser.add_argument("--full", action="store_true", help="inputs of the size the models are meant for")
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning too")
    parser.add_argument("--out", type=Path, default=Path("zoo.csv"))
    args = parser.parse_args()
    old = {(row["suite"], row["model"]): row for row in read(args.out)} if args.resume else {}
    rows = {key: row for key, row in old.items() if not args.again or yes(row)}
    columns = (*COLUMNS, *PEER) if args.peer or any(row.get("peer_ok") for row in rows.values()) else COLUMNS
    todo = [entry for entry in wanted(args) if (entry.suite, entry.name) not in rows
            or (args.peer and not rows[entry.suite, entry.name].get("peer_ok"))]
    cores: SimpleQueue[int] = SimpleQueue()
    for place in range(args.jobs):
        cores.put(args.core + place)

    def work(entry: Entry) -> tuple[Entry, Row]:
        core = cores.get()
        try:
            return entry, row_of(entry, core, args.limit, args.peer)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(args.jobs) as pool:
        for entry, row in pool.map(work, todo):
            rows[entry.suite, entry.name] = row
            write(args.out, rows.values(), columns)
            _tell(entry, row)
    print(summary(list(rows.values()), args.peer))


def _tell(entry: Entry, row: Row) -> None:
    """A line of progress."""
    if row["ok"]:
        macs = row["macs_after"] / row["macs_before"]
        text = f"ok    macs {macs:.2f} thin {row['share_thinner']:.2f} {seconds(row):.2f} s, proven {row['error']}"
    else:
        text = f"FAIL  {row.get('stage')}: {row.get('reason')}\n{row.get('traceback', '')}".rstrip()
    beside = f", peer {row['peer_ok']} {row.get('peer_seconds') or row['peer_reason']}" if "peer_ok" in row else ""
    print(f"{entry.key:34} {text}{beside}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
