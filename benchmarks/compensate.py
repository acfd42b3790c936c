"""What bias compensation gains without any retraining: LeNet-5 on the digits of the demo.

    python benchmarks/compensate.py [--quick] [--seeds 5] [--out benchmarks/results/compensate.csv]
    python benchmarks/compensate.py --show        # the table of the CSV, without running anything

LeNet-5 is trained once a seed, each on a split of its own. From copies of it, channels are removed by `l2` and by
`activation`, without and with the means of what they gave folded into their readers' biases (`compensate`), and the
accuracy on 1,000 digits never trained on is taken at once, and the error of the logits: the root mean square of the
difference to the dense network's, relative to them. Means and activations are measured on 512 training images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

import fxcompress
from fxcompress.passes import Remove

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples/lenet_mnist"))
from digits import Split, accuracy, digits
from lenet import LeNet5
from tables import Row, markdown, read, write
from training import train

RESULTS = Path(__file__).parent / "results/compensate.csv"
COLUMNS = ("seed", "by", "ratio", "dense", "without", "with", "error_without", "error_with")
CRITERIA = ("l2", "activation")
RATIOS = (0.1, 0.3, 0.5, 0.7)
SAMPLES = 512


def run(seed: int, epochs: int) -> list[Row]:
    """One network, and what is left of its accuracy after each removal."""
    torch.manual_seed(seed)
    training, test = digits(seed)
    model = LeNet5()
    train(model, training, epochs, seed, 1e-3)
    captured = fxcompress.capture(model, (torch.zeros(2, 1, 28, 28),))
    chosen = torch.randperm(len(training.labels), generator=torch.Generator().manual_seed(seed))[:SAMPLES]
    rows: list[Row] = []
    for by in CRITERIA:
        for ratio in RATIOS:
            row: Row = {"seed": seed, "by": by, "ratio": ratio, "dense": accuracy(model, test)}
            for compensate, name in ((False, "without"), (True, "with")):
                left = Remove(ratio=ratio, by=by, compensate=compensate).apply(
                    captured, what="channels", calibration=training.images[chosen]).module.eval()
                row |= {name: accuracy(left, test), f"error_{name}": error(left, model, test)}
            rows.append(row)
    return rows


@torch.no_grad()
def error(left: nn.Module, dense: nn.Module, split: Split) -> float:
    """How far the logits are from the dense network's, relative to these."""
    wanted = dense(split.images)
    return float((left(split.images) - wanted).norm() / wanted.norm())


def spread(values: Iterable[float], form: str = "{:.1%}") -> str:
    """Mean and standard deviation."""
    found = list(values)
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{form.format(statistics.mean(found))} ± {100 * deviation:.1f}"


def table(rows: list[Row]) -> str:
    """The Markdown table: accuracies, mean ± standard deviation over the seeds."""
    lines = []
    for by, ratio in dict.fromkeys((row["by"], float(row["ratio"])) for row in rows):
        those = [row for row in rows if row["by"] == by and float(row["ratio"]) == ratio]
        without, with_, wrong, less = ([float(row[key]) for row in those] for key in COLUMNS[4:])
        gain = 100 * (statistics.mean(with_) - statistics.mean(without))
        lines.append((f"`{by}`", f"{ratio:.0%}", spread(without), spread(with_), f"{gain:+.1f} points",
                      f"{statistics.mean(wrong):.2f}", f"{statistics.mean(less):.2f}"))
    head = ("criterion", "channels removed", "accuracy", "compensated", "gain", "error of logits", "compensated")
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--show", action="store_true", help="only print the table of the CSV")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.show:
        print(table(read(args.out)))
        return
    rows: list[Row] = []
    for seed in range(1 if args.quick else args.seeds):
        rows += run(seed, 1 if args.quick else args.epochs)
        write(args.out, rows, COLUMNS)
    print(table(rows))


if __name__ == "__main__":
    main()
