"""The sum of it: one policy that removes channels of resnet50 and quantizes it, beside int8 of the dense model.

    python benchmarks/quantize_and_remove.py [--batches 1 16] [--rounds 20]
    python benchmarks/quantize_and_remove.py --show    # the table of the CSV, without running anything

The policy is REMOVE_AND_QUANTIZE of quantize_worker.py. Everything runs in turn, in one run, as in quantize_speed.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from quantize_process import Rounds, measure, options
from quantize_speed import BASE, COLUMNS, by_pair, rows_of, tell
from tables import Row, markdown, number, read, write

MODEL = "resnet50"
RESULTS = Path(__file__).parent / "results/quantize_and_remove.csv"
# Contestant -> what it is called in the table; the base first.
NAMES = {
    BASE: "fp32 eager", "ours_int8": "fxcompress, int8", "ours_removed": "fxcompress, channels removed",
    "ours_removed_int8": "fxcompress, channels removed, int8",
    "ours_removed_auto": "fxcompress, channels removed, `auto`", "ort_int8": "ONNX Runtime, int8",
    "ov_int8": "OpenVINO, int8",
}
DENSE_PEERS = ("ort_int8", "ov_int8")
SUMS = {"ours_removed_int8": "int8", "ours_removed_auto": "`auto`"}


def table(rows: list[Row]) -> str:
    """Markdown: a line for each batch and contestant, then the one sentence that they are measured for."""
    lines, verdicts = [], []
    for (_, batch), mine in by_pair(rows).items():
        for name, title in NAMES.items():
            row = mine[name]
            if row["error"]:
                lines.append([title, str(batch), "failed", str(row["error"])[:80].replace("|", "/")])
            else:
                spread = f" ({float(row['low']):.2f} to {float(row['high']):.2f})" if name != BASE else ""
                lines.append([title, str(batch), f"{float(row['ms']):.3g}", f"{float(row['speed']):.2f}{spread}"])
        speeds = {name: number(mine[name], "speed") for name in (*SUMS, *DENSE_PEERS)}
        peer = max(speeds[name] or 0.0 for name in DENSE_PEERS)
        verdicts += [f"{ours / peer:.2f} by {title} at batch {batch}" for name, title in SUMS.items()
                     if peer and (ours := speeds[name]) is not None]
    said = (f" Ours with channels removed over the best peer's int8 of the dense model: x {', x '.join(verdicts)}."
            if verdicts else "")
    return markdown(["resnet50", "batch", "ms", "speed over fp32 eager"], lines) + (
        "\n\nMedians of paired ratios in one run, in brackets their quartiles; one pinned core, one thread, 224 x 224. "
        f"Untrained weights: what is measured is time.{said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options(parser, RESULTS)
    args = parser.parse_args()
    rows: list[Row] = []
    for batch in () if args.show else args.batches:
        begin = time.monotonic()
        found = measure(list(NAMES), MODEL, batch, Rounds.of(args), args.core, args.limit)
        new = rows_of(MODEL, batch, NAMES, found, time.strftime("%Y-%m-%d %H:%M"))
        rows += new
        write(args.out, rows, COLUMNS)
        tell(new, time.monotonic() - begin)
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
