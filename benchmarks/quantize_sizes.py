"""Sizes on disk: what `fxcompress.save` writes of quantized models, over what it writes of the same in floats.

    python benchmarks/quantize_sizes.py [--quick] [--out benchmarks/results/quantize_sizes.csv]
    python benchmarks/quantize_sizes.py --show        # the table of the CSV, without running anything

Weights are random: they take the same room as trained ones. `linear` is a perceptron of linear layers alone; MiniLM
stands for a BERT of its sizes, half of whose parameters are embeddings, which only `weight_only` takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import fxcompress

sys.path.insert(0, str(Path(__file__).parent))
from tables import Row, markdown, read, write

RESULTS = Path(__file__).parent / "results/quantize_sizes.csv"
COLUMNS = ("model", "how", "bytes", "share")


class Bert(nn.Module):
    """Six layers, 384 wide, 30,522 words: the sizes of all-MiniLM-L6-v2. int64[n, t] -> float32[n, t, 384]."""

    def __init__(self, layers: int = 6, width: int = 384, words: int = 30522, places: int = 512) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(places, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(16, device=words.device))
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """Attention of twelve heads and a perceptron, each with a shortcut and a norm behind it."""

    def __init__(self, width: int, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


def perceptron() -> nn.Module:
    """Linear layers alone."""
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 1024))


@dataclass(frozen=True)
class Subject:
    """A model, an input, and the policies to write it by."""

    build: Callable[[], nn.Module]
    example: Tensor
    ways: tuple[str, ...]


IMAGE = torch.zeros(1, 3, 224, 224)
WORDS = torch.zeros(1, 16, dtype=torch.int64)
SUBJECTS = {
    "resnet18": Subject(torchvision.models.resnet18, IMAGE, ("conv2d | linear as int8",
                                                             "conv2d | linear as int4_weights")),
    "vit_b_16": Subject(torchvision.models.vit_b_16, IMAGE, ("linear | multihead_attention as int8_dynamic",
                                                             "conv2d | linear | multihead_attention as int4_weights")),
    "MiniLM": Subject(Bert, WORDS, ("linear as int8_dynamic", "linear | embedding as int8_weights",
                                    "linear | embedding as int4_weights")),
    "linear": Subject(perceptron, torch.zeros(1, 1024), ("linear as int8", "linear as int4_weights")),
}


def written(module: nn.Module) -> int:
    """The bytes of its artifact, all files of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        fxcompress.save(module, path)
        return sum(file.stat().st_size for file in path.rglob("*")
                   if file.is_file() and not file.is_symlink())


def rows_of(name: str) -> Iterator[Row]:
    """The model in floats, then by each policy."""
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    model = subject.build().eval()
    dense = written(fxcompress.capture(model, subject.example).module)
    yield {"model": name, "how": "fp32", "bytes": dense, "share": 1.0}
    for way in subject.ways:
        example = subject.example
        data = [torch.randn(example.shape) if example.is_floating_point() else example]
        result = fxcompress.compile(f'use "std/quant.fxc"\npolicy p {{ quantize {way} }}', model, example,
                                    calibration=data)
        size = written(result.finalize(target="cpu"))
        yield {"model": name, "how": way, "bytes": size, "share": round(size / dense, 4)}


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [[row["model"], row["how"] if row["how"] == "fp32" else f"`{row['how']}`".replace("|", "\\|"),
              f"{int(row['bytes']) / 1e6:.1f} MB", f"{float(row['share']):.3f}"] for row in rows]
    return markdown(["model", "what is quantized", "on disk", "of fp32"], lines, words=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the linear layers alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="the table of the CSV")
    options = parser.parse_args()
    if options.show:
        print(table(read(options.out)))
        return
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in ["linear"] if options.quick else SUBJECTS:
        for row in rows_of(name):
            rows.append(row)
            print(*row.values(), flush=True)
    if not options.quick:
        write(options.out, rows, COLUMNS)
    print(table(rows))


if __name__ == "__main__":
    main()
