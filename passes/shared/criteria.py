"""Criteria: how important each removable component is. `by = NAME` looks one up in `passbase.CRITERIA`.

A criterion takes a `Scoring` and gives one score a component, higher for what should stay. Others add theirs with
`register_criterion`. In the formulae w is a weight, g the gradient that its parameter holds, F the filter of an index:
all the weights that belong to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from fxcompress.diagnostics import Diagnostic, PlanError
from fxcompress.passbase import CRITERIA

Update = Callable[[Tensor, Tensor, Tensor], Tensor]
Need = Literal["weights", "gradient", "scales", "response"]

# The score so far, that of one more layer, the number of layers so far -> the score of a component.
REDUCERS: Mapping[str, Update] = {
    "mean": lambda old, new, seen: old + (new - old) / (seen + 1),
    "sum": lambda old, new, seen: old + new,
    "max": lambda old, new, seen: torch.where(seen > 0, torch.maximum(old, new), new),
    "first": lambda old, new, seen: torch.where(seen > 0, old, new),
}


@dataclass(frozen=True)
class Part:
    """Dimension `dim` of `weight`, a tensor of a layer. `components` is (indices): the number of each index' component
    in the scoring, -1 if it isn't a candidate. `gradient` is shaped as `weight`, None without one."""

    layer: str
    weight: Tensor
    dim: int
    components: Tensor
    gradient: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """What belongs to each index, (indices, rest): a view where that can be, so that no copies of weights pile up;
        in float32 at least."""
        return self._rows(self.weight)

    @property
    def grad(self) -> Tensor | None:
        """The gradient, shaped as `rows`."""
        return None if self.gradient is None else self._rows(self.gradient)

    def _rows(self, tensor: Tensor) -> Tensor:
        precise = torch.promote_types(tensor.dtype, torch.float32)  # squares of half floats overflow
        return tensor.detach().to(precise).movedim(self.dim, 0).reshape(tensor.shape[self.dim], -1)


@dataclass(frozen=True)
class Response:
    """What channels are on the calibration data at one place where they are read. `components` are (n) numbers of
    components, each once; `mean`, `magnitude` and `square` the means of x, |x| and x² over all samples and positions
    and all indices of the component, (n) each, float64."""

    layer: str
    components: Tensor
    mean: Tensor
    magnitude: Tensor
    square: Tensor


class Indexed(Protocol):
    """Something that has numbers for components: a `Part` or a `Response`."""

    @property
    def components(self) -> Tensor:
        """(indices): the component of each, -1 for none."""


P = TypeVar("P", bound=Indexed)


