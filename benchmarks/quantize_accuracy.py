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
from collections.abc import Mapping
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
_WON = "equalize = true, adaround = true, correct_bias = true"
# Name -> the settings of `quantize conv2d | linear`.
WAYS: Mapping[str, str] = {
    "weights alone, 8 bits": "mode = weight_only",
    "static: values in 7 bits where the CPU has no VNNI": "",
    "weights in 7 bits, values in 8": "bits = 8 bits, weight_bits = 7 bits",
    "weights in 7 bits, gptq, correct_bias": "bits = 8 bits, weight_bits = 7 bits, gptq = true, correct_bias = true",
    "the same, mixed = 10%": "bits = 8 bits, weight_bits = 7 bits, gptq = true, correct_bias = true, mixed = 10%",
    "static, correct_bias": "correct_bias = true",
    "static, equalize, correct_bias": "equalize = true, correct_bias = true",
    "static, equalize, adaround, correct_bias": _WON,
    "static, mixed = 10%": "mixed = 10%",
    "static, correct_bias, mixed = 10%": "correct_bias = true, mixed = 10%",
    "static, equalize, correct_bias, mixed = 10%": "equalize = true, correct_bias = true, mixed = 10%",
    "static, equalize, adaround, correct_bias, mixed = 10%": f"{_WON}, mixed = 10%",
}


def measure(way: str, model: nn.Module, calibration: Tensor, test: Tensor, expected: Tensor) -> Row:
    """One way to quantize all convolutions and linear layers."""
    begun = time.process_time()
    policy = f"policy small {{ quantize conv2d | linear {{ {WAYS[way]} }} }}"
    result = fxcompress.compile(policy, model, test[:1], calibration=list(calibration.split(BATCH)))
    seconds = time.process_time() - begun
    found = logits(result.finalize(target="cpu"), test)
    agreement = float((found.argmax(1) == expected.argmax(1)).double().mean())
    noise = float((found - expected).double().square().sum() / expected.double().square().sum())
    return {"way": way, "settings": WAYS[way], "agreement": agreement, "sqnr": -10 * math.log10(noise),
            "seconds": seconds}


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """[N, 1000]."""
    return torch.cat([model(part) for part in images.split(BATCH)])


def table(rows: list[Row]) -> str:
    """The Markdown table."""
    return markdown(("", "same class as fp32", "SQNR of the logits, dB", "processor seconds to quantize"), [
        (str(row["way"]), f"{float(row['agreement']):.1%}", f"{float(row['sqnr']):.1f}", f"{float(row['seconds']):.0f}")
        for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the CSV")
    args = parser.parse_args()
    if not args.show:
        torch.set_num_threads(1)
        (calibration, test), model = crops(), efficientnet_lite0()
        expected = logits(model, test)
        done = {row["way"]: row for row in read(args.out)} if args.out.exists() else {}
        for way in args.only:
            done[way] = measure(way, model, calibration, test, expected)
            write(args.out, [done[name] for name in WAYS if name in done], COLUMNS)
            print(table([done[way]]).splitlines()[-1], flush=True)
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
