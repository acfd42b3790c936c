"""`remove` in time: a ratio that moves along a ramp while training goes on, and regularised training before a removal.

When its phase begins, the model's channels are remembered as they are then. Every later step ranks what is still there
by the weights of its own time, but counts against that original: shares, `align`, `min_channels` and `max_ratio` mean
the same at every step, so the end of a ramp leaves as many channels as a removal in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.graph.captured import Captured
from fxcompress.graph.coupling import Coupling, Mask, Slice, analyse
from fxcompress.graph.coupling_flow import Labels
from fxcompress.graph.site import Cuts, Outcome, Rewriting, Site
from fxcompress.passes.shared.choice import Choice
from fxcompress.passes.shared.criteria import criterion_of
from fxcompress.passes.shared.layers import Groups, layers_of
from fxcompress.passes.shared.ranking import Ranking, Scores
from fxcompress.passes.shared.removal_report import shortfalls
from fxcompress.passes.shared.removal_scores import scores_of
from fxcompress.passes.shared.removing import Survey, remove, split_of, survey
from fxcompress.passes.shared.responses import measured_for
from fxcompress.passes.shared.sparsifying import REGULARISERS, Regulariser, Weights
from fxcompress.policy.values import Duration, Ramp, Window

if TYPE_CHECKING:
    from fxcompress.passes.remove import Remove

GROWS = Duration(10, "steps")  # how often a growing penalty grows where `every` doesn't say


def begin(settings: Remove, captured: Captured, site: Site) -> Outcome:
    """Set up the removal of `settings`, whose ratio moves or which waits for the end of its phase. On a skeleton,
    remove what will have left at the end. Raises what `remove` raises of a selection."""
    ramp = settings.ratio if isinstance(settings.ratio, Ramp) else Ramp("step", 0.0, settings.ratio)
    if not captured.concrete:
        outcome = remove(settings.at(ramp.end), captured, site)
        return replace(outcome, notes=(*outcome.notes, _foretold(settings, ramp, site.window)))
    original = Original.of(settings, captured, site, ramp.end)
    every = GROWS if settings.sparsify == "growing" and settings.every is None else settings.every
    name = f"ratio of {site.what or 'channels'}({site.selection or 'the selection'})"
    return Outcome((), tuple(original.found.notes), rewriting=(
        Rewriting(name, ramp, original.at, original.ready, every, original),))


def _foretold(settings: Remove, ramp: Ramp, window: Window | None) -> str:
    """What a plan says of the time a removal takes."""
    if settings.sparsify != "none":
        return f"at the end of the phase, which trains with {settings.sparsify} of strength {settings.penalty:g}"
    count = steps_of(ramp, settings.every, window)
    steps = f"in {count} step{'s' * (count != 1)}" if count is not None else (
        f"step by step, every {settings.every}" if settings.every is not None else "step by step, as training goes on")
    return f"{steps} along {_shown(ramp)}"


def _shown(ramp: Ramp) -> str:
    return f"{ramp.shape}({100 * ramp.start:.4g}% -> {100 * ramp.end:.4g}%)"


def steps_of(ramp: Ramp, every: Duration | None, window: Window | None) -> int | None:
    """How many times the ramp's value rises at the times of `every` in `window`; None where their units differ."""
    if every is None or window is None or every.unit != window.unit:
        return None
    length = window.end - window.start
    times = [place * every.count / length for place in range(int(length / every.count + 1e-9) + 1)]
    values = [0.0, *(ramp.at(time) for time in times), ramp.end]
    return sum(1 for one, other in pairwise(values) if other > one + 1e-12)


