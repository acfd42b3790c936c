"""Regularised training before a removal: penalties on everything that leaves together.

Both act on the weights after each step of the optimizer, so a training loop needs no term in its loss, and mixed
precision and accumulated gradients don't matter. η is the learning rate that the optimizer which follows has for a
parameter (1 where none follows): a penalty of strength λ is worth a term with factor λ in the loss of plain gradient
descent. Frozen parameters, and those that no optimizer trains where one follows, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress.graph.coupling import Mask
from fxcompress.graph.coupling_flow import Labels

Rate = Callable[[Tensor], float]


@dataclass(frozen=True)
class Weights:
    """A parameter, and the component that each index of its dimensions belongs to; -1 for none."""

    parameter: Tensor
    ids: Mapping[int, Labels]

    def along(self, chosen: Mask) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each dimension with indices in `chosen` components: it, which indices these are, and their components."""
        for dim, ids in self.ids.items():
            inside = (ids >= 0) & chosen[ids]
            if inside.any():
                device = self.parameter.device
                yield dim, torch.from_numpy(inside).to(device), torch.from_numpy(ids[inside]).to(device)

    def energies(self, dim: int) -> Tensor:
        """The sum of squares at each index of `dim`, in float64."""
        others = [place for place in range(self.parameter.dim()) if place != dim]
        squares = self.parameter.detach().double().square()
        return squares.sum(others) if others else squares

    def scale(self, dim: int, inside: Tensor, factor: Tensor) -> None:
        """Multiply the slices at the indices `inside` of `dim`, in place."""
        whole = torch.ones(len(inside), dtype=self.parameter.dtype, device=self.parameter.device)
        whole[inside] = factor.to(whole)
        shape = [1] * self.parameter.dim()
        shape[dim] = -1
        with torch.no_grad():
            self.parameter.mul_(whole.view(shape))


class Regulariser(Protocol):
    """A penalty. `chooses`: on the components that will leave, which are chosen at first; else on all that can."""

    chooses: ClassVar[bool]

    def act(self, weights: Sequence[Weights], chosen: Mask, times: int, rate: Rate) -> None:
        """Act once, on the slices of the components `chosen`; `times` of `every` have passed since the phase began."""

    def norms(self, weights: Sequence[Weights], count: int) -> npt.NDArray[np.float64]:
        """The norm of everything that leaves with each of `count` components."""


@dataclass(frozen=True)
class _Penalty:
    strength: float
    chooses: ClassVar[bool] = False

    def norms(self, weights: Sequence[Weights], count: int) -> npt.NDArray[np.float64]:
        """The norm of everything that leaves with each of `count` components."""
        return _Groups.of(weights, np.ones(count, dtype=np.bool_), lambda _: 1.0).square.sqrt().cpu().numpy()


@dataclass(frozen=True)
class _Groups:
    """One number a component: the sum of the squares of its weights, how many they are, the largest of their η."""

    square: Tensor
    size: Tensor
    rate: Tensor

    @classmethod
    def of(cls, weights: Sequence[Weights], chosen: Mask, rate: Rate) -> _Groups:
        """Of the components `chosen` of `weights`, on the device of the first."""
        device = weights[0].parameter.device if weights else torch.device("cpu")
        found = cls(*torch.zeros((3, len(chosen)), dtype=torch.float64, device=device).unbind())
        for part in weights:
            if rate(part.parameter) <= 0:
                continue
            for dim, inside, here in part.along(chosen):
                ids = here.to(device)
                found.square.index_add_(0, ids, part.energies(dim)[inside].to(device))
                each = part.parameter.numel() / len(inside)
                found.size.index_add_(0, ids, torch.full((len(ids),), each, dtype=torch.float64, device=device))
                rates = torch.full((len(ids),), rate(part.parameter), dtype=torch.float64, device=device)
                found.rate.scatter_reduce_(0, ids, rates, "amax")
        return found


@dataclass(frozen=True)
class GroupLasso(_Penalty):
    """λ Σ √p_g ‖w_g‖₂ over the components g, w_g all p_g weights that leave with one: Yuan and Lin, "Model Selection
    and Estimation in Regression with Grouped Variables", 2006, on the groups of Fang et al., "DepGraph", 2023.

    One step is its proximal map, w_g ← max(0, 1 − η λ √p_g / ‖w_g‖₂) w_g (Parikh and Boyd, "Proximal Algorithms",
    2014, section 6.5), so that groups become zero and not just small. Where a weight belongs to two groups (the rows
    are one layer's, the columns the next one's) it is multiplied by both factors: the maps one after another.
    """

    def act(self, weights: Sequence[Weights], chosen: Mask, times: int, rate: Rate) -> None:
        """One proximal step."""
        groups = _Groups.of(weights, chosen, rate)
        norm = groups.square.sqrt()
        shrink = self.strength * groups.rate * groups.size.sqrt() / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        factor = (1.0 - shrink).clamp(min=0.0)
        for part in weights:
            if rate(part.parameter) > 0:
                for dim, inside, ids in part.along(chosen):
                    part.scale(dim, inside, factor[ids.to(factor.device)])


@dataclass(frozen=True)
class Growing(_Penalty):
    """λ/2 Σ ‖w_g‖₂² over the components g that will leave, λ growing by `strength` at each time of `every`: Wang et
    al., "Neural Pruning via Growing Regularization", 2021 (GReg-1, with the criterion of `by`). One step is
    w_g ← max(0, 1 − η λ) w_g."""

    chooses: ClassVar[bool] = True

    def act(self, weights: Sequence[Weights], chosen: Mask, times: int, rate: Rate) -> None:
        """One step of decay."""
        for part in weights:
            factor = max(0.0, 1.0 - rate(part.parameter) * self.strength * times)
            for dim, inside, ids in part.along(chosen) if factor < 1.0 else ():
                part.scale(dim, inside, torch.full((len(ids),), factor))


REGULARISERS: Mapping[str, Callable[[float], Regulariser]] = {"group_lasso": GroupLasso, "growing": Growing}
