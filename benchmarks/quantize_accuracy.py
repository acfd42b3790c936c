"""How often the quantized EfficientNet-Lite0 names the class that fp32 names, key by key.

    python benchmarks/quantize_accuracy.py [--only NAME ...] [--out benchmarks/results/quantize_accuracy.csv]
    python benchmarks/quantize_accuracy.py --show      # the table of the CSV, without running anything

The weights and the crops are those of `photographs.py`: 63 crops to calibrate on, 105 to test on. What is measured is
the finalized model: integer kernels on this CPU. One crop is about 1 point; the standard error is about 3.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fxcompress

sys.path.insert(0, str(Path(__file__).parent))
from photographs import crops, efficientnet_lite0
from tables import Row, markdown, read, write

RESULTS = Path(__file__).parent / "results/quantize_accuracy.csv"
COLUMNS = ("way", "settings", "agreement", "sqnr", "seconds")
BATCH = 21
# Values in 8 bits times weights in 8 saturate on CPUs without VNNI, but for weights that fit: the default there. The
# bits of values and weights come first in a way's name.
BITS: Mapping[str, str] = {
    "8 and 8": "bits = 8 bits, fit_pairs = false", "8 and 8 that fit": "bits = 8 bits, fit_pairs = true",
    "7 and 8": "bits = 7 bits", "8 and 7": "bits = 8 bits, weight_bits = 7 bits"}
KEYS = ("", "correct_bias", "gptq", "gptq, correct_bias", "gptq, correct_bias, mixed", "adaround, correct_bias",
        "adaround, correct_bias, mixed", "equalize, gptq, correct_bias", "mixed")


def _settings(bits: str, keys: str) -> str:
    """The settings of `quantize` that a way's name stands for."""
    values = [f"{key} = {'10%' if key == 'mixed' else 'true'}" for key in keys.split(", ") if key]
    return ", ".join([BITS[bits], *values])


# Name -> the settings of `quantize conv2d | linear`: bits of values and of weights, and what wins accuracy back.
WAYS: Mapping[str, str] = {
    "weights alone, 8": "mode = weight_only",
    **{", ".join(filter(None, (bits, keys))): _settings(bits, keys) for bits in BITS for keys in KEYS},
}


def measure(way: str, model: nn.Module, calibration: Tensor, test: Tensor, expected: Tensor) -> Row:
    """One way to quantize all convolutions and linear layers."""
    begun = time.process_time()
    policy = f"policy small {{ quantize conv2d | linear {{ {WAYS[way]} }} }}"
    result = fxcompress.compile(policy, model, test[:1], calibration=list(calibration.split(BATCH)))
    seconds = time.process_time() - begun
    found = outputs(result.finalize(target="cpu"), test)
    agreement = float((found.argmax(1) == expected.argmax(1)).double().mean())
    return {"way": way, "settings": WAYS[way], "agreement": agreement, "sqnr": sqnr(found, expected),
            "seconds": seconds}


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """What `model` gives for all images, [N, ...]."""
    return torch.cat([model(part) for part in images.split(BATCH)])


def sqnr(found: Tensor, expected: Tensor) -> float:
    """How much larger than their error the outputs are, in dB."""
    noise = float((found - expected).double().square().sum() / expected.double().square().sum())
    return -10 * math.log10(noise)


def table(rows: list[Row]) -> str:
    """The Markdown table."""
    head = "bits of values and weights", "same class as fp32", "SQNR of the logits, dB", "processor seconds to quantize"
    return markdown(head, [
        (str(row["way"]), f"{float(row['agreement']):.1%}", f"{float(row['sqnr']):.1f}", f"{float(row['seconds']):.0f}")
        for row in rows])


def prepared() -> Callable[[str], Row]:
    """What measures one way."""
    (calibration, test), model = crops(), efficientnet_lite0()
    expected = outputs(model, test)
    return lambda way: measure(way, model, calibration, test, expected)


def asked(description: str, names: Collection[str], results: Path) -> argparse.Namespace:
    """What the command line asks for: which of `names`, into which CSV, or only to show that."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="*", choices=sorted(names), default=list(names))
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--show", action="store_true", help="print the table of the CSV")
    return parser.parse_args()


def each_way(description: str, ways: Collection[str], results: Path, columns: Sequence[str],
             prepared: Callable[[], Callable[[str], Row]], table: Callable[[list[Row]], str]) -> None:
    """The command: measures the ways that it is asked for, and keeps the rows of the others."""
    args = asked(description, ways, results)
    if not args.show:
        torch.set_num_threads(1)
        measured = prepared()
        done = {row["way"]: row for row in read(args.out)} if args.out.exists() else {}
        for way in args.only:
            done[way] = measured(way)
            write(args.out, [done[name] for name in ways if name in done], columns)
            print(table([done[way]]).splitlines()[-1], flush=True)
    print(table(read(args.out)))


def main() -> None:
    each_way(__doc__.splitlines()[0], WAYS, RESULTS, COLUMNS, prepared, table)


if __name__ == "__main__":
    main()
