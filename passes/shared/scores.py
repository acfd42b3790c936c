"""Scores of weights for `mask`: the larger, the longer a weight stays. Others add theirs with `register_score`.

A score gives the importance of each weight; what unit of weights is masked as one is `units.py`'s matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxcompress.nn.mask import Evidence
from fxcompress.passbase import SCORES

Element = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Score:
    """`element(weight, evidence)` gives the importance of each weight, of the weight's shape; `evidence` is what
    `fxcompress.nn.Mask` collected of the kind that `needs` names, else None. The importance of a unit of several
    weights is their sum, or their norm of the order `norm`."""

    element: Element
    needs: Evidence = "none"
    norm: Literal[1, 2] | None = None

    def elements(self, weight: Tensor, evidence: Tensor | None, generator: torch.Generator) -> Tensor:
        """The importance of each weight. `generator` (on the CPU) is for scores that draw."""
        return self.element(weight, evidence)

    def reduce(self, elements: Tensor, dims: Sequence[int]) -> Tensor:
        """The importance over `dims`, which are kept at size 1."""
        if self.norm is None:
            return elements.sum(tuple(dims), keepdim=True)
        norms: Tensor = torch.linalg.vector_norm(elements, ord=self.norm, dim=tuple(dims), keepdim=True)
        return norms

    def per_weight(self, score: Tensor, size: int) -> Tensor:
        """Scores of units of `size` weights made comparable with those of another size (means instead of sums)."""
        return score / (math.sqrt(size) if self.norm == 2 else size)


class RandomScore(Score):
    """A uniform draw, the same at every selection with the same seed: what a ramp masks stays masked. The draws are
    those of `torch.nn.utils.prune.random_unstructured` after `torch.manual_seed(seed)`, which masks the largest."""

    def elements(self, weight: Tensor, evidence: Tensor | None, generator: torch.Generator) -> Tensor:
        """Minus uniform numbers, drawn on the CPU so that every device masks the same."""
        drawn: Tensor = torch.rand(weight.shape, generator=generator, dtype=weight.dtype)
        return drawn.to(weight.device).neg()

    def per_weight(self, score: Tensor, size: int) -> Tensor:
        """Sums of `size` draws, brought to one mean and variance."""
        return (score + size / 2) / math.sqrt(size)


def _evidence(evidence: Tensor | None) -> Tensor:
    assert evidence is not None, "selections wait for the evidence that a score needs"
    return evidence


MAGNITUDE = Score(lambda weight, _: weight.abs(), norm=1)
L2 = Score(lambda weight, _: weight.abs(), norm=2)
RANDOM = RandomScore(lambda weight, _: weight)
# |weight · gradient|, the first-order change of the loss when the weight goes: Lee, Ajanthan and Torr, "SNIP", 2019,
# equation 4 (without its normalisation, which changes no order).
GRADIENT = Score(lambda weight, evidence: (weight * _evidence(evidence)).abs(), needs="gradient")
MOVEMENT = Score(lambda _, evidence: _evidence(evidence), needs="movement")


def register_score(name: str, needs: Evidence = "none") -> Callable[[Element], Element]:
    """Decorator: make a function a value of `by` for this process. Packages use the entry point `fxcompress.scores`.

    The function takes the weight and, if `needs` is `gradient` or `movement`, what was collected of it since the last
    selection (see `fxcompress.nn.Mask`), else None; it gives the importance of each weight, of the same shape.

        @register_score("squared")
        def squared(weight: Tensor, evidence: Tensor | None) -> Tensor:
            return weight.square()
    """

    def add(function: Element) -> Element:
        SCORES.register(name, Score(function, needs))
        return function

    return add


def score_of(name: str) -> Score:
    """The score a policy names; a bare function (of an entry point) sees weights alone. Raises KeyError."""
    found = SCORES[name]
    return found if isinstance(found, Score) else Score(found)
