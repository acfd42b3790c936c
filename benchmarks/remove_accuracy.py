"""Accuracy after removal at the same MACs, beside Torch-Pruning: same networks, criterion, fine-tuning and seeds.

    python benchmarks/remove_accuracy.py [--quick] [--seeds 5] [--out benchmarks/results/remove_accuracy.csv]
    python benchmarks/remove_accuracy.py --row "l2, coupled"   # one criterion alone; the other rows of the CSV stay
    python benchmarks/remove_accuracy.py --show        # the table of the CSV, without running anything

LeNet-5 and a residual network are trained on the digits of the demo, once a seed; each seed has a split of its own.
Both contestants then remove channels from a copy, at the ratio of each that comes nearest to the MACs asked for and to
the other's, and are fine-tuned on the same batches. MACs are counted on our graph for both. What uses calibration data
(512 training images, without labels) has no counterpart in Torch-Pruning. Accuracies are those on 1,000 digits that
were never trained on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import Remove

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples/lenet_mnist"))
from digits import Split, accuracy, digits
from lenet import LeNet5
from tables import Row, markdown, read, write
from training import train

Prune = Callable[[float], nn.Module]  # ratio -> what is left
EXAMPLE = torch.zeros(2, 1, 28, 28)
RESULTS = Path(__file__).parent / "results/remove_accuracy.csv"
COLUMNS = ("model", "by", "scope", "target", "seed", "who", "ratio", "macs", "params", "dense", "pruned", "tuned")
OURS, PEER = "fxcompress", "Torch-Pruning"


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False),
                                  nn.BatchNorm2d(outside)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class ResNet14(nn.Module):
    """Three stages of two blocks, 16, 32 and 64 channels wide: He et al., "Deep Residual Learning for Image
    Recognition", 2016, section 4.2, with n = 2, and a first layer of stride 2. 174,970 parameters.
    `float32[n, 1, 28, 28]` -> logits `float32[n, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1),
                                    Block(32, 64, 2), Block(64, 64, 1))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


@dataclass(frozen=True)
class Setting:
    """How removal is asked for; with calibration data its mean is folded into the biases too. `coupled`: `slices` of
    ours. Torch-Pruning scores all that leaves together as it is: its plain rows are what these compare with."""

    by: str
    scope: str = "local"
    data: bool = False
    coupled: bool = False

    @property
    def name(self) -> str:
        """What the CSV calls it."""
        return f"{self.by}, data" if self.data else self.by + COUPLED * self.coupled


@dataclass(frozen=True)
class Subject:
    """A network, the epochs of its training and of its fine-tuning."""

    build: Callable[[], nn.Module]
    epochs: int
    tune: int


SUBJECTS = {"LeNet-5": Subject(LeNet5, 10, 4), "ResNet-14": Subject(ResNet14, 6, 3)}
SETTINGS = (Setting("l2"), Setting("l2", coupled=True), Setting("l2", "global"), Setting("taylor"),
            Setting("l2", data=True), Setting("activation", data=True))
TARGETS = (0.5, 0.25)
COUPLED = ", coupled"
SEEN = 512  # training images that gradients and moments are taken over


def macs(model: nn.Module) -> int:
    """Multiplications with addition of one image, counted on our graph."""
    return fxcompress.capture(model, EXAMPLE).facts.macs


def some(split: Split) -> tuple[Tensor, Tensor]:
    """A few images of every digit, and their labels."""
    step = len(split.labels) // SEEN
    return split.images[::step][:SEEN], split.labels[::step][:SEEN]


def differentiate(model: nn.Module, split: Split) -> None:
    """Gradients of the loss, for the criteria that need them."""
    images, labels = some(split)
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def ours(model: nn.Module, setting: Setting, split: Split) -> Prune:
    """Removal with fxcompress; the gradients are computed on the captured module."""
    captured = fxcompress.capture(model, EXAMPLE)
    if setting.by == "taylor":
        differentiate(captured.module, split)
    data = some(split)[0].split(64) if setting.data else None

    def prune(ratio: float) -> nn.Module:
        removal = Remove(ratio=ratio, by=setting.by, scope=setting.scope, verify="off",
                         slices="coupled" if setting.coupled else "made")
        return removal.apply(captured, what="channels", calibration=data).module

    return prune


def peers(model: nn.Module, setting: Setting, split: Split) -> Prune:
    """Pruning with Torch-Pruning, as its examples do it, the classifier kept."""
    import torch_pruning as tp

    def prune(ratio: float) -> nn.Module:
        thin = copy.deepcopy(model)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        if setting.by == "taylor":
            importance = tp.importance.GroupTaylorImportance()
            differentiate(thin, split)
        last = [module for module in thin.modules() if isinstance(module, nn.Linear)][-1]
        tp.pruner.BasePruner(thin, EXAMPLE, importance=importance, pruning_ratio=ratio, ignored_layers=[last],
                             global_pruning=setting.scope == "global").step()
        return thin

    return prune


CONTESTANTS = {OURS: ours, PEER: peers}


@dataclass(frozen=True)
class Point:
    """What a ratio comes to."""

    ratio: float
    macs: int
    model: nn.Module


def points(prune: Prune, target: float, full: int) -> list[Point]:
    """Every ratio in steps of 0.5 % from below the expected one (MACs fall about as the square of what stays), until a
    tenth less than `target` MACs are left. Not by bisection: at large ratios MACs may rise again, where a ranking over
    all layers takes one of them whole and a pruner then leaves that as it was."""
    found: list[Point] = []
    ratio = max(0.02, round(1 - (target / full) ** 0.5 - 0.12, 2))
    while ratio < 0.98 and not (found and found[-1].macs < 0.9 * target):
        found.append(Point(ratio, macs(model := prune(ratio)), model))
        ratio = round(ratio + 0.005, 3)
    return found


def matched(found: dict[str, list[Point]], target: float) -> dict[str, Point]:
    """A point of each contestant, near to the target and, within 1 % of the MACs if that can be, to each other."""
    first, *others = found.values()
    if not others:
        return {name: min(rows, key=lambda point: abs(point.macs - target)) for name, rows in found.items()}

    def badness(pair: tuple[Point, Point]) -> float:
        one, other = pair
        off = max(abs(one.macs - target), abs(other.macs - target)) / target
        return off + 10 * max(0.0, abs(one.macs - other.macs) / max(one.macs, other.macs) - 0.01)

    best = min(((one, other) for one in first for other in others[0]), key=badness)
    return dict(zip(found, best, strict=True))


def chosen(contestants: dict[str, Prune], target: float, full: int, known: dict[str, float]) -> dict[str, Point]:
    """A point of each contestant at `target` of `full` MACs; `known` keeps their ratios for the next time."""
    if known:
        return {who: Point(known[who], macs(model := prune(known[who])), model) for who, prune in contestants.items()}
    found = matched({who: points(prune, target, full) for who, prune in contestants.items()}, target)
    known.update({who: point.ratio for who, point in found.items()})
    return found


def rows_of(name: str, seed: int, known: dict[tuple[str, float], dict[str, float]], quick: bool,
            settings: tuple[Setting, ...] = SETTINGS) -> Iterator[Row]:
    """Train once, then every setting, target and contestant. How many channels a local ranking takes depends neither on
    the weights nor on the criterion, so its ratios are searched once."""
    torch.manual_seed(seed)
    train_split, test = digits(seed)
    subject = SUBJECTS[name]
    model = subject.build()
    train(model, train_split, 2 if quick else subject.epochs, seed, 2e-3)
    dense, full = accuracy(model, test), macs(model)
    for setting in settings:
        alone = setting.data or setting.coupled
        makers = {who: make for who, make in CONTESTANTS.items() if who == OURS or not alone}
        for share in TARGETS:
            contestants = {who: make(model, setting, train_split) for who, make in makers.items()}
            ratios = known.setdefault((name, share), {}) if setting.scope == "local" else {}
            for who, point in chosen(contestants, share * full, full, ratios).items():
                pruned = accuracy(point.model.eval(), test)
                train(point.model, train_split, 1 if quick else subject.tune, 100 + seed, 1e-3)
                yield {"model": name, "by": setting.name, "scope": setting.scope, "target": share, "seed": seed,
                       "who": who, "ratio": round(point.ratio, 4), "macs": round(point.macs / full, 4),
                       "params": sum(p.numel() for p in point.model.parameters()), "dense": round(dense, 4),
                       "pruned": round(pruned, 4), "tuned": round(accuracy(point.model, test), 4)}


def mean_and_spread(values: list[float]) -> str:
    """In per cent; the spread is the standard deviation over the seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def table(rows: list[Row]) -> str:
    """Markdown: a line for each network, criterion and target. The last column is ours minus theirs, seed by seed."""
    head = ["network", "criterion", "MACs left", "before tuning: ours", "Torch-Pruning", "tuned: ours", "Torch-Pruning",
            "difference"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["by"], row["scope"], row["target"]), []).append(row)
    lines = []
    for key, mine in groups.items():
        theirs = groups.get((key[0], key[1].removesuffix(COUPLED), *key[2:]), [])
        by = {who: {row["seed"]: row for row in found if row["who"] == who} for who, found in (
            (OURS, mine), (PEER, theirs))}
        left = statistics.mean(float(row["macs"]) for row in mine)
        cells = [mean_and_spread([float(row[what]) for row in by[who].values()]) if by[who] else "-"
                 for what in ("pruned", "tuned") for who in (OURS, PEER)]
        gains = [float(by[OURS][seed]["tuned"]) - float(by[PEER][seed]["tuned"]) for seed in by[PEER]]
        by_name, _, data = key[1].partition(", ")
        extra = "".join(f", {word}" for word in (key[2] if key[2] != "local" else "", data) if word)
        difference = f"{100 * statistics.mean(gains):+.1f} ± {100 * _error(gains):.1f}" if gains else "-"
        lines.append([key[0], f"`{by_name}`{extra}", f"{left:.0%}", *cells, difference])
    return markdown(head, lines, words=2) + "\n\n" + _note(rows)


def _error(gains: list[float]) -> float:
    return statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0


def _note(rows: list[Row]) -> str:
    dense = []
    for name in dict.fromkeys(row["model"] for row in rows):
        values = [float(row["dense"]) for row in _once(rows, name)]
        dense.append(f"{name} {mean_and_spread(values)} % ({len(values)} seeds)")
    pairs: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        pairs.setdefault(tuple(row[key] for key in COLUMNS[:5]), []).append(float(row["macs"]))
    apart = max((abs(pair[0] - pair[1]) / max(pair) for pair in pairs.values() if len(pair) == 2), default=0.0)
    return (f"Accuracy in %, mean ± standard deviation over the seeds; the difference is the mean of the seeds' "
            f"differences ± its standard error. Dense: {', '.join(dense)}. The MACs of a pair are at most {apart:.1%} "
            f"apart.")


def _once(rows: list[Row], name: str) -> list[Row]:
    return list({row["seed"]: row for row in rows if row["model"] == name}.values())


def ordered(rows: list[Row]) -> list[Row]:
    """As a run over everything writes them."""
    settings, models = [(setting.name, setting.scope) for setting in SETTINGS], list(SUBJECTS)
    return sorted(rows, key=lambda row: (models.index(row["model"]), int(row["seed"]),
                                         settings.index((row["by"], row["scope"]))))


def ratios_of(rows: list[Row]) -> dict[tuple[str, float], dict[str, float]]:
    """The ratios that an earlier run found, of local rankings: they hold for any criterion."""
    known: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        if row["scope"] == "local":
            known.setdefault((row["model"], float(row["target"])), {})[row["who"]] = float(row["ratio"])
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=SUBJECTS, help="one network alone; the rows of the other stay")
    parser.add_argument("--row", choices=sorted({setting.name for setting in SETTINGS}),
                        help="one criterion alone; the rows of the others stay")
    parser.add_argument("--quick", action="store_true", help="2 epochs of training, 1 of fine-tuning")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the CSV and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [] if args.show else [args.only] if args.only else list(SUBJECTS)
    rows: list[Row] = read(args.out)
    known = ratios_of(rows) if args.row else {}
    rows = [row for row in rows if row["model"] not in names or args.row not in (None, row["by"])]
    settings = tuple(setting for setting in SETTINGS if args.row in (None, setting.name))
    for name in names:
        for seed in range(args.seeds):
            for row in rows_of(name, seed, known, args.quick, settings):
                rows.append(row)
                print(*row.values(), file=sys.stderr, flush=True)
            write(args.out, ordered(rows), COLUMNS)
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
