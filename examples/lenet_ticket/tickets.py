"""Lottery tickets in LeNet-5: does a sparse network need its own first weights, or do any do?

    python examples/lenet_ticket/tickets.py     # --write puts figures and plot into this folder

`policy.fxc` trains, prunes and rewinds, nine rounds of two epochs. Beside each round's ticket a second network is
trained for as long, with the same masks and weights drawn anew.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx, nn
from torch.utils.data import TensorDataset

import fxcompress
from fxcompress.training.digits import digits
from fxcompress.training.run import Run

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "lenet_mnist"))
from figures import machine, put, table
from lenet import LeNet5

HERE = Path(__file__).parent
PLAIN = "policy plain {}"  # a training without compression
ROUND, EPOCHS = 2, 18  # of policy.fxc: a round, and all nine of them
Pair = tuple[TensorDataset, TensorDataset]


@dataclass(frozen=True)
class Ticket:
    """The network at the end of a round: its sparsity, its accuracy, and itself."""

    sparsity: float
    accuracy: float
    module: fx.GraphModule


@dataclass
class Rounds:
    """Looks at the network one step before each round ends: the last step prunes and rewinds already."""

    found: list[Ticket] = field(default_factory=list)

    def __call__(self, run: Run, moment: str) -> None:
        """Behind a step."""
        if moment == "step" and run.epoch % ROUND == ROUND - 1 and run.in_epoch == run.order.steps - 1:
            self.found.append(Ticket(sparsity(run.module), run.evaluate()["accuracy"], copy.deepcopy(run.module)))


def sparsity(module: nn.Module) -> float:
    """The share of all weights that are masked."""
    masks = [buffer for name, buffer in module.named_buffers() if name.endswith("_mask.mask")]
    return 1 - sum(int(mask.count_nonzero()) for mask in masks) / sum(mask.numel() for mask in masks)


def trainer(policy: str | Path, model: nn.Module, data: Pair, epochs: int, seed: int) -> fxcompress.Trainer:
    """The last weights, not the best: which are best would be read off the test."""
    return fxcompress.Trainer(policy, model, data, epochs=epochs, seed=seed, keep_best=False, device="cpu")


def fresh(seed: int) -> LeNet5:
    torch.manual_seed(seed)
    return LeNet5()


def tickets(data: Pair, seed: int) -> list[Ticket]:
    """The ticket of each round, the dense network first."""
    rounds = Rounds()
    trainer(HERE / "policy.fxc", fresh(seed), data, EPOCHS, seed).fit(told=rounds)
    return rounds.found


def reinitialised(ticket: Ticket, data: Pair, seed: int) -> float:
    """The accuracy of a network with the ticket's masks and other first weights, trained as long as a round."""
    module = copy.deepcopy(ticket.module)
    module.load_state_dict({**module.state_dict(), **fresh(seed + 1000).state_dict()})
    trained = trainer(PLAIN, module, data, ROUND, seed).fit()
    assert abs(sparsity(trained.result.module) - ticket.sparsity) < 1e-9
    return trained.final["accuracy"]


def draw(path: Path, left: list[float], lines: dict[str, list[list[float]]]) -> None:
    """Accuracy against the weights that are left: means, and the range over the seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(lines.items(), ("#1b6ca8", "#c8553d"), strict=True):
        axes.plot(left, [statistics.mean(each) for each in values], "o-", ms=4, lw=1.5, color=colour, label=name)
        axes.fill_between(left, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("weights left")
    axes.set_ylabel("accuracy on unseen digits")
    axes.grid(color="#e4e4e4", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4000, help="digits to train on")
    parser.add_argument("--out", type=Path, default=Path("out/lenet_ticket"), help="where the plot goes")
    parser.add_argument("--write", action="store_true", help="put figures and plot into the example's folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (images, labels), test = digits()
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:args.samples]
    data = TensorDataset(images[chosen], labels[chosen]), TensorDataset(*test)
    found, again = [], []
    for seed in range(1, args.seeds + 1):
        found.append(tickets(data, seed))
        again.append([reinitialised(ticket, data, seed) for ticket in found[-1]])
    left = [1 - ticket.sparsity for ticket in found[0]]
    lines = {"rewound": [[ticket.accuracy for ticket in each] for each in zip(*found, strict=True)],
             "weights drawn anew": [list(each) for each in zip(*again, strict=True)]}
    picture = (HERE if args.write else args.out) / "tickets.png"
    draw(picture, left, lines)
    rows = [(f"{100 * (1 - share):.1f} %", *(f"{100 * statistics.mean(line[place]):.1f} %" for line in lines.values()))
            for place, share in enumerate(left)]
    put(table(("sparsity", *lines), rows) + f"\n\nMeans over {args.seeds} seeds, {len(data[0]):,} digits to train on, "
        f"{len(data[1]):,} others to test on; {machine()}.", HERE / "README.md" if args.write else None)
    print(f"plot: {picture}")


if __name__ == "__main__":
    main()
