"""The main job, end to end: train LeNet-5 on real digits, compress it by `policy.fxc` while it trains on, and compare.

    make demo                                    # or, in an environment with the examples extra:
    python examples/lenet_mnist/demo.py          # --epochs 2 for a quick look
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxcompress
from digits import BATCH, Split, accuracy, digits
from fxcompress.nn import Mask
from lenet import LeNet5

HERE = Path(__file__).parent
POLICY = Path(os.path.relpath(HERE / "policy.fxc"))
EXAMPLE = (torch.zeros(2, 1, 28, 28),)


@dataclass(frozen=True)
class Figures:
    """What the table shows of one network. Sizes in bytes, latency in seconds."""

    accuracy: float
    params: int
    nonzero: int
    macs: int
    file: int
    gzipped: int
    latency: float


def train(model: nn.Module, split: Split, epochs: int, *, seed: int, after_step: Callable[[], object] = lambda: None,
          after_epoch: Callable[[], object] = lambda: None) -> None:
    """A plain loop: Adam, cross entropy, a cosine learning rate. The two hooks are all that compression adds to it."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=1e-5)
    model.train()
    for _ in range(epochs):
        for images, labels in split.batches(generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            after_step()
        schedule.step()
        after_epoch()
    model.eval()


@torch.no_grad()
def latency(model: nn.Module, image: Tensor, runs: int = 2000) -> float:
    """The median time of one forward pass, in seconds, after a tenth as many to warm up."""
    times = []
    for _ in range(runs + runs // 10):
        start = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - start)
    return statistics.median(times[runs // 10:])


def measure(model: nn.Module, weights: bytes, test: Split) -> Figures:
    """`weights` is the network's safetensors file."""
    return Figures(
        accuracy=accuracy(model, test),
        params=sum(p.numel() for p in model.parameters()),
        nonzero=sum(int(p.count_nonzero()) for p in model.parameters()),
        macs=fxcompress.capture(model, EXAMPLE).facts.macs,
        file=len(weights),
        gzipped=len(gzip.compress(weights)),
        latency=latency(model, test.images[:1]),
    )


def table(before: Figures, after: Figures) -> Table:
    rows: list[tuple[str, Callable[[Figures], float], Callable[[float], str]]] = [
        ("accuracy on 1,000 unseen digits", lambda f: f.accuracy, "{:.1%}".format),
        ("parameters", lambda f: f.params, "{:,}".format),
        ("  of these not zero", lambda f: f.nonzero, "{:,}".format),
        ("MACs per image", lambda f: f.macs, "{:,}".format),
        ("weights file", lambda f: f.file, lambda n: f"{n / 1024:.1f} KiB"),
        ("  the same, gzipped", lambda f: f.gzipped, lambda n: f"{n / 1024:.1f} KiB"),
        ("latency (1 image, 1 thread, median)", lambda f: f.latency, lambda s: f"{s * 1e6:.0f} µs"),
    ]
    shown = Table(title="LeNet-5 before and after", title_justify="left")
    for name, justify in (("", "left"), ("dense", "right"), ("compressed", "right"), ("", "right")):
        shown.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, of, text in rows:
        old, new = of(before), of(after)
        change = f"{(new - old) * 100:+.1f} points" if name.startswith("accuracy") else f"x {new / old:.2f}"
        shown.add_row(name, text(old), text(new), change)
    return shown


def in_use(model: nn.Module) -> int:
    """Parameters that are there and not behind a mask."""
    masked = sum(module.masked() for module in model.modules() if isinstance(module, Mask))
    return sum(p.numel() for p in model.parameters()) - masked


def watched_training(model: nn.Module, training: Split, test: Split, epochs: int, *, seed: int,
                     result: fxcompress.Result | None = None) -> list[tuple[float, int]]:
    """Train, and say after each epoch the accuracy and how many parameters are in use."""
    history = []

    def after_epoch() -> None:
        if result is not None:
            result.epoch_end()
        history.append((accuracy(model, test), in_use(model)))

    train(model, training, epochs, seed=seed, after_step=result.step if result is not None else lambda: None,
          after_epoch=after_epoch)
    return history


def load_elsewhere(artifact: Path) -> float:
    """The accuracy that a second process measures."""
    command = [sys.executable, HERE / "evaluate.py", artifact]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="epochs to train, and again while compressing")
    parser.add_argument("--out", type=Path, default=Path("out/lenet_mnist"), help="where the artifact goes")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    began = time.perf_counter()
    console = Console(soft_wrap=True)
    training, test = digits()

    console.print(f"training LeNet-5 on {len(training.labels):,} digits for {args.epochs} epochs")
    model = LeNet5()
    dense = watched_training(model, training, test, args.epochs, seed=1)
    before = measure(model, safetensors.torch.save(model.state_dict()), test)
    control = watched_training(copy.deepcopy(model), training, test, args.epochs, seed=2)

    console.print(f"compressing it by policy.fxc over {args.epochs} epochs more\n")
    result = fxcompress.compile(POLICY, model, EXAMPLE, epochs=args.epochs,
                                steps_per_epoch=math.ceil(len(training.labels) / BATCH))
    compressed = watched_training(result.module, training, test, args.epochs, seed=2, result=result)
    deployed = result.finalize(target="cpu")
    fxcompress.save(deployed, args.out)
    after = measure(deployed, (args.out / "weights.safetensors").read_bytes(), test)

    console.print(table(before, after))
    console.print(
        f"Trained on for as long but not compressed, the dense network reaches {control[-1][0]:.1%}.\n"
        "Removed channels make the file and the work smaller. Masked weights are zeros: they stay in the file and\n"
        "in the multiplications, and show only where the file is compressed.\n")
    print(result.plan.show())
    console.print(f"\nartifact: {args.out}")
    loaded = load_elsewhere(args.out)
    console.print(f"loaded by a second process, it has an accuracy of {loaded:.1%}")
    if loaded != round(after.accuracy, 4):
        sys.exit(f"error: this process measured {after.accuracy:.4f}, the second one {loaded:.4f}")

    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} seconds in all")
    record = {"epochs": args.epochs, "seconds": seconds, "before": asdict(before), "after": asdict(after),
              "history": {"dense": dense, "control": control, "compressed": compressed}}
    args.out.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
