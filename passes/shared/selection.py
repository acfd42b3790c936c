"""Which weights a mask hides: scores and granularity applied to all targets of one action."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.nn.mask import Mask
from fxcompress.passes.shared.scores import Score
from fxcompress.passes.shared.units import Layout, Units


@dataclass(frozen=True)
class Target:
    """One masked parameter. Both are looked up each time: `remove` may have cut them since."""

    name: str  # "conv1.weight"
    path: str  # of its layer
    kind: str
    before: str  # how sparse it is: "0%", or "masked" by an earlier action
    parameter: Callable[[], Tensor]
    mask: Callable[[], Mask]
    layout: Callable[[], Layout]
    there: Callable[[], bool]  # whether its layer still is: `remove` may have taken it out
    follower: Callable[[], Mask] | None = None  # the mask of a bias whose entries go with the rows of this one


@dataclass(frozen=True)
class Ranking:
    """The part of a `mask` action that says which weights go first."""

    score: Score
    units: Units
    together: bool  # one ranking over all targets
    regrow: bool  # masked weights may come back at a later selection
    seed: int

    def select(self, targets: Sequence[Target], sparsity: float) -> bool:
        """Write masks of `sparsity` into every target that still is there. False, with nothing done, while evidence is
        missing."""
        targets = [target for target in targets if target.there()]
        if not targets:
            return True
        if self.score.needs != "none" and not all(_has_evidence(target.mask()) for target in targets):
            return sparsity <= 0 and not any(target.mask().masked() for target in targets)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            cubes = [self._elements(target, generator) for target in targets]
            drops = self._drops(targets, cubes, sparsity)
            for target, cube, drop in zip(targets, cubes, drops, strict=True):
                self._write(target, cube, drop)
        return True

    def _elements(self, target: Target, generator: torch.Generator) -> Tensor:
        """The importance of each weight, as a cube."""
        weight = target.parameter().detach()
        return target.layout().cube(self.score.elements(weight, target.mask().evidence, generator))

    def _scores(self, target: Target, cube: Tensor) -> Tensor:
        """The importance of each unit, flat; without regrowth, units that are masked come first."""
        scores = self.units.reduce(cube, self.score.reduce)
        if not self.regrow:
            scores = scores.masked_fill(self.units.hidden(target.layout().cube(target.mask().mask)), -torch.inf)
        return scores

    def _drops(self, targets: Sequence[Target], cubes: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        """For each target which of its units are masked: boolean, flat."""
        scores = [self._scores(target, cube) for target, cube in zip(targets, cubes, strict=True)]
        part = min(1.0, sparsity / self.units.share)
        if not self.together:
            return [self._lowest(score, round(part * score.numel())) for score in scores]
        sizes = [self.units.size(cube.shape) for cube in cubes]
        if len(set(sizes)) > 1:
            scores = [self.score.per_weight(score, size) for score, size in zip(scores, sizes, strict=True)]
        device = scores[0].device
        ranking = torch.cat([score.to(device) for score in scores])
        drop = self._lowest(ranking, _count(ranking, [score.numel() for score in scores], sizes, part))
        pieces = torch.split(drop, [score.numel() for score in scores])
        return [piece.to(score.device) for piece, score in zip(pieces, scores, strict=True)]

    def _lowest(self, scores: Tensor, count: int) -> Tensor:
        """The `count` lowest, boolean. Ties are broken as in `torch.nn.utils.prune`: it looks for the lowest weights,
        but for the highest rows and columns."""
        if self.units.inner:
            drop = torch.ones_like(scores, dtype=torch.bool)
            drop[scores.topk(scores.numel() - count, sorted=False).indices] = False
        else:
            drop = torch.zeros_like(scores, dtype=torch.bool)
            drop[scores.topk(count, largest=False, sorted=False).indices] = True
        return drop

    def _write(self, target: Target, cube: Tensor, drop: Tensor) -> None:
        layout, mask = target.layout(), target.mask()
        if not self.regrow:
            cube = cube.masked_fill(~layout.cube(mask.mask), -torch.inf)
        keep = self.units.keep(drop, cube)
        mask.put(layout.uncube(keep, mask.mask.shape))
        if target.follower is not None:
            target.follower().put(keep.flatten(1).any(1))


def _has_evidence(mask: Mask) -> bool:
    return mask.seen is not None and bool(mask.seen)


def _count(ranking: Tensor, units: Sequence[int], sizes: Sequence[int], part: float) -> int:
    """How many of the lowest units in `ranking` hold the share `part` of all weights, as nearly as whole units can."""
    if len(set(sizes)) == 1:
        return round(part * ranking.numel())
    weights = torch.tensor(sizes, dtype=torch.float64).repeat_interleave(torch.tensor(units))
    reached = torch.cat([torch.zeros(1, dtype=torch.float64), weights[ranking.argsort().cpu()].cumsum(0)])
    return int((reached - part * weights.sum()).abs().argmin())
