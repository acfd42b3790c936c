"""How many components leave, and which: the counts a ratio asks for, rounding, and the least that must stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fxcompress.graph.coupling import Mask, end_to_end
from fxcompress.passes.shared.criteria import criterion_of
from fxcompress.passes.shared.layers import Groups, Ints

if TYPE_CHECKING:
    from fxcompress.passes.remove import Remove

Scores = npt.NDArray[np.float64]
_ROUNDS = 8  # of the descent; it settles in a few
_GOLDEN = (5**0.5 - 1) / 2
_SLACK = 1e-9  # 0.3 * 10 is 3, whatever floating point says


def _over(scores: Scores, unit: float) -> Scores:
    return scores / (unit or 1.0)


# The scores of one group -> scores that compare with those of other groups.
NORMALIZERS: Mapping[str, Callable[[Scores], Scores]] = {
    "none": lambda scores: scores,
    "mean": lambda scores: _over(scores, float(np.abs(scores).mean())),
    "max": lambda scores: _over(scores, float(np.abs(scores).max())),
    "standard": lambda scores: _over(scores - scores.mean(), float(scores.std())),
}


@dataclass
class Ranking:
    """Chooses the components that leave. `scores` has one number a component, higher for what should stay; at least
    `least` of each group stay, where it is given."""

    settings: Remove
    groups: Groups
    scores: Scores
    least: Sequence[int] | None = None
    doomed: Mask = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Nothing leaves yet."""
        self.doomed = np.zeros(self.groups.coupling.count, dtype=np.bool_)

    def choose(self) -> Mask:
        """The components to remove, so that every layer keeps a channel, `min_channels`, and a multiple of `align`."""
        for members, count in zip(self.groups.members, self.counts(), strict=True):
            order = members[np.argsort(self.scores[members], kind="stable")]
            self.doomed[order[: len(members) - count]] = True
        self._keep_enough()
        return self.doomed

    def counts(self) -> list[int]:
        """How many of each group are to stay."""
        keep = self._local() if self.settings.scope == "local" else self._together()
        for place, (cluster, layers) in enumerate(zip(self.groups.clusters, self.groups.in_cluster, strict=True)):
            if len(cluster) == 1:
                keep[cluster[0]] = self._aligned(cluster[0], layers, self._asked(cluster[0], keep), self._tie(place))
        return keep if self.least is None else [max(pair) for pair in zip(keep, self.least, strict=True)]

    def _local(self) -> list[int]:
        """How many of each group stay: the same share everywhere, rounded so that every layer comes near its share."""
        sizes = [len(members) for members in self.groups.members]
        leaving = [min(self._cap(group), int(np.floor(size * self.settings.share + 0.5)))
                   for group, size in enumerate(sizes)]
        for place, (cluster, layers) in enumerate(zip(self.groups.clusters, self.groups.in_cluster, strict=True)):
            if len(cluster) > 1:
                moved = (self._tie(place) - 0.5) / max(sizes[group] for group in cluster)
                self._balance(cluster, layers, sizes, leaving, min(1.0, max(0.0, self.settings.share + moved)))
        return [size - out for size, out in zip(sizes, leaving, strict=True)]

    def _asked(self, group: int, keep: list[int]) -> float:
        """How many of a group that stands alone are asked to stay; whole unless its ratio was solved."""
        if self.settings.spread is None or self.settings.scope != "local":
            return keep[group]
        size = len(self.groups.members[group])
        return max(size - self._cap(group), size * (1 - self.settings.share))

    def _tie(self, place: int) -> float:
        """From which part of a step on the cluster number `place` rounds up to more that leave. It is one half, but for
        solved ratios another for each cluster: were they all the same, many clusters of one size would change at one
        ratio, and no ratio would meet a budget closely (ordered dithering, by multiples of the golden ratio)."""
        return 0.5 if self.settings.spread is None else (self.settings.spread + _GOLDEN * place) % 1.0

    def _balance(self, cluster: list[int], layers: list[int], sizes: list[int], leaving: list[int],
                 ratio: float) -> None:
        """Change `leaving` of groups that share layers, one at a time, to the least sum of squares over the layers of
        (share that leaves - ratio): coordinate descent, which small groups of many channels need."""
        parts: dict[int, list[tuple[int, float]]] = {group: [] for group in cluster}
        for number in layers:
            for group, count in self.groups.shares[number].items():
                parts[group].append((number, count / len(self.groups.layers[number].components)))
        missing = dict.fromkeys(layers, -ratio)
        for number in layers:  # what can't leave isn't owed
            share = self.groups.shares[number]
            missing[number] *= sum(sizes[g] * each for g, each in share.items()) / len(
                self.groups.layers[number].components)
        for group in cluster:
            for number, each in parts[group]:
                missing[number] += leaving[group] * each
        for _ in range(_ROUNDS):
            for group in cluster:
                slope = sum(missing[number] * each for number, each in parts[group])
                best = leaving[group] - slope / (sum(each * each for _, each in parts[group]) or 1.0)
                step = min(self._cap(group), max(0, int(np.floor(best + 0.5)))) - leaving[group]
                leaving[group] += step
                for number, each in parts[group]:
                    missing[number] += step * each

    def _together(self) -> list[int]:
        """How many of each group stay where groups are ranked together: the ratio holds over all of them, or over all
        of one structure. A component counts as many times as it takes channels of selected layers."""
        scores, weights = np.zeros(len(self.scores)), np.zeros(len(self.scores))
        taken = [0] * len(self.groups.members)
        for share, layer in zip(self.groups.shares, self.groups.layers, strict=True):
            for group, each in share.items():
                taken[group] += each * layer.selected
        normalize = NORMALIZERS[self._normalizer()]
        for group, inside in enumerate(self.groups.members):
            ranked = inside[np.isfinite(self.scores[inside])]  # those that leave anyway are minus infinity
            scores[inside] = self.scores[inside]
            scores[ranked] = normalize(self.scores[ranked]) if len(ranked) else ()
            weights[inside] = taken[group]
        kinds = self.groups.structures if self.settings.scope == "isomorphic" else [list(range(len(taken)))]
        keep = [len(inside) for inside in self.groups.members]
        for kind in kinds:
            members = np.concatenate([self._removable(group) for group in kind])
            owed = self.settings.share * sum(float(weights[self.groups.members[group]].sum()) for group in kind)
            order = members[np.argsort(scores[members], kind="stable")]
            leaving = order[: int(np.searchsorted(np.cumsum(weights[order]), owed + _SLACK, side="right"))]
            for group, count in zip(*np.unique(self.groups.of[leaving], return_counts=True), strict=True):
                keep[group] -= int(count)
        return keep

    def _normalizer(self) -> str:
        if self.settings.normalize != "auto":
            return self.settings.normalize
        concrete = self.groups.coupling.captured.concrete  # a skeleton's scores are numbers of components
        absolute = self.settings.slices == "made" and criterion_of(self.settings.by).comparable
        return "none" if concrete and absolute else "mean"

    def _cap(self, group: int) -> int:
        """How many of a group may leave."""
        return int(self.settings.max_ratio * len(self.groups.members[group]) + _SLACK)

    def _removable(self, group: int) -> Ints:
        """The least important of a group, as many as may leave."""
        inside = self.groups.members[group]
        return inside[np.argsort(self.scores[inside], kind="stable")][: self._cap(group)]

    def _aligned(self, group: int, layers: list[int], wanted: float, tie: float) -> int:
        """The number to keep next to `wanted` with which every layer of a group that stands alone keeps enough
        channels, and a multiple of `align`: of two, the smaller one below `tie` of the way between them."""
        size = len(self.groups.members[group])
        limits = {(len(self.groups.layers[number].components), self.groups.shares[number][group]) for number in layers}
        options = np.arange(max(1, size - self._cap(group)), size + 1)
        valid = np.ones(len(options), dtype=np.bool_)
        for channels, each in limits:
            left = channels - each * (size - options)
            valid &= (left % self.settings.align == 0) & (left >= min(self.settings.min_channels, channels))
        if not valid.any():
            if self.settings.align > 1:
                path = self.groups.layers[layers[0]].path
                capped = " within max_ratio" if self.settings.max_ratio < 1 else ""
                self.notes.append(f"{path} stays as it is: no number of its channels{capped} is a multiple of "
                                  f"{self.settings.align}")
            return size
        below, above = options[valid][options[valid] <= wanted], options[valid][options[valid] > wanted]
        if not len(below) or not len(above):
            return int(above[0] if len(above) else below[-1])
        return int(below[-1] if wanted - below[-1] < tie * (above[0] - below[-1]) else above[0])

    def _keep_enough(self) -> None:
        """Bring the most important back where a dimension would be left empty, below `min_channels` or off `align`;
        this only ever adds, so it ends."""
        align, coupling = self.settings.align, self.groups.coupling
        dimensions = [part.components for part in coupling.slices]
        self._restore_all(dimensions + [coupling.of(labels) for labels in coupling.flow.pieces], 1)
        layers = [layer.components for layer in self.groups.layers]
        self._restore_all(layers, self.settings.min_channels)
        changed = align > 1
        while changed:
            changed = False
            for number in np.flatnonzero(self._staying(layers) % align):
                components = layers[number]
                left = len(components) - int(self._leaving(components).sum())
                if left % align and left < len(components):
                    changed |= self._restore(components, left - left % align + align)

    def _restore_all(self, dimensions: list[Ints], least: int) -> None:
        """Keep at least `least` indices of each of the dimensions with these components."""
        sizes = np.array(list(map(len, dimensions)), dtype=np.int64)
        for number in np.flatnonzero(self._staying(dimensions) < np.minimum(sizes, least)):
            self._restore(dimensions[number], least)

    def _staying(self, dimensions: list[Ints]) -> Ints:
        """How many indices stay in each of the dimensions with these components."""
        whole, starts = end_to_end(dimensions)
        staying = np.append(~self.doomed, True)[whole]  # the last entry is that of the component -1
        return np.add.reduceat(staying, starts, dtype=np.int64) if len(whole) else starts

    def _leaving(self, components: Ints) -> Mask:
        leaving: Mask = (components >= 0) & self.doomed[components]
        return leaving

    def _restore(self, components: Ints, least: int) -> bool:
        """Keep at least `least` of the indices with these components; whether anything came back."""
        leaving = components[self._leaving(components)]
        missing = min(least, len(components)) - (len(components) - len(leaving))
        if missing <= 0:
            return False
        for component in sorted(set(leaving.tolist()), key=lambda c: (-self.scores[c], c)):
            self.doomed[component] = False
            missing -= int((leaving == component).sum())
            if missing <= 0:
                break
        return True
