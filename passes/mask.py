"""`mask`: hide weights behind masks. The weights stay dense and trainable; the graph shows where the masks are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from fxcompress.diagnostics import Diagnostic, Label, PlanError, PolicyError
from fxcompress.passbase import Facet, Pass, param
from fxcompress.policy.types import Boolean, CallOf, Choice, Integer, OneOf, Percent, Ratio, Registered, Time
from fxcompress.policy.values import Call, Duration, NofM, Ramp

if TYPE_CHECKING:
    from torch import fx

    from fxcompress.graph.captured import Captured
    from fxcompress.graph.site import Change, Outcome, Scheduled, Site
    from fxcompress.passes.shared.masking import Masked, Masking
    from fxcompress.passes.shared.selection import Ranking, Target

_GRANULARITY = OneOf((Choice(("weight", "row", "column")), Ratio(), CallOf("block", (Integer(low=1), Integer(low=1)))))


@dataclass(frozen=True)
class Mask(Pass):
    """Hide the least important weights behind masks; they stay trainable, and `finalize` writes the zeros into them."""

    verb: ClassVar[str] = "mask"
    facet: ClassVar[Facet] = Facet.MASK
    kinds: ClassVar[tuple[str, ...]] = (
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "embedding")

    sparsity: float | Ramp | None = param(
        Percent(ramp=True), "the share of weights that are masked, or a ramp over the phase; `n:m` implies it", None)
    by: str = param(Registered("SCORES"), "the score: the lowest go first", "magnitude")
    granularity: str | NofM | Call = param(
        _GRANULARITY, "what is masked as one: a weight; all weights of an output (`row`) or of an input (`column`); a "
        "`block(r, c)` of outputs by inputs; `n:m` keeps n of every m neighbours along the inputs", "weight")
    scope: str = param(Choice(("local", "global")), "rank each layer by itself, or all that is selected together",
                       "local")
    parameter: str = param(Choice(("weight", "bias", "all")), "which parameters are masked", "weight")
    every: Duration | None = param(
        Time(), "how often the weights to mask are chosen anew; without it every step of a ramp, once for a constant",
        None)
    regrow: bool = param(Boolean(), "whether a masked weight may come back when it is chosen anew", True)
    rewind: str | Duration = param(
        OneOf((Choice(("none", "initial")), Time())),
        "after each choice all weights go back to what they were at the start (`initial`) or that far into the "
        "training", "none")
    seed: int | None = param(Integer(low=0), "for `by = random`; without it the run's seed", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [*self._sparsity_problems(), *self._bias_problems()]
        if problems:
            raise PolicyError(problems)

    @property
    def target(self) -> float | Ramp:
        """The sparsity asked for, that of `n:m` where none is given."""
        if self.sparsity is not None:
            return self.sparsity
        assert isinstance(self.granularity, NofM)
        return 1.0 - self.granularity.n / self.granularity.m

    def _sparsity_problems(self) -> list[Diagnostic]:
        if not isinstance(self.granularity, NofM):
            missing = Diagnostic("FXC0501", "`mask` needs a `sparsity`", help="say how much: `sparsity = 50%`; only "
                                 "`granularity = n:m` implies it")
            return [missing] if self.sparsity is None else []
        n, m = self.granularity.n, self.granularity.m
        end = self.sparsity.end if isinstance(self.sparsity, Ramp) else self.sparsity
        if end is None or abs(end - (1.0 - n / m)) < 5e-3:
            return []
        return [Diagnostic("FXC0502", f"`granularity = {n}:{m}` masks {percent(1 - n / m)} of the weights, but "
                           f"`sparsity` says {percent(end)}", help="leave `sparsity` out, or let its ramp end there")]

    def _bias_problems(self) -> list[Diagnostic]:
        if self.parameter == "weight" or self.granularity == "weight":
            return []
        if self.granularity == "row" and self.parameter == "all":
            return []  # the entry of the bias goes with its row
        return [Diagnostic("FXC0503", f"`granularity = {self.granularity}` has no meaning for a bias",
                           help="use `granularity = weight`, or `row` with `parameter = all`, or mask weights alone")]

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        """Insert the masks, and choose what they hide if that can be said now.

        Raises PlanError: FXC0510 (a parameter that can't be masked), FXC0504 (a size that `n:m` or `block` doesn't
        divide), FXC0505 (a frozen weight under a score that wants its gradient), FXC0506 (nothing to mask).
        """
        from fxcompress.graph.site import Outcome
        from fxcompress.passes.shared.masking import Masking
        from fxcompress.passes.shared.scores import score_of
        from fxcompress.passes.shared.selection import Ranking
        from fxcompress.passes.shared.units import units_of

        ranking = Ranking(score_of(self.by), units_of(self.granularity), self.scope == "global", self.regrow,
                          site.seed if self.seed is None else self.seed)
        wanted, notes = self._wanted(graph, site)
        masking = Masking(graph)
        problems = [self._problem(masking, site, node, name, ranking) for node, name in wanted]
        if any(problems):
            raise PlanError(problem for problem in problems if problem is not None)
        targets = self._insert(masking, site, wanted, ranking, notes)
        write, ramp = partial(ranking.select, targets), self.target
        done = graph.concrete and not isinstance(ramp, Ramp) and write(ramp)
        once = done and self.every is None and self.rewind == "none"
        return Outcome(
            changes=tuple(self._change(target, done) for target in targets),
            notes=tuple(notes),
            unknown=() if done else ("which weights are masked",),
            scheduled=() if once else self._scheduled(site, write, done),
        )

    def _wanted(self, graph: Captured, site: Site) -> tuple[list[tuple[fx.Node, str]], list[str]]:
        """The (node, argument) pairs to mask, and notes on those that have no such parameter."""
        from fxcompress.graph.ops import arguments, path_of

        names = {"weight": ("weight",), "bias": ("bias",), "all": ("weight", "bias")}[self.parameter]
        if self.granularity == "row":
            names = ("weight",)  # a bias follows its weight
        wanted = [(node, name) for node in site.nodes for name in names if arguments(node).get(name) is not None]
        bare = [path_of(node) for node in site.nodes if not any(node is have for have, _ in wanted)]
        if wanted:
            return wanted, [f"`{path}` has no {self.parameter} to mask" for path in bare]
        raise PlanError([Diagnostic("FXC0506", f"nothing selected has a {self.parameter}", _place(site), help="select "
                                    "layers that have one, or say `parameter = weight`")])

    def _problem(self, masking: Masking, site: Site, node: fx.Node, name: str, ranking: Ranking) -> Diagnostic | None:
        """Why this parameter can't be masked as asked."""
        from fxcompress.graph.ops import path_of
        from fxcompress.passes.shared.masking import layout_of, parameter_of

        path = path_of(node)
        without = f'leave it out: `mask {_less(site.selection, path)}`'
        why = masking.why_not(node, name)
        if why is not None:
            return Diagnostic("FXC0510", f"`{path}` can't be masked: {why}", _place(site), help=without)
        tensor = masking.captured.module.get_parameter(str(parameter_of(node, name)))
        why = ranking.units.misfit(layout_of(node, name).cube_shape(tensor.shape))
        if why is not None:
            return Diagnostic("FXC0504", f"`{path}` can't be masked by `{self.granularity}`: {why}", _place(site),
                              help=without)
        if ranking.score.needs != "none" and not tensor.requires_grad:
            return Diagnostic("FXC0505", f"`by = {self.by}` needs gradients, but the {name} of `{path}` is frozen",
                              _place(site), help=f"set `requires_grad`, or {without}")
        return None

    def _insert(self, masking: Masking, site: Site, wanted: list[tuple[fx.Node, str]], ranking: Ranking,
                notes: list[str]) -> list[Target]:
        """Put the masks in; a tensor that is met twice gets one."""
        from fxcompress.graph.ops import arguments
        from fxcompress.graph.provenance import touch

        graph = masking.captured
        before = {node: node.target for node in graph.graph.nodes}
        found: dict[str, Target] = {}
        selected = {node for node, _ in wanted}
        for node, name in wanted:
            masked = masking.insert(node, name, ranking.score.needs)
            if masked.mask in found:
                continue
            bias = None
            if self.parameter == "all" and self.granularity == "row" and arguments(node).get("bias") is not None:
                bias = masking.insert(node, "bias", "none")
            found[masked.mask] = _target(graph, node, name, masked, bias)
            touch(node, self, site, f"{masked.parameter} masked, {self._amount()} by {self.by}")
            notes.extend(f"`{other.target}` is the same tensor as `{masked.parameter}`: both see its mask"
                         for other in masked.readers if other.target != masked.parameter)
        for node in graph.graph.nodes:
            if node not in before:
                touch(node, self, site, "made for a mask", was=(user.name for user in node.users if user in before))
            elif before[node] != node.target and node not in selected:
                touch(node, self, site, "reads a weight that is masked elsewhere")
        return list(found.values())

    def _change(self, target: Target, done: bool) -> Change:
        from fxcompress.graph.site import UNKNOWN_WEIGHTS, Change

        after = self._amount()
        if self.scope == "global":
            after = percent(target.mask().masked() / target.mask().mask.numel()) if done else UNKNOWN_WEIGHTS
        what = "sparsity of bias" if target.name.endswith("bias") else "sparsity"
        return Change(target.path, target.kind, what, target.before, after, "selected")

    def _amount(self) -> str:
        """The sparsity as plan and provenance show it: `60%`, `0% -> 60% cubic`, `50% 2:4`."""
        ramp = self.target
        ends = (ramp.start, ramp.end) if isinstance(ramp, Ramp) else (ramp,)
        moved = " -> ".join(map(percent, ends)) + (f" {ramp.shape}" if isinstance(ramp, Ramp) else "")
        return moved if self.granularity == "weight" else f"{moved} {self.granularity}"

    def _scheduled(self, site: Site, write: Callable[[float], bool], done: bool) -> tuple[Scheduled, ...]:
        from fxcompress.graph.site import Scheduled

        rewind: Literal["initial"] | Duration | None = "initial" if self.rewind == "initial" else None
        rewind = self.rewind if isinstance(self.rewind, Duration) else rewind
        name = f"sparsity of {site.selection or 'the selection'}"
        return (Scheduled(name, self.target, write, self.every, rewind, done),)


def percent(share: float) -> str:
    """`0.6` as `60%`."""
    return f"{100 * share:.4g}%"


def _less(selection: str, path: str) -> str:
    """The text of `selection` without the layer at `path`."""
    whole = f"({selection})" if " " in selection else selection or "..."
    return f'{whole} - "{path}"'


def _place(site: Site) -> Label | None:
    return Label(site.span) if site.span is not None else None


def _target(graph: Captured, node: fx.Node, name: str, masked: Masked, bias: Masked | None) -> Target:
    from fxcompress.graph.ops import kind_of, path_of
    from fxcompress.passes.shared.masking import is_there, layout_of, mask_module
    from fxcompress.passes.shared.selection import Target

    return Target(
        masked.parameter, path_of(node), kind_of(node), "0%" if masked.fresh else "masked",
        parameter=lambda: graph.module.get_parameter(masked.parameter),
        mask=lambda: mask_module(graph, masked.mask),
        layout=lambda: layout_of(node, name),
        there=lambda: is_there(graph, masked.mask),
        follower=None if bias is None else lambda: mask_module(graph, bias.mask),
    )
