"""Remove half of the channels of many models, prove each result, and write what came of it to a CSV.

    python benchmarks/remove_zoo.py --suite timm --out zoo.csv          # torchvision, segmentation, video, timm or all
    python benchmarks/remove_zoo.py --only 'vit*' --peer --out vit.csv  # beside Torch-Pruning, in turn
    python benchmarks/remove_zoo.py --resume --jobs 2 --core 0          # go on where a run was stopped
    python benchmarks/remove_zoo.py --show                              # the tables of the CSV, without running

Everything is selected, and nothing is told of the model. Weights are untrained (constant ones are drawn at random, so
that no branch is zero). Each model has its own process, one thread on one pinned core, and a time limit; with `--peer`
Torch-Pruning runs right after, in a process of its own. Prints a summary as Markdown tables.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).parent))
from tables import Row, read, write, yes
from zoo_models import SUITES, Entry, entries
from zoo_summary import seconds, summary

WORKER = Path(__file__).parent / "zoo_worker.py"
RESULTS = Path(__file__).parent / "results/remove_zoo.csv"
COLUMNS = (
    "suite", "model", "ok", "refused", "reason", "stage", "input", "way", "kind", "nodes", "params_before",
    "params_after", "macs_before", "macs_after", "share_thinner", "seconds_capture", "seconds_analyse",
    "seconds_rewrite", "seconds_prove", "error", "inexact", "barriers", "shortfalls", "backward", "seconds_total",
    "peak_mib")
PEER = ("peer_ok", "peer_reason", "peer_params_after", "peer_share_thinner", "peer_seconds", "time_ratio")


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


def wanted(args: argparse.Namespace) -> list[Entry]:
    """The models asked for."""
    patterns = args.only or ["*"]
    return [replace(entry, full=args.full) for entry in entries(args.suite) if entry.name not in args.skip
            and any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (entry.name, entry.key))]


def kept(args: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """The rows of the CSV that stand: with `--resume` all, with `--again` those that are ok."""
    rows = {(row["suite"], row["model"]): row for row in read(args.out)} if args.resume or args.again else {}
    return {key: row for key, row in rows.items() if not args.again or yes(row)}


def main() -> None:
    args = arguments()
    rows = {(row["suite"], row["model"]): row for row in read(args.out)} if args.show else kept(args)
    beside = args.peer or any(row.get("peer_ok") for row in rows.values())
    columns = (*COLUMNS, *PEER) if beside else COLUMNS
    todo = [] if args.show else [
        entry for entry in wanted(args) if (entry.suite, entry.name) not in rows
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
        for future in as_completed([pool.submit(work, entry) for entry in todo]):
            entry, row = future.result()
            rows[entry.suite, entry.name] = row
            write(args.out, in_order(rows), columns)
            _tell(entry, row)
    print(summary(in_order(rows)))


def in_order(rows: Mapping[tuple[str, str], Row]) -> list[Row]:
    """By suite, then by name, whichever was done first."""
    return [rows[key] for key in sorted(rows, key=lambda key: (SUITES.index(key[0]), key[1]))]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--only", action="append", help="a pattern of names; may be given several times")
    parser.add_argument("--skip", action="append", default=[], help="a name to leave out")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each on its own core")
    parser.add_argument("--core", type=int, default=1, help="the first core to use")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for each process")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in the CSV, failed ones too")
    parser.add_argument("--again", action="store_true", help="keep the rows that are ok, run the others again")
    parser.add_argument("--full", action="store_true", help="inputs of the size the models are meant for")
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning too")
    parser.add_argument("--show", action="store_true", help="print the tables of the CSV and stop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


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
