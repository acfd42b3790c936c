"""An LSTM of 8 hidden units learns from one of 16, by `policy.fxc`.

    python examples/lstm/distil.py              # --write puts the figures into README.md

The task: six steps on a plane. Did the walk end to the right of where it began, and did it go further up in its first
half than in its second? Two answers make four classes. The student has few walks, and a fifth of its labels are
drawn by chance.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fxcompress

sys.path.insert(0, str(Path(__file__).parent.parent))
from figures import machine, put, table

HERE = Path(__file__).parent
CLASSES, LENGTH = 4, 6
PLAIN = "policy plain {}"  # a training without compression
T = 2.0  # as in policy.fxc


class Reader(nn.Module):
    """`float32[n, 6, 2]` -> logits `float32[n, 4]`, from the last state of an LSTM."""

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = nn.LSTM(2, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def walks(count: int, seed: int, wrong: float = 0.0) -> TensorDataset:
    """So many walks, `float32[n, 6, 2]`, and their classes, of which the share `wrong` is drawn by chance."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, LENGTH, 2, generator=generator)
    right = steps[:, :, 0].sum(1) > 0
    early = steps[:, :LENGTH // 2, 1].sum(1) > steps[:, LENGTH // 2:, 1].sum(1)
    labels = 2 * right.long() + early.long()
    drawn = torch.randint(0, CLASSES, (count,), generator=generator)
    return TensorDataset(steps, torch.where(torch.rand(count, generator=generator) < wrong, drawn, labels))


def train(policy: str | Path, model: nn.Module, train_set: TensorDataset, test: TensorDataset, epochs: int, seed: int,
          teacher: nn.Module | None = None) -> fxcompress.Trained:
    """The last weights, not the best: which are best would be read off the test."""
    return fxcompress.Trainer(policy, model, (train_set, test), teacher=teacher, epochs=epochs, batch=32, seed=seed,
                              optimizer="AdamW(lr=0.01)", scheduler="CosineAnnealingLR", keep_best=False,
                              device="cpu").fit()


@torch.no_grad()
def done_right(student: nn.Module, teacher: nn.Module, test: TensorDataset) -> str:
    """Readings of the same soft term, of the student and of one that is the teacher itself. `torch.nn.KLDivLoss` wants
    log-probabilities, then probabilities; it says nothing when it is given others, and its default mean divides by the
    classes too."""
    steps, labels = test.tensors

    def readings(model: nn.Module) -> list[float]:
        joined = fxcompress.compile(HERE / "policy.fxc", model, (steps,), teacher=teacher, epochs=1)
        ours, theirs = model(steps) / T, teacher(steps) / T
        return [float(joined.module(steps, targets=labels, losses=True).terms["soft"]),
                float(F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction="batchmean") * T**2),
                float(nn.KLDivLoss(reduction="batchmean")(ours.softmax(1), theirs.softmax(1)) * T**2)]

    names = ("`loss = kl`, as it is in the graph", "log-probabilities against probabilities, written out",
             "probabilities against probabilities, the slip")
    found = zip(names, readings(student), readings(copy.deepcopy(teacher)), strict=True)
    return table(("the soft term", "of the student", "of the teacher itself"),
                 [(name, *(f"{round(value, 4) + 0:.4f}" for value in values)) for name, *values in found])  # + 0: no -0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the figures into README.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = walks(2000, seed=2)
    teacher = Reader(16, seed=0)
    learned = train(PLAIN, teacher, walks(4000, seed=1), test, max(1, args.epochs // 2), seed=0)
    alone, taught = [], []
    for seed in range(1, args.seeds + 1):
        few = walks(512, seed=100 + seed, wrong=0.2)
        alone.append(train(PLAIN, Reader(8, seed), few, test, args.epochs, seed).final["accuracy"])
        student = train(HERE / "policy.fxc", Reader(8, seed), few, test, args.epochs, seed, learned.result.module)
        taught.append(student.final["accuracy"])

    def row(name: str, hidden: int, found: list[float]) -> tuple[str, ...]:
        spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
        parameters = sum(each.numel() for each in Reader(hidden, 0).parameters())
        return name, str(hidden), f"{parameters:,}", f"{100 * statistics.mean(found):.1f}{spread} %"

    put("\n".join((
        table(("", "hidden", "parameters", "accuracy"), (
            row("student alone", 8, alone), row("student, taught", 8, taught),
            row("teacher", 16, [learned.final["accuracy"]]))),
        "", done_right(student.result.module, learned.result.module, test),
        "", f"Over {args.seeds} seeds (mean ± standard deviation), {args.epochs} epochs; {machine()}.")),
        HERE / "README.md" if args.write else None)


if __name__ == "__main__":
    main()
