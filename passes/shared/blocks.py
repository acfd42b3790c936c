"""`remove blocks(S)`: whole residual blocks, so that `x + f(x)` becomes `x`; which of them leave, and the proof."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fxcompress.diagnostics import Diagnostic, Label, PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.provenance import touch
from fxcompress.graph.residual_blocks import Block, Blocks, Refusal, find_blocks
from fxcompress.graph.residual_drop import drop_blocks, prove_dropped
from fxcompress.graph.select import operators
from fxcompress.graph.site import UNKNOWN_WEIGHTS, Change, Cuts, Outcome, Site
from fxcompress.passes.shared.blocks_scores import block_scores, weights_of
from fxcompress.passes.shared.criteria import criterion_of
from fxcompress.passes.shared.ranking import NORMALIZERS, Scores

if TYPE_CHECKING:
    from fxcompress.passes.remove import Remove

_FEW = 6
_SLACK = 1e-9  # 0.3 * 10 is 3, whatever floating point says
_OF_CHANNELS = ("align", "min_channels", "couple", "compensate")  # settings that mean nothing for a whole block
_OF_FILTERS = ("lamp", "fpgm")  # criteria that compare the filters of one layer with each other


def remove_blocks(settings: Remove, captured: Captured, site: Site) -> Outcome:
    """Remove a share of the residual blocks that the selection reaches into; see `Remove.rewrite`."""
    _refuse_settings(settings, site)
    found = find_blocks(captured)
    chosen = set(site.nodes)
    selected = [block for block in found.blocks if not chosen.isdisjoint(block.nodes)]
    notes = _stay([one for one in found.refused if not chosen.isdisjoint(one.nodes)])
    if not selected:
        raise _no_blocks(found, notes, site)
    choice = Choice(settings, captured, site, selected)
    leaving = _repeated(captured, selected, site) or choice.leaving()
    notes += choice.shortfall(len(leaving))
    if not leaving:
        if settings.spread is not None:  # a search for a ratio: it tries small ones too
            return Outcome((), tuple(notes))
        small = f"{_count(selected)} selected, and {settings.share:.0%} of that is less than a half"
        raise _error("FXC0340", f"no block can be removed from {site.selection or 'what is selected'}", site,
                     [small, *notes] if not choice.owed else notes,
                     "ask for a larger `ratio` or `max_ratio`, or select more blocks")
    notes.insert(0, f"{len(leaving)} of {_count(selected)} " + ("leaves" if len(leaving) == 1 else "leave"))
    if captured.concrete and settings.verify != "off":
        notes.append(_proven(captured, leaving, settings.verify == "float64"))
    unknown = () if captured.concrete else choice.unknown(leaving)
    changes = _changes(leaving) if not unknown else _changes(selected, choice.certain(leaving))
    before = list(captured.module.parameters())
    for node in drop_blocks(captured, leaving):
        touch(node, settings, site, f"reads past {_names([block.label for block in leaving])}")
    there = set(captured.module.parameters())
    nothing = ((0, torch.zeros(0, dtype=torch.long)),)
    gone: dict[Tensor, Cuts] = {tensor: nothing for tensor in before if tensor not in there and tensor.dim()}
    return Outcome(changes, tuple(notes), unknown, resized=gone)


def _repeated(captured: Captured, selected: Sequence[Block], site: Site) -> list[Block]:
    """The blocks that a checkpoint says have left: nothing stayed of the weights of their layers."""
    gone = {name for name, cuts in (site.kept or {}).items() if any(not len(indices) for _, indices in cuts)}
    values = frozenset(operators(captured.graph))
    held = {id(block): {name for one in block.residuals for layer in one.layers
                        for name, _ in weights_of(captured, values, layer)} for block in selected if gone}
    return [block for block in selected if held.get(id(block)) and held[id(block)] <= gone]


def _error(code: str, message: str, site: Site, notes: Sequence[str], help_: str) -> PlanError:
    primary = Label(site.span) if site.span is not None else None
    return PlanError([Diagnostic(code, message, primary, notes=tuple(notes), help=help_)])


def _count(blocks: Sequence[Block]) -> str:
    return f"{len(blocks)} block{'s' * (len(blocks) != 1)}"


def _names(names: Sequence[str], few: int = _FEW) -> str:
    return ", ".join(names[:few]) + (f" and {len(names) - few} more" if len(names) > few else "")


def _refuse_settings(settings: Remove, site: Site) -> None:
    """Settings and criteria of channels, said of blocks, are mistakes."""
    defaults = {field.name: field.default for field in fields(settings)}
    for name in _OF_CHANNELS:
        if getattr(settings, name) != defaults[name] and getattr(settings, name) is not False:
            raise _error("FXC0347", f"`{name}` says nothing of whole blocks", site, [],
                         f"leave `{name}` out; `remove channels` knows it")
    responses = settings.by != "activation" and criterion_of(settings.by).needs == "response"
    if settings.by in _OF_FILTERS or responses:
        why = "sees the values of single channels" if responses else "compares the filters of one layer with each other"
        raise _error("FXC0347", f"`by = {settings.by}` doesn't rank whole blocks: it {why}", site, [],
                     "rank by `l2`, `taylor`, `activation` or `random`")


def _stay(refused: Sequence[Refusal]) -> list[str]:
    """One line for each selected join that is no block."""
    lines = [f"{one.path} stays: {one.reason}" for one in refused]
    return lines[:_FEW] + [f"and {len(lines) - _FEW} more stay"] * (len(lines) > _FEW)


def _no_blocks(found: Blocks, notes: Sequence[str], site: Site) -> PlanError:
    labels = [block.label for block in found.blocks]
    there = f"blocks that can leave: {_names(labels)}" if labels else "the model has no block that can leave"
    return _error(
        "FXC0342", "what is selected has no residual blocks to remove", site, [*notes, there],
        "select layers inside of a block, `blocks(\"layer3.**\")`; a block is `x + f(x)`, where x comes unchanged")


@dataclass(frozen=True)
class Choice:
    """Which of the blocks `selected` leave."""

    settings: Remove
    captured: Captured
    site: Site
    selected: list[Block]

    def leaving(self) -> list[Block]:
        """The least important, in graph order: as many as `ratio` asks for, of each group its share."""
        scores = self._scores()
        gone: list[int] = []
        caps = {stage: math.floor(self.settings.max_ratio * len(members) + _SLACK)
                for stage, members in self._stages().items()}
        for members, count in zip(self._groups(), self._shares(), strict=True):
            taken: list[int] = []
            for number in sorted(members, key=scores.__getitem__):
                stage = self.selected[number].stage
                if len(taken) < count and caps[stage]:
                    caps[stage] -= 1
                    taken.append(number)
            gone += taken
        return [self.selected[number] for number in sorted(gone)]

    def _stages(self) -> dict[Hashable, list[int]]:
        return self._by([block.stage for block in self.selected])

    def _by(self, keys: Sequence[Hashable]) -> dict[Hashable, list[int]]:
        """The blocks, by number, those of one key together."""
        found: dict[Hashable, list[int]] = {}
        for number, key in enumerate(keys):
            found.setdefault(key, []).append(number)
        return found

    def _groups(self) -> list[list[int]]:
        """The blocks that are ranked together: those of one stage, of one structure, or all."""
        keys: dict[str, list[Hashable]] = {
            "local": [block.stage for block in self.selected],
            "isomorphic": [block.structure for block in self.selected], "global": [None] * len(self.selected)}
        return list(self._by(keys[self.settings.scope]).values())

    def _shares(self) -> list[int]:
        """How many leave of each group: `ratio` of it, and of all of them together (the largest remainders, Hamilton's
        method), so that five groups of one block lose three at 50 %, not five."""
        ratio, groups = self.settings.share, self._groups()
        exact = [ratio * len(members) for members in groups]
        shares = [math.floor(share + _SLACK) for share in exact]
        order = sorted(range(len(groups)), key=lambda place: (shares[place] - exact[place], -len(groups[place]), place))
        for place in order[: self.owed - sum(shares)]:
            shares[place] += 1
        return shares

    def _scores(self) -> Scores:
        """One number a block; on a skeleton the last ones leave."""
        if not self.captured.concrete:
            return -np.arange(len(self.selected), dtype=np.float64)
        scores = block_scores(self.settings, self.captured, self.site, self.selected)
        if self.settings.scope != "local":
            normalize = self.settings.normalize
            if normalize == "auto":
                normalize = "none" if criterion_of(self.settings.by).comparable else "mean"
            for members in self._stages().values():
                scores[members] = NORMALIZERS[normalize](scores[members])
        return scores

    def shortfall(self, count: int) -> list[str]:
        """A line where fewer left than asked for."""
        return [f"{count} of {_count(self.selected)} removed, {self.owed} asked: max_ratio = "
                f"{self.settings.max_ratio:.0%} of each stage"] if count < self.owed else []

    @property
    def owed(self) -> int:
        """How many are asked for."""
        return math.floor(self.settings.share * len(self.selected) + 0.5 + _SLACK)

    def certain(self, leaving: Sequence[Block]) -> frozenset[int]:
        """The numbers of the blocks that leave whatever the weights are: those of groups that leave whole."""
        gone = {id(block) for block in leaving}
        return frozenset(number for members in self._groups() for number in members
                         if all(id(self.selected[other]) in gone for other in members))

    def unknown(self, leaving: Sequence[Block]) -> tuple[str, ...]:
        """What depends on weights."""
        gone = {id(block) for block in leaving}
        open_ = [members for members in self._groups()
                 if len({id(self.selected[number]) in gone for number in members}) > 1]
        if not open_:
            return ()
        alike = all(len({self.selected[number].structure for number in members}) == 1 for members in open_)
        return ("which blocks leave" if alike else "which blocks leave, and with them what the model saves",)


def _changes(blocks: Sequence[Block], certain: frozenset[int] | None = None) -> tuple[Change, ...]:
    """What becomes of each block; `certain` are the numbers of those that leave for sure, None for all."""
    return tuple(Change(block.label, "block", "block", "x + f(x)",
                        "x" if certain is None or number in certain else UNKNOWN_WEIGHTS, "selected")
                 for number, block in enumerate(blocks))


def _proven(captured: Captured, leaving: Sequence[Block], double: bool) -> str:
    """Drop the blocks of a copy and compare. Returns what to note."""
    trial = captured.copy()
    drop_blocks(trial, leaving)
    proof = prove_dropped(captured, trial, leaving, double=double)
    return f"proven equal to the model in which the branches of these blocks give zero, to {proof.shown}"