@dataclass
class Original:
    """The channels that a removal in time counts against, and which of them every index of every tensor is.

    `ids` has, for each tensor by each of its names and each of its dimensions, the component that each index was part
    of at first (-1: of none); it is cut along with the tensors.
    """

    settings: Remove
    captured: Captured
    site: Site
    end: float
    found: Survey
    groups: Groups
    ids: dict[str, dict[int, Labels]]
    regulariser: Regulariser | None
    idle: tuple[int, ...] | None = None  # how many of each group a value asked for that changed nothing
    chosen: Mask | None = None  # what a growing penalty drives out, once it is chosen
    steps: int = 0  # of regularised training

    @classmethod
    def of(cls, settings: Remove, captured: Captured, site: Site, end: float) -> Original:
        """The model as it is now. Raises what `survey` raises."""
        found = survey(settings, captured, site)
        groups = Groups(found.coupling, found.layers, found.candidates)
        groups.in_cluster, groups.shares, groups.structures  # noqa: B018  computed while the modules are there
        ids: dict[str, dict[int, Labels]] = {}
        for part in found.coupling.slices:
            for name in part.owner.names:
                ids.setdefault(name, {})[part.dim] = part.components
        regulariser = REGULARISERS[settings.sparsify](settings.penalty) if settings.sparsify != "none" else None
        return cls(settings, captured, site, end, found, groups, ids, regulariser)

    # What it is asked as the number moves

    def ready(self) -> bool:
        """Whether there are gradients, if the criterion wants them."""
        return criterion_of(self.settings.by).needs != "gradient" or any(
            parameter.grad is not None for parameter in self.captured.module.parameters())

    def at(self, value: float) -> Remove | None:
        """The removal that brings the share that has left to `value`; None where it changes nothing."""
        last = value >= self.end
        owed = tuple(int(len(members) * value + 0.5) for members in self.groups.members)
        if value <= 0 or (owed == self.idle and not last):
            return None
        coupling = analyse(self.captured, split_of(self.site))
        doomed, scores, ranking = self._ranked(coupling, value)
        leaving = self._now(coupling, doomed) & ~coupling.barred
        if not leaving.any():
            self.idle = owed
            return None
        notes = list(ranking.notes)
        if last:
            found = self.found
            notes += shortfalls(self.settings.at(value), found.coupling, found.layers, found.wanted, doomed)
            notes += self._trained_notes(doomed)
        return self.settings.at(value, Choice(leaving, scores, tuple(notes)))

    def _ranked(self, coupling: Coupling, value: float) -> tuple[Mask, Scores, Ranking]:
        """What shall have left of the original at `value`; the scores of what is there now."""
        settings = self.settings.at(value)
        nodes = self.captured.nodes_named(node.name for node in self.site.nodes)
        layers = layers_of(coupling, nodes)
        candidates = self._now(coupling, self.groups.candidates)
        measured = measured_for(settings, coupling, candidates, self.site)
        scores = scores_of(settings, coupling, layers, candidates, measured)
        there = np.zeros(self.found.coupling.count, dtype=np.bool_)
        first = np.full(len(there), np.inf)  # the scores, by what was there at first
        for part, old in self._pairs(coupling):
            inside = (part.components >= 0) & (old >= 0)
            there[old[inside]] = True
            first[old[inside]] = scores[part.components[inside]]
        gone = self.groups.candidates & ~there
        before_others = gone if self.chosen is None else gone | self.chosen
        ranking = Ranking(settings, self.groups, np.where(before_others, -np.inf, first), self._least())
        return ranking.choose() | gone, scores, ranking

    def _least(self) -> list[int] | None:
        """How many of each group stay in the end, where that doesn't depend on scores. Groups that share a layer
        balance each other, and on the way the balance may ask for more of one of them than in the end."""
        if self.settings.scope != "local":
            return None
        return Ranking(self.settings.at(self.end), self.groups, np.zeros(self.found.coupling.count)).counts()

    def _pairs(self, coupling: Coupling) -> Iterator[tuple[Slice, Labels]]:
        """Each tracked dimension as it is now, with what its indices were at first; what came later is left out."""
        for part in coupling.slices:
            known = next((self.ids[name] for name in part.owner.names if name in self.ids), None)
            if known is not None:
                old = known.get(part.dim)
                fits = old is not None and len(old) == len(part.components)
                yield part, old if old is not None and fits else np.full(len(part.components), -1, dtype=np.int64)

    def _now(self, coupling: Coupling, then: Mask) -> Mask:
        """The components of `coupling` all of whose indices belonged to the components `then`."""
        known, other = np.zeros((2, coupling.count), dtype=np.bool_)
        for part, old in self._pairs(coupling):
            inside = part.components >= 0
            known[part.components[inside]] = True
            other[part.components[inside & ((old < 0) | ~then[old])]] = True
        result: Mask = known & ~other
        return result

    # What goes along with the number

    def trained(self, times: int, rate: Callable[[Tensor], float]) -> None:
        """Let the regulariser act on the weights."""
        if self.regulariser is None:
            return
        if self.regulariser.chooses and self.chosen is None:
            if not self.ready():
                return
            coupling = analyse(self.captured, split_of(self.site))
            self.chosen = self._ranked(coupling, self.end)[0]
        self.steps += 1
        self.regulariser.act(self._weights(), self.groups.candidates if self.chosen is None else self.chosen, times,
                             rate)

    def _weights(self) -> list[Weights]:
        """The trained parameters, each once, with what their indices were."""
        named = self.captured.module.named_parameters()
        return [Weights(parameter, self.ids[name]) for name, parameter in named
                if name in self.ids and parameter.requires_grad]

    def _trained_notes(self, doomed: Mask) -> list[str]:
        if self.regulariser is None:
            return []
        if not self.steps:
            return [f"`sparsify = {self.settings.sparsify}` has done nothing: no training step came before the removal"]
        norms = self.regulariser.norms(self._weights(), len(doomed))
        leaves, stays = norms[doomed], norms[self.groups.candidates & ~doomed]
        share = f"{leaves.mean() / stays.mean():.2g}" if len(stays) and stays.mean() > 0 else "none"
        return [f"{self.steps} steps of {self.settings.sparsify} before: what leaves has {share} times the mean norm "
                "of what stays"]

    def cut(self, resized: Mapping[str, Cuts]) -> None:
        """Follow tensors that were cut."""
        for name, cuts in resized.items():
            for dim, kept in cuts:
                if dim in self.ids.get(name, {}):
                    self.ids[name][dim] = self.ids[name][dim][kept.cpu().numpy()]
        self.idle = None

    def state(self) -> Mapping[str, Any]:
        """How long it trained, and what a growing penalty drives out."""
        chosen = None if self.chosen is None else torch.from_numpy(np.flatnonzero(self.chosen))
        return {"steps": self.steps, "chosen": chosen}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's."""
        self.steps = state["steps"]
        if state["chosen"] is not None:
            self.chosen = np.zeros(self.found.coupling.count, dtype=np.bool_)
            self.chosen[state["chosen"].cpu().numpy()] = True