@dataclass(frozen=True)
class Scoring:
    """What a criterion sees: the weights that make the components' channels, layer by layer in the order of the graph,
    and, only for a criterion that needs them, the scales of the batch norms on them or what the channels are on the
    calibration data wherever they are read. `how` names the reducer over the layers of a component. With
    `slices = coupled` the weights are all that leave with a component, those that make its channels first, and
    `relative` is set: what each of them scores is divided by its mean."""

    count: int
    weights: tuple[Part, ...]
    scales: tuple[Part, ...]
    generator: torch.Generator
    how: str = "mean"
    responses: tuple[Response, ...] = ()
    relative: bool = False

    def reduce(self, parts: tuple[P, ...], energy: Callable[[P], Tensor],
               finish: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
        """For each part, `energy` (one number an index) summed over the indices of a component; `finish` of these sums,
        one for each component that the part has, over their mean if `relative`; then `how` over the parts that have the
        component. Components in no part score 0. Takes time linear in the weights."""
        total = torch.zeros(self.count, dtype=torch.float64)
        seen = torch.zeros_like(total)
        for part in parts:
            present, share = part.components, energy(part).detach().double().cpu()
            once = bool((present[1:] > present[:-1]).all()) and not bool((present[:1] < 0).any())
            if not once:  # several indices of a component, or in another order
                inside, energies = present >= 0, share
                present, place = torch.unique(present[inside], return_inverse=True)
                share = torch.zeros(len(present), dtype=torch.float64).index_add_(0, place, energies[inside])
            share = finish(share)
            if self.relative:
                share = share / (float(share.abs().mean()) or 1.0)
            total[present] = REDUCERS[self.how](total[present], share, seen[present])
            seen[present] += 1
        return total


ScoreFunction = Callable[[Scoring], Tensor]


@dataclass(frozen=True)
class Criterion:
    """`function` scores what `needs` is there for. The scores of a `comparable` one mean the same in every layer, so a
    ranking over several takes them as they are. `filters`: its formula is about whole filters, or about no weights."""

    function: ScoreFunction
    needs: Need = "weights"
    comparable: bool = False
    filters: bool = False

    @property
    def sums(self) -> bool:
        """Whether any slice of a weight can be scored by it, and not only those that make a channel."""
        return self.needs in ("weights", "gradient") and not self.filters

    def score(self, scoring: Scoring, name: str) -> Tensor:
        """One score a component. Raises PlanError: FXC0343 where a layer lacks what is needed, FXC0344 where the
        function gives anything but one finite number a component."""
        if self.needs in _LACKING:
            lacking, what, way_out = _LACKING[self.needs]
            bare = sorted(lacking(scoring))
            if bare:
                raise PlanError([Diagnostic(
                    "FXC0343", f"`by = {name}` needs {what} every layer that it ranks",
                    notes=(f"without one: {', '.join(bare[:8])}{' ...' if len(bare) > 8 else ''}",), help=way_out)])
        scores = torch.as_tensor(self.function(scoring)).detach()
        if scores.shape != (scoring.count,) or not scores.isfinite().all():
            found = (f"it gave a tensor of the shape {tuple(scores.shape)}" if scores.shape != (scoring.count,) else
                     f"{int((~scores.isfinite()).sum())} of {scoring.count} scores are infinite or not numbers")
            raise PlanError([Diagnostic(
                "FXC0344", f"`by = {name}` must give one finite score a component", notes=(found,),
                help="look for weights or gradients that aren't finite, or correct the criterion")])
        return scores


def _without_scale(scoring: Scoring) -> set[str]:
    return _uncovered(scoring, scoring.scales)


def _uncovered(scoring: Scoring, parts: Iterable[Indexed]) -> set[str]:
    """The layers of which `parts` don't have every component."""
    covered = torch.zeros(scoring.count, dtype=torch.bool)
    for part in parts:
        covered[part.components[part.components >= 0]] = True
    return {part.layer for part in scoring.weights if not covered[part.components[part.components >= 0]].all()}


def _without_response(scoring: Scoring) -> set[str]:
    return _uncovered(scoring, scoring.responses)


def _without_gradient(scoring: Scoring) -> set[str]:
    return {part.layer for part in scoring.weights if part.gradient is None}


# need -> (the layers that lack it, how it is called, the way out)
_LACKING: Mapping[str, tuple[Callable[[Scoring], set[str]], str, str]] = {
    "scales": (_without_scale, "a batch norm behind",
               "leave these layers out of the selection, or rank by `l2`"),
    "gradient": (_without_gradient, "a gradient on",
                 "run a forward and a backward pass first and keep `.grad` on the parameters (frozen weights and "
                 "weights that are computed from others have none), or rank by `l2`"),
    "response": (_without_response, "values on the data that can be measured in",
                 "leave these layers out (what they make is read inside of one fused module), or rank by `l2`"),
}


def _energy(rows: Tensor) -> Tensor:
    """The sum of the squares of each row, without a copy of them all."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def l1(scoring: Scoring) -> Tensor:
    """sum over F of |w|: Li et al., "Pruning Filters for Efficient ConvNets", 2017."""
    return scoring.reduce(scoring.weights, lambda part: part.rows.abs().sum(1))


def l2(scoring: Scoring) -> Tensor:
    """sqrt(sum over F of w²), the Euclidean norm of a filter: He et al., "Soft Filter Pruning", 2018."""
    return scoring.reduce(scoring.weights, lambda part: _energy(part.rows), torch.sqrt)


def random(scoring: Scoring) -> Tensor:
    """A uniform random number from the pass's seed."""
    return torch.rand(scoring.count, generator=scoring.generator)


def bn_scale(scoring: Scoring) -> Tensor:
    """|γ|, γ the scale of the batch norm behind a channel: Liu et al., "Network Slimming", 2017."""
    return scoring.reduce(scoring.scales, lambda part: part.rows.abs().sum(1))


def taylor(scoring: Scoring) -> Tensor:
    """sum over F of |w g|, the change of the loss to first order when the weights go: Molchanov et al., "Importance
    Estimation for Neural Network Pruning", 2019, with absolute values in the place of its squares."""
    return scoring.reduce(scoring.weights, lambda part: (part.rows * _gradient(part)).abs().sum(1))


def hessian(scoring: Scoring) -> Tensor:
    """sum over F of h w² / 2, the change of the loss to second order at a minimum, the Hessian taken as diagonal:
    LeCun, Denker and Solla, "Optimal Brain Damage", 1990. h is taken as g², the diagonal of the
    empirical Fisher matrix (of the gradient that the parameter holds: of a mean over a batch, not of each sample)."""
    return scoring.reduce(scoring.weights, lambda part: (part.rows * _gradient(part)).square().sum(1) / 2)


def lamp(scoring: Scoring) -> Tensor:
    """e / (sum of all e' of the layer that are not smaller), e the sum over F of w²: Lee et al., "Layer-adaptive
    Sparsity for the Magnitude-based Pruning", 2021, with filters in the place of weights. The largest of each layer
    scores 1. Of equal ones the first has the smaller score, as in the paper."""
    def share(energy: Tensor) -> Tensor:
        ordered, order = energy.sort(stable=True)
        left = ordered.flip(0).cumsum(0).flip(0)
        return torch.empty_like(energy).index_put_((order,), ordered / left.clamp(min=torch.finfo(left.dtype).tiny))

    return scoring.reduce(scoring.weights, lambda part: _energy(part.rows), share)


def fpgm(scoring: Scoring) -> Tensor:
    """sum over the filters F' of the layer of ‖F − F'‖₂: the filters near the geometric median of the layer can be
    replaced by the others. He et al., "Filter Pruning via Geometric Median", 2019."""
    def apart(part: Part) -> Tensor:
        filters = part.rows
        return torch.cdist(filters, filters).sum(1)

    return scoring.reduce(scoring.weights, apart)


def activation(scoring: Scoring) -> Tensor:
    """mean of |x| over the calibration data, x a value of the channel where it is read, behind norm, activation and
    pooling: the "mean activation" of Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", 2017, with the magnitude for functions that go below zero (behind ReLU it is the same). A channel that
    is read in several places is reduced over them. Hu et al., "Network Trimming", 2016, count zeros instead."""
    return scoring.reduce(scoring.responses, lambda part: part.magnitude)


def _gradient(part: Part) -> Tensor:
    grad = part.grad
    assert grad is not None, "a criterion is asked only where its needs are met"
    return grad


L1 = Criterion(l1)
L2 = Criterion(l2)
RANDOM = Criterion(random, comparable=True, filters=True)
BN_SCALE = Criterion(bn_scale, needs="scales", comparable=True)
TAYLOR = Criterion(taylor, needs="gradient", comparable=True)
HESSIAN = Criterion(hessian, needs="gradient", comparable=True)
LAMP = Criterion(lamp, comparable=True)
FPGM = Criterion(fpgm, filters=True)
ACTIVATION = Criterion(activation, needs="response")


def register_criterion(name: str, needs: Need = "weights",
                       comparable: bool = False) -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorator: make a function a value of `by` of `remove` for this process. Packages use the entry point
    `fxcompress.criteria`. It sees all that leaves with a component where the policy says `slices = coupled`.

    The function takes a `Scoring` and gives one finite score a component, higher for what should stay; `Scoring.reduce`
    gathers it layer by layer. With `needs="gradient"` every part of `scoring.weights` has its `grad`, with
    `needs="scales"` every component is in a part of `scoring.scales`, with `needs="response"` in one of
    `scoring.responses`, which want calibration data. Scores that are not `comparable` are divided by
    the mean of their group where groups are ranked together (`normalize = auto`).

        @register_criterion("largest")
        def largest(scoring: Scoring) -> Tensor:
            return scoring.reduce(scoring.weights, lambda part: part.rows.abs().amax(1))
    """

    def add(function: ScoreFunction) -> ScoreFunction:
        CRITERIA.register(name, Criterion(function, needs, comparable))
        return function

    return add


def criterion_of(name: str) -> Criterion:
    """The criterion a policy names; a bare function (of an entry point) sees weights alone. Raises KeyError."""
    found = CRITERIA[name]
    return found if isinstance(found, Criterion) else Criterion(found)
