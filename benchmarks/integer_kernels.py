"""What one integer product costs by each library, in microseconds: what `fxcompress/nn/engines.py` chooses by.

    taskset -c 1 python benchmarks/integer_kernels.py

One thread; the least processor time of five repetitions. oneDNN on plain bytes and (for convolutions) on quantized
dtypes, FBGEMM behind its adapter, and the float layer of torch beside them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.nn import IntConv2d, IntLinear, engines, quantized_dtypes
from fxcompress.nn.integer import After, Grid

sys.path.insert(0, str(Path(__file__).parent))
from tables import markdown

READS, GIVES = Grid(0.05, 3, 0, 127), Grid(0.1, 3)
# batch, channels in, channels out, kernel, groups, height and width
CONVOLUTIONS = ((1, 24, 24, 1, 1, 28), (1, 24, 24, 3, 24, 28), (1, 96, 96, 1, 1, 7), (1, 96, 96, 3, 96, 7),
                (1, 96, 24, 1, 1, 56), (1, 144, 144, 3, 144, 56), (1, 64, 64, 3, 1, 56), (16, 24, 24, 1, 1, 28))
ROWS = ((1, 512, 1000), (1, 2048, 1000), (1, 25088, 4096), (16, 512, 1000), (16, 384, 384), (128, 384, 1536),
        (197, 768, 3072))  # rows, inputs, outputs


def microseconds(run: Callable[[], Tensor]) -> float:
    run()
    begun = time.process_time()
    run()
    times = max(1, min(200, int(0.05 / max(1e-6, time.process_time() - begun))))
    best = float("inf")
    for _ in range(5):
        begun = time.process_time()
        for _ in range(times):
            run()
        best = min(best, (time.process_time() - begun) / times)
    return 1e6 * best


def by(layer: IntConv2d | IntLinear, q: Tensor, few: float, plain: bool = False) -> float:
    """With the bounds of `engines` so high, or so low, that one library is chosen; oneDNN on `plain` bytes, or not."""
    was = engines.FEW_PRODUCTS, engines.FEW_DEPTHWISE, engines.FEW_ROWS
    available = quantized_dtypes.available
    if plain:
        quantized_dtypes.available = lambda engine: engine == "fbgemm"  # type: ignore[assignment]
    engines.FEW_PRODUCTS = engines.FEW_DEPTHWISE = few
    engines.FEW_ROWS = int(min(few, 1e9))
    try:
        layer.fill(layer.weight.data, layer.weight_scale, None if layer.bias is None else layer.bias.data)
        return microseconds(lambda: layer(q))
    finally:
        engines.FEW_PRODUCTS, engines.FEW_DEPTHWISE, engines.FEW_ROWS = was
        quantized_dtypes.available = available


def convolution(batch: int, inputs: int, outputs: int, kernel: int, groups: int, size: int) -> tuple[str, ...]:
    shape, pad = (outputs, inputs // groups, kernel, kernel), kernel // 2
    layer = IntConv2d(shape, True, READS, After(GIVES, activation="relu"), (1, 1), (pad, pad), (1, 1), groups)
    layer.fill(torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(outputs) * 0.01, torch.randn(outputs))
    q = torch.randint(0, 128, (batch, inputs, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last)
    x, weight = q.float(), torch.randn(shape).to(memory_format=torch.channels_last)
    products = batch * size * size * layer.weight.numel() / 1e6
    return (f"{batch} x {inputs} x {size} x {size} -> {outputs}, {kernel} x {kernel}" + ", depthwise" * (groups > 1),
            f"{products:.2f}", f"{by(layer, q, 0, plain=True):.0f}", f"{by(layer, q, 0):.0f}",
            f"{by(layer, q, 1e12):.0f}",
            f"{microseconds(lambda: F.conv2d(x, weight, layer.bias, 1, pad, 1, groups)):.0f}")


def linear(rows: int, inputs: int, outputs: int) -> tuple[str, ...]:
    layer = IntLinear((outputs, inputs), True, READS, After(GIVES))
    layer.fill(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs) * 0.01,
               torch.randn(outputs))
    q = torch.randint(0, 128, (rows, inputs), dtype=torch.uint8)
    x, weight = q.float(), torch.randn(outputs, inputs)
    return (f"{rows} x {inputs} -> {outputs}", f"{rows * inputs * outputs / 1e6:.2f}", f"{by(layer, q, 0):.0f}", "",
            f"{by(layer, q, 1e12):.0f}", f"{microseconds(lambda: F.linear(x, weight, layer.bias)):.0f}")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [convolution(*each) for each in CONVOLUTIONS] + [linear(*each) for each in ROWS]
    print(markdown(("", "M products", "oneDNN µs", "oneDNN quantized µs", "FBGEMM µs", "torch fp32 µs"), lines))


if __name__ == "__main__":
    main()
