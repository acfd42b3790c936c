"""Measured latency after removing half of the channels, against the MACs that are left.

    python benchmarks/remove_latency.py [--rounds 30] [--batch 1] [--align 1 16] [--layout channels_last]
    python benchmarks/remove_latency.py --show         # the table of the CSV, without running anything

Each model has its own process, one thread on one pinned core, inputs of 224 x 224. Each round times the dense model as
torchvision made it and, right after, each thinner one; shown are the medians over the rounds of (thinner / dense).
Half of the channels of these models are multiples of 32 already, so that `align` changes little here. Time is processor
time of that thread, which is the latency on a core that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from tables import Row, markdown, read, write

MODELS = ("resnet50", "vgg16", "vit_b_16")
RATIO = 0.5
RESULTS = Path(__file__).parent / "results/remove_latency.csv"
COLUMNS = ("model", "batch", "align", "layout", "rounds", "macs_left", "params_left", "dense_ms", "thin_ms",
           "latency_left", "low", "high")
WARM = 3


def measure(name: str, batch: int, aligns: list[int], rounds: int, layout: str) -> list[Row]:
    """Build, remove, and time in turn. `low` and `high` are the quartiles of the ratio of latencies."""
    import torch

    import fxcompress
    from fxcompress.passes import Remove
    from zoo_models import Entry

    entry = Entry("torchvision", name, full=True)
    dense = entry.build()
    captured = fxcompress.capture(dense, entry.inputs(dense))
    thin = {align: Remove(ratio=RATIO, align=align, verify="off").apply(captured, what="channels") for align in aligns}
    contestants = {0: dense, **{align: one.module for align, one in thin.items()}}
    x = torch.randn(batch, *entry.size(dense), generator=torch.Generator().manual_seed(2))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
        for model in contestants.values():
            model.to(memory_format=torch.channels_last)
    times = in_turn({align: model.eval() for align, model in contestants.items()}, x, rounds)
    rows = []
    for align, one in thin.items():
        ratios = [ours / theirs for ours, theirs in zip(times[align], times[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({"model": name, "batch": batch, "align": align, "layout": layout, "rounds": rounds,
                     "macs_left": one.facts.macs / captured.facts.macs,
                     "params_left": one.facts.params / captured.facts.params,
                     "dense_ms": 1000 * statistics.median(times[0]), "thin_ms": 1000 * statistics.median(times[align]),
                     "latency_left": middle, "low": low, "high": high})
    return rows


def in_turn(models: dict[int, Any], x: Any, rounds: int) -> dict[int, list[float]]:
    """Processor seconds of each model's forward pass in each round."""
    import torch

    times: dict[int, list[float]] = {key: [] for key in models}
    with torch.inference_mode():
        for number in range(WARM + rounds):
            for key, model in models.items():
                start = time.process_time()
                model(x)
                if number >= WARM:
                    times[key].append(time.process_time() - start)
    return times


def apart(name: str, core: int, *settings: Any) -> list[Row]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([name, *settings]), "--core", str(core)]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line for each model, batch and alignment."""
    head = ["model", "batch", "`align`", "MACs left", "latency left", "latency / MACs", "dense ms", "thinner ms"]
    lines = []
    for row in rows:
        macs, latency = float(row["macs_left"]), float(row["latency_left"])
        spread = f"{latency:.1%} ({float(row['low']):.0%} to {float(row['high']):.0%})"
        align = f"{row['align']}, {row['layout']}" if row["layout"] != "contiguous" else str(row["align"])
        lines.append([row["model"], str(row["batch"]), align, f"{macs:.1%}", spread, f"{latency / macs:.2f}",
                      f"{float(row['dense_ms']):.0f}", f"{float(row['thin_ms']):.0f}"])
    return markdown(head, lines) + ("\n\nMedians of paired ratios in one run, in brackets their quartiles; float32, "
                                    "processor time of one thread on one pinned core, 224 x 224.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, action="append", help="these models alone")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--align", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layout", choices=["contiguous", "channels_last"], nargs="+", default=["contiguous"])
    parser.add_argument("--core", type=int, default=1, help="the core to run on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the CSV and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {args.core % (os.cpu_count() or 1)})
        torch.set_num_threads(1)
        print(json.dumps(measure(*json.loads(args.one))))
        return
    rows = read(args.out) if args.show else [
        row for name in args.only or MODELS for batch in args.batch for layout in args.layout
        for row in apart(name, args.core, batch, args.align, args.rounds, layout)]
    if not args.show:
        write(args.out, rows, COLUMNS)
    print(table(rows))


if __name__ == "__main__":
    main()
