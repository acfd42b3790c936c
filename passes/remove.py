"""`remove`: take whole channels, heads or hidden units out of a model; what remains is a smaller dense model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from fxcompress.diagnostics import PolicyError
from fxcompress.passbase import Facet, Pass, SizesFrom, param
from fxcompress.passes.shared.removal_settings import STRENGTH, raise_for_slices, raise_for_time, removal_problems
from fxcompress.policy.types import Boolean, Choice, Integer, Number, OneOf, Percent, Registered, Time
from fxcompress.policy.values import Duration, Ramp

if TYPE_CHECKING:
    from fxcompress.graph.captured import Captured
    from fxcompress.graph.site import Outcome, Site
    from fxcompress.passes.shared.choice import Choice as Chosen


@dataclass(frozen=True)
class Remove(Pass):
    """Structured removal by exact index coupling: whatever must leave together leaves together, whatever reads it
    shrinks with it, and the result is checked against the model with those channels zeroed."""

    verb: ClassVar[str] = "remove"
    facet: ClassVar[Facet] = Facet.SHAPE
    whats: ClassVar[Mapping[str, str]] = {
        "channels": "output channels of convolutions, output features of linear layers, hidden units of recurrent ones",
        "heads": "whole heads of attentions",
        "head_dim": "the same places in every head of an attention",
        "hidden": "the inner width of perceptrons: channels that one linear layer reads and nothing else",
        "embedding": "the residual stream: channels that adds `x + f(x)` carry from block to block",
        "blocks": "whole residual blocks (depth): `x + f(x)` becomes `x`, in the blocks that the selection reaches "
                  "into",
    }

    ratio: float | Ramp = param(
        Percent(ramp=True), "share of the selected channels to remove, or a ramp over the phase: the share of those at "
        "its beginning that has left by then; left out, the planner finds the one that just meets the policy's budgets",
        None)
    every: Duration | None = param(
        Time(), "how often channels leave along a ramp, without it as soon as the ramp asks for one more; how often a "
        "growing penalty grows, 10 steps without it", None)
    by: str = param(Registered("CRITERIA"), "what the least important channels are least in", "l2")
    align: int = param(Integer(low=1), "round the channels left in a layer to the nearest multiple of this", 1)
    scope: str = param(Choice(("local", "global", "isomorphic")), "rank within each group of coupled layers, or over "
                       "all of them, or over those of one structure", "local")
    reduce: str = param(Choice(("mean", "sum", "max", "first")), "what the layers that lose a channel together make of "
                        "its scores in each of them", "mean")
    slices: str = param(
        Choice(("made", "coupled")), "which weights `by` sees of a channel: those that make it, or also its readers' "
        "and the scales of norms, what each tensor scores divided by its mean (Fang et al., \"DepGraph\", 2023)",
        "made")
    normalize: str = param(Choice(("auto", "none", "mean", "max", "standard")), "make scores of groups that are ranked "
                           "together comparable: divided by the group's mean or largest, or standardised; `auto` takes "
                           "the mean, and none for criteria that compare as they are (with `slices = made`)", "auto")
    couple: str = param(Choice(("extend", "skip", "error")),
                        "what to do with layers that are tied to selected ones and not selected themselves", "extend")
    min_channels: int = param(Integer(low=1), "leave at least this many channels in every layer", 1)
    max_ratio: float = param(Percent(), "remove at most this share of any group of coupled channels", 1.0)
    compensate: bool | str = param(
        OneOf((Boolean(), Choice(("auto",)))), "fold the mean of what removed channels gave on the calibration data "
        "into their readers' biases; `auto` does so if there are such data; constants are always folded", "auto")
    exact: bool = param(Boolean(), "refuse where a normalisation over the removed dimension makes it inexact", False)
    verify: str = param(Choice(("on", "off", "float64")), "prove the result equal to the model with those channels "
                        "zeroed; `float64` computes both in double precision", "on")
    seed: int = param(Integer(low=0), "seed of `by = random`", 0)
    sparsify: str = param(
        Choice(("none", "group_lasso", "growing")), "train with a penalty over the phase and remove at its end: a "
        "group lasso on everything that leaves together, or an L2 penalty that grows on what `by` chooses at the "
        "beginning", "none")
    strength: float | None = param(
        Number(low=0), "of the penalty, per unit of the learning rate of the optimizer that follows (per step where "
        "none does): the factor of the group lasso, or what a growing penalty grows by each time; 0.001 without it",
        None)
    spread: float | None = field(default=None, repr=False)  # of a solved ratio: see `Ranking`; no parameter
    choice: Chosen | None = field(default=None, repr=False, compare=False)  # a ramp's, for now; no parameter

    lever: ClassVar[str] = "ratio"

    def with_share(self, share: float, spread: float) -> Remove:
        """This pass with `ratio = share`; `spread` lets groups of channels of one size round at different ratios."""
        return replace(self, ratio=share, spread=spread)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = removal_problems(self)
        if problems:
            raise PolicyError(problems)

    def at(self, ratio: float, choice: Chosen | None = None) -> Remove:
        """This pass at one time: it removes at once, up to `ratio`, what was chosen for it."""
        return replace(self, ratio=ratio, every=None, sparsify="none", strength=None, choice=choice)

    @property
    def share(self) -> float:
        """The ratio, of a pass whose ratio is given and doesn't move."""
        assert isinstance(self.ratio, float), "what moves is carried out `at` a time, what is left out is solved first"
        return self.ratio

    @property
    def penalty(self) -> float:
        """The strength of the penalty."""
        return STRENGTH if self.strength is None else self.strength

    def untested(self) -> Remove:
        """This pass at the end of its ramp or its penalty, without its proof and without means from data."""
        ratio = self.ratio.end if isinstance(self.ratio, Ramp) else self.ratio
        return replace(self.at(ratio, self.choice), verify="off", compensate=False)

    def sizes_from(self) -> SizesFrom:
        """Groups that are ranked together leave as many channels as their scores say."""
        if self.scope == "local":
            return "shapes"
        from fxcompress.passes.shared.criteria import criterion_of

        return "weights" if criterion_of(self.by).needs in ("weights", "scales") else "training"

    def data_need(self) -> str:
        """A criterion that ranks by responses, or `compensate = true`."""
        from fxcompress.passes.shared.criteria import criterion_of

        if criterion_of(self.by).needs == "response":
            return f"by = {self.by}"
        return "compensate = true" if self.compensate is True else ""

    def compensates(self, site: Site) -> bool:
        """Whether means of what leaves are folded into biases."""
        return bool(self.compensate) and site.calibration is not None

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        """Remove from the layers of `site`. Raises PlanError (FXC0304, FXC0340 to FXC0348) where that can't be done,
        and RewriteError (FXC0541) where the result would be wrong; then `graph` is as it was."""
        raise_for_slices(self, site)
        if (isinstance(self.ratio, Ramp) or self.sparsify != "none") and not site.kept:
            from fxcompress.passes.shared.ramping import begin

            raise_for_time(self, site)
            return begin(self, graph, site)
        from fxcompress.passes.shared.removing import remove

        return remove(self, graph, site)
