"""How long removal takes beside Torch-Pruning: the same models, inputs of their own size, in turn, in one run.

    python benchmarks/remove_speed.py [--repeat 5] [--out benchmarks/results/remove_speed.csv]
    python benchmarks/remove_speed.py --show           # the table of the CSV, without running anything

Every measurement is a fresh process of one thread on one pinned core, the contestants alternating. Seconds are
processor time of the second time in the process, so that imports and what is made on first use aren't counted. Ours are
capture, analysis and rewriting, without the proof; theirs are building the dependency graph and pruning, with the
settings that its examples recommend.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from remove_zoo import run
from tables import Row, markdown, read, write
from zoo_models import Entry

MODELS = ("resnet50", "densenet201", "convnext_tiny", "vit_b_16", "mobilenet_v2")
RESULTS = Path(__file__).parent / "results/remove_speed.csv"
OURS = ("seconds_capture", "seconds_analyse", "seconds_rewrite")
PEERS = ("seconds_trace", "seconds_prune")
COLUMNS = ("model", "repeat", *OURS, "ours", *PEERS, "peer", "ratio")


def measure(name: str, repeat: int, core: int, limit: float) -> Row:
    """One process of each. Raises SystemExit where one fails."""
    entry = Entry("torchvision", name, full=True)
    row: Row = {"model": name, "repeat": repeat}
    for who, parts, options in (("ours", OURS, ()), ("peer", PEERS, ("--peer",))):
        found = run(entry, core, limit, "--brief", *options)
        if not found["ok"]:
            raise SystemExit(f"{name} ({who}): {found.get('reason')}")
        row.update({part: found[part] for part in parts}, **{who: sum(found[part] for part in parts)})
    return {**row, "ratio": row["ours"] / row["peer"]}


def table(rows: list[Row]) -> str:
    """Markdown: a line for each model, medians over the repeats; the ratio is the median of the pairs' ratios."""
    head = ["model", "capture s", "analyse s", "rewrite s", "fxcompress s", "Torch-Pruning s", "ratio", "its range"]
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        middle = {key: statistics.median(float(row[key]) for row in mine) for key in (*OURS, "ours", "peer", "ratio")}
        ratios = [float(row["ratio"]) for row in mine]
        lines.append([name, *(f"{middle[key]:.2f}" for key in (*OURS, "ours", "peer")), f"{middle['ratio']:.2f}",
                      f"{min(ratios):.2f}, {max(ratios):.2f}"])
    repeats = len({row["repeat"] for row in rows})
    return markdown(head, lines) + (
        f"\n\nProcessor seconds of the second run in a process, one thread; medians of {repeats} pairs of fresh "
        "processes, in turn. Nothing was told to fxcompress; Torch-Pruning was told the classifier and head counts.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="models of torchvision, in place of the five")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--core", type=int, default=1, help="the core to run on")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for each process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the CSV and stop")
    args = parser.parse_args()
    rows: list[Row] = read(args.out) if args.show else []
    for repeat in range(0 if args.show else args.repeat):
        for name in args.only or MODELS:
            rows.append(row := measure(name, repeat, args.core, args.limit))
            write(args.out, rows, COLUMNS)
            print(f"{name:16} {row['ours']:.2f} s, Torch-Pruning {row['peer']:.2f} s, ratio {row['ratio']:.2f}",
                  file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
