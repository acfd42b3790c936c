"""torchvision's vgg11 teaches shufflenet_v2_x0_5 five classes of digits, in five ways; a table says what each is worth.

    python examples/vgg11_to_shufflenet/compare.py      # --write puts the table into README.md

Images, the teacher's weights and each row of the table are kept in the output folder: a run that was stopped goes on.
Seconds a step are processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxcompress
from fxcompress.spec_training import load_training
from fxcompress.training.run import Run
from models import CLASSES, EXAMPLE, TEST, TRAIN, make_images, student, teacher

sys.path.insert(0, str(Path(__file__).parent.parent))
from figures import machine, put, table

HERE = Path(__file__).parent
PLAIN = "policy plain {}"  # a training without compression
POLICIES = {"soft": "soft targets", "features": "feature pairs", "activation_kl": "activation KL",
            "adaptive": "adaptive temperature", "falling": "temperature 10 -> 1, by 0.07 per step"}
BATCH = 16


@dataclass(frozen=True)
class Row:
    """One training: what it was of, the accuracy at its end, and the median processor time of a step in seconds."""

    name: str
    seed: int
    epochs: int
    steps: int
    accuracy: float
    seconds: float


@dataclass
class Watch:
    """Processor time between two steps of an epoch."""

    times: list[float] = field(default_factory=list)
    last: float = 0.0

    def __call__(self, run: Run, moment: str) -> None:
        """Behind a step."""
        if moment == "step":
            now = time.process_time()
            if run.in_epoch > 1:
                self.times.append(now - self.last)
            self.last = now


def train(name: str, policy: str | Path, model: nn.Module, data: Any, epochs: int, seed: int,
          optimizer: str, from_: nn.Module | None = None) -> tuple[Row, nn.Module]:
    """The last weights, not the best: which are best would be read off the test."""
    watch = Watch()
    trained = fxcompress.Trainer(policy, model, data, EXAMPLE, teacher=from_, epochs=epochs, batch=BATCH, seed=seed,
                                 optimizer=optimizer, scheduler="CosineAnnealingLR", keep_best=False,
                                 device="cpu").fit(told=watch)
    row = Row(name, seed, epochs, trained.result.clock.steps, trained.final["accuracy"],
              statistics.median(watch.times))
    print(f"{name}, seed {seed}: accuracy {row.accuracy:.1%}, {row.seconds * 1000:.0f} ms a step", flush=True)
    return row, trained.result.module


def trained_teacher(folder: Path, data: Any, epochs: int) -> tuple[nn.Module, Row]:
    """The teacher, trained, or as `folder` has it from an earlier run."""
    torch.manual_seed(0)
    model, weights, record = teacher(), folder / "teacher.safetensors", folder / "teacher.json"
    if not record.exists():
        row, module = train("teacher", PLAIN, model, data, epochs, 0, "AdamW(lr=0.0003)")
        save_file(module.state_dict(), weights)
        record.write_text(json.dumps(asdict(row)) + "\n", encoding="utf-8")
    model.load_state_dict(load_file(weights))
    return model.eval(), Row(**json.loads(record.read_text(encoding="utf-8")))


def all_rows(folder: Path, data: Any, master: nn.Module, epochs: int, seeds: Iterable[int]) -> list[Row]:
    """A row for each policy and seed, those that `folder` has from earlier runs included."""
    rows = []
    for seed in seeds:
        for name in ("alone", *POLICIES):
            record = folder / "rows" / f"{name}-{seed}-{epochs}.json"
            if not record.exists():
                torch.manual_seed(seed)
                taught = name != "alone"
                row = train(name, HERE / f"{name}.fxc" if taught else PLAIN, student(), data, epochs, seed,
                            "AdamW(lr=0.003)", master if taught else None)[0]
                record.parent.mkdir(exist_ok=True)
                record.write_text(json.dumps(asdict(row)) + "\n", encoding="utf-8")
            rows.append(Row(**json.loads(record.read_text(encoding="utf-8"))))
    return rows


def shown(label: str, rows: list[Row], parameters: int) -> tuple[str, ...]:
    found = [100 * row.accuracy for row in rows]
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return (label, f"{parameters / 1e6:.2f} M", f"{statistics.mean(found):.1f}{spread} %",
            f"{statistics.mean(row.seconds for row in rows):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="of each student")
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=TRAIN, help="training images a class")
    parser.add_argument("--tests", type=int, default=TEST, help="test images a class")
    parser.add_argument("--out", type=Path, default=Path("out/vgg11_to_shufflenet"))
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_images(args.out / "digits", args.images, args.tests)
    data = load_training(f"imagefolder:{args.out / 'digits'}", EXAMPLE)
    master, of_teacher = trained_teacher(args.out, data, args.teacher_epochs)
    rows = all_rows(args.out, data, master, args.epochs, range(1, args.seeds + 1))
    small, large = (sum(each.numel() for each in model.parameters()) for model in (student(), master))
    lines = [shown(label, [row for row in rows if row.name == name], small)
             for name, label in {"alone": "student alone", **POLICIES}.items()]
    put(table(("", "parameters", "accuracy", "seconds a step"),
              (*lines, shown("teacher", [of_teacher], large))) + "\n\n"
        f"{args.images * len(CLASSES)} images to train on, {args.tests * len(CLASSES)} to test on; students over "
        f"{args.seeds} seeds (mean ± standard deviation), {rows[0].steps} steps of {BATCH} images each, the teacher "
        f"{of_teacher.steps} steps; a step is the median, in processor time; {machine()}.",
        HERE / "README.md" if args.write else None)


if __name__ == "__main__":
    main()
