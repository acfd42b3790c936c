"""Criteria: how important each removable component is. `by = NAME` looks one up in `passbase.CRITERIA`.

A criterion takes a `Scoring` and gives one score a component, higher for what should stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.diagnostics import Diagnostic, PlanError


@dataclass(frozen=True)
class Part:
    """One dimension of a tensor of a layer. `rows` is (indices, rest): what belongs to each index; `components` is
    (indices): the number of its component in the scoring, -1 if it isn't a candidate. `grad` is shaped as `rows`, None
    without one."""

    layer: str
    rows: Tensor
    components: Tensor
    grad: Tensor | None = None


@dataclass(frozen=True)
class Scoring:
    """What a criterion sees: the weights that make the components' channels, and their batch norms' scales."""

    count: int
    weights: tuple[Part, ...]
    scales: tuple[Part, ...]
    generator: torch.Generator

    def reduce(self, parts: tuple[Part, ...], energy: Callable[[Part], Tensor],
               finish: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
        """For each part, `energy` (one number an index) summed over the indices of a component and passed to `finish`;
        then the mean over the parts that have the component. Components in no part score 0."""
        total, seen = torch.zeros(self.count), torch.zeros(self.count)
        for part in parts:
            inside = part.components >= 0
            where = part.components[inside]
            share = torch.zeros(self.count).index_add_(0, where, energy(part)[inside].detach().float().cpu())
            total += finish(share)
            seen += torch.bincount(where, minlength=self.count) > 0
        return total / seen.clamp(min=1)


def l1(scoring: Scoring) -> Tensor:
    """Sum of absolute weights of a filter (Li et al., "Pruning Filters for Efficient ConvNets", 2017)."""
    return scoring.reduce(scoring.weights, lambda part: part.rows.abs().sum(1))


def l2(scoring: Scoring) -> Tensor:
    """Euclidean norm of a filter."""
    return scoring.reduce(scoring.weights, lambda part: part.rows.square().sum(1), torch.sqrt)


def random(scoring: Scoring) -> Tensor:
    """A uniform random number from the pass's seed."""
    return torch.rand(scoring.count, generator=scoring.generator)


def bn_scale(scoring: Scoring) -> Tensor:
    """Absolute scale of the batch norm behind a channel (Liu et al., "Network Slimming", 2017). Raises PlanError
    (FXC0343) if a component has none."""
    covered = torch.zeros(scoring.count, dtype=torch.bool)
    for part in scoring.scales:
        covered[part.components[part.components >= 0]] = True
    if not covered.all():
        bare = sorted({part.layer for part in scoring.weights
                       if not covered[part.components[part.components >= 0]].all()})
        raise PlanError([Diagnostic(
            "FXC0343", "`by = bn_scale` needs a batch norm behind every layer that it ranks",
            notes=(f"without one: {', '.join(bare[:8])}{' ...' if len(bare) > 8 else ''}",),
            help="leave these layers out of the selection, or rank by `l2`")])
    return scoring.reduce(scoring.scales, lambda part: part.rows.abs().sum(1))
