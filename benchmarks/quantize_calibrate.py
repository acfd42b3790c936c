"""What calibrating costs: the time of `result.calibrate` over that of the float model on the same data.

    taskset -c 1 python benchmarks/quantize_calibrate.py [--only histogram ...] [--out CSV]
    python benchmarks/quantize_calibrate.py --show      # the table of the CSV, without running anything

resnet50 at 224 x 224, 8 batches of 8 images, one thread; processor time, both in turn, the median of paired ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxcompress

sys.path.insert(0, str(Path(__file__).parent))
from quantize_accuracy import each_way
from quantize_models import Job
from tables import Row, markdown

RESULTS = Path(__file__).parent / "results/quantize_calibrate.csv"
COLUMNS = ("way", "ratio", "low", "high", "forward_s", "calibrate_s")
OBSERVERS = ("minmax", "moving_average", "percentile(99.9%)", "histogram", "mse", "kl")
BATCHES, IMAGES, ROUNDS = 8, 8, 3


def seconds(run: Callable[[], Any]) -> float:
    """Processor time."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measure(observer: str) -> Row:
    """One observer of values."""
    job = Job("resnet50", IMAGES)
    net = job.net
    batches = [(torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(seed)),)
               for seed in range(BATCHES)]
    policy = f"policy p {{ quantize conv2d | linear {{ observer = {observer} }} }}"
    result = fxcompress.compile(policy, net, batches[0])

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                net(*batch)

    def calibrate() -> None:
        result.calibrate(batches)

    forward()
    calibrate()
    pairs = [(seconds(forward), seconds(calibrate)) for _ in range(ROUNDS)]
    low, middle, high = statistics.quantiles([mine / theirs for theirs, mine in pairs], n=4, method="inclusive")
    return {"way": observer, "ratio": middle, "low": low, "high": high,
            "forward_s": statistics.median(theirs for theirs, _ in pairs),
            "calibrate_s": statistics.median(mine for _, mine in pairs)}


def table(rows: list[Row]) -> str:
    """The Markdown table."""
    return markdown(("observer", "calibrating over forward", "quartiles", "forward, s", "calibrating, s"), [
        (f"`{row['way']}`", f"{float(row['ratio']):.2f}", f"{float(row['low']):.2f} to {float(row['high']):.2f}",
         f"{float(row['forward_s']):.2f}", f"{float(row['calibrate_s']):.2f}") for row in rows])


def main() -> None:
    each_way(__doc__.splitlines()[0], OBSERVERS, RESULTS, COLUMNS, lambda: measure, table)


if __name__ == "__main__":
    main()
