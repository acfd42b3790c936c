"""Accuracy in integers: LeNet-5 and a residual network on digits, quantized after training and while training.

    python benchmarks/quantize_digits.py [--quick] [--seeds 5] [--out benchmarks/results/quantize_digits.csv]
    python benchmarks/quantize_digits.py --show        # the table of the CSV, without running anything

The networks and the digits are those of `remove_accuracy.py`; each seed has a split of its own. The network in floats
is trained once a seed. `static` is calibrated on 256 training images; `qat` trains on from the same floats for a few
epochs more, and `fp32, tuned` does the same without rounding, so that what the epochs bring isn't counted for it. All
but fp32 are what `finalize(target="cpu")` gives: 8 bits in integer kernels (values in 7 where products of bytes
saturate), 4 bits for weights and values. Accuracies are those on 1,000 digits that were never trained on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxcompress

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples/lenet_mnist"))
from digits import Split, accuracy, digits
from remove_accuracy import EXAMPLE, SUBJECTS
from tables import Row, markdown, read, write
from training import train

RESULTS = Path(__file__).parent / "results/quantize_digits.csv"
COLUMNS = ("model", "seed", "how", "accuracy")
SEEN = 256  # training images that ranges are found on
RATE = 5e-4  # of the epochs after the first training
PHASE = "policy p {{ phase tune over epochs 0..{epochs} {{ quantize conv2d | linear {{ mode = qat{more} }} }} }}"
FOUR = ", bits = 4 bits, weight_bits = 4 bits"
TRAINED = {"qat int8": "", "qat int4": FOUR}  # what is said besides the mode
ONE = f"{FOUR}, granularity = per_tensor"  # scale for each weight
STATIC = {"static int8": "", "static int4": FOUR, "static int4, one scale a weight": ONE,
          "static int4, one scale, equalize": f"{ONE}, equalize = true",
          "static int4, one scale, gptq, correct_bias": f"{ONE}, gptq = true, correct_bias = true"}


def some(split: Split) -> list[Any]:
    """A few images of every digit, in batches."""
    step = len(split.labels) // SEEN
    return list(split.images[::step][:SEEN].split(64))


def static(model: nn.Module, split: Split, more: str) -> nn.Module:
    """Calibrated, not trained."""
    text = f"policy p {{ quantize conv2d | linear {{ mode = static{more} }} }}"
    return fxcompress.compile(text, model, EXAMPLE, calibration=some(split)).finalize(target="cpu")


def trained(model: nn.Module, split: Split, more: str, epochs: int, seed: int) -> nn.Module:
    """Trained on with rounding: Adam, a cosine learning rate, the batches of `train` for the same seed."""
    result = fxcompress.compile(PHASE.format(epochs=epochs, more=more), model, EXAMPLE, calibration=some(split),
                                steps_per_epoch=-(-len(split.labels) // 64))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(result.module.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=RATE / 100)
    result.module.train()
    for _ in range(epochs):
        for images, labels in split.batches(generator):
            optimizer.zero_grad()
            F.cross_entropy(result.module(images), labels).backward()
            optimizer.step()
            result.step()
        schedule.step()
        result.epoch_end()
    return result.finalize(target="cpu")


def rows_of(name: str, seed: int, quick: bool) -> Iterator[Row]:
    """Train once in floats, then every way to integers."""
    torch.manual_seed(seed)
    split, test = digits(seed)
    subject = SUBJECTS[name]
    model, tune = subject.build(), 2 if quick else 2 * subject.tune
    train(model, split, 2 if quick else subject.epochs, seed, 2e-3)
    longer = copy.deepcopy(model)
    train(longer, split, tune, 100 + seed, RATE)
    makers: dict[str, Callable[[], nn.Module]] = {"fp32": lambda: model, "fp32, tuned": lambda: longer}
    makers |= {how: lambda more=more: static(model, split, more) for how, more in STATIC.items()}
    makers |= {how: lambda more=more: trained(model, split, more, tune, 100 + seed) for how, more in TRAINED.items()}
    for how, make in makers.items():
        yield {"model": name, "seed": seed, "how": how, "accuracy": round(accuracy(make(), test), 4)}


def table(rows: list[Row]) -> str:
    """Markdown: a line for each network and way, with the mean of the seeds' differences from fp32 of the same seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["model"], row["how"]), {})[int(row["seed"])] = 100 * float(row["accuracy"])
    lines = []
    for (model, how), values in found.items():
        dense = found[model, "fp32"]
        gains = [values[seed] - dense[seed] for seed in values]
        lines.append([model, how, f"{statistics.mean(values.values()):.2f} %",
                      "" if how == "fp32" else f"{statistics.mean(gains):+.2f}",
                      "" if how == "fp32" else f"{min(gains):+.1f}"])
    seeds = len({row["seed"] for row in rows})
    head = ["network", "", f"accuracy, mean of {seeds} seeds", "points from fp32", "worst seed"]
    return markdown(head, lines, words=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a few epochs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=sorted(SUBJECTS), help="one network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="the table of the CSV")
    options = parser.parse_args()
    if options.show:
        print(table(read(options.out)))
        return
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in [options.only] if options.only else SUBJECTS:
        for seed in range(1 if options.quick else options.seeds):
            for row in rows_of(name, seed, options.quick):
                rows.append(row)
                print(*row.values(), flush=True)
            if not options.quick:
                write(options.out, rows, COLUMNS)
    print(table(rows))


if __name__ == "__main__":
    main()
