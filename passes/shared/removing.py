"""The rewrite of `remove`: what can leave of a selection, how much of it, the removal itself and its proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from fxcompress.diagnostics import Diagnostic, Label, PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.coupling import Coupling, Mask, analyse
from fxcompress.graph.coupling_apply import Removal
from fxcompress.graph.coupling_apply import remove as apply_removal
from fxcompress.graph.coupling_proof import prove
from fxcompress.graph.ops import kind_of
from fxcompress.graph.provenance import Marker, origins_of
from fxcompress.graph.site import UNKNOWN_WEIGHTS, Change, Outcome, Site
from fxcompress.graph.verify import signature
from fxcompress.passes.shared.blocks import remove_blocks
from fxcompress.passes.shared.choice import Choice, repeated
from fxcompress.passes.shared.folding import Fold
from fxcompress.passes.shared.layers import Groups, Layer, layers_of, mask_of, owners_of
from fxcompress.passes.shared.ranking import Ranking, Scores
from fxcompress.passes.shared.removal_report import (
    blocked,
    changes_of,
    coupled_reasons,
    left_of,
    place_of,
    rounded,
    shortfalls,
)
from fxcompress.passes.shared.removal_scores import scores_of
from fxcompress.passes.shared.residual import stream
from fxcompress.passes.shared.responses import Measured, measured_for

if TYPE_CHECKING:
    from fxcompress.passes.remove import Remove


def remove(settings: Remove, captured: Captured, site: Site) -> Outcome:
    """Remove what `settings` asks for from the layers of `site`; see `Remove.rewrite`."""
    if settings.free:
        raise _error("FXC0345", "`ratio` is left out, and there is no budget to solve it from", site, [],
                     "give the share to remove, `Remove(ratio=0.5)`; or run the pass in a policy with a `budget`")
    if site.what == "blocks":
        return remove_blocks(settings, captured, site)
    if settings.choice is None and site.kept is None:
        return _chosen(settings, captured, survey(settings, captured, site), site)
    coupling = analyse(captured, split_of(site))
    measured = measured_for(settings, coupling, settings.choice.doomed, site) if settings.choice is not None else None
    choice = settings.choice or repeated(coupling, site.kept or {})
    return _removed(settings, captured, coupling, layers_of(coupling, site.nodes), choice, measured, site)


@dataclass(frozen=True)
class Survey:
    """What of a selection can leave: the components that it speaks of (`wanted`), and those of them that may go."""

    coupling: Coupling
    layers: list[Layer]
    wanted: Mask
    candidates: Mask
    notes: tuple[str, ...]


def split_of(site: Site) -> str:
    """Which axis of split dimensions stays removable for what leaves at `site`."""
    return "head_dim" if site.what == "head_dim" else "heads"


def survey(settings: Remove, captured: Captured, site: Site) -> Survey:
    """Look at what `site` selects. Raises PlanError (FXC0304, FXC0341, FXC0342)."""
    coupling = analyse(captured, split_of(site))
    layers = layers_of(coupling, site.nodes)
    wanted = _wanted(coupling, layers, site.what or "channels", site)
    candidates = wanted & ~coupling.barred
    notes: list[str] = []
    if candidates.any():
        candidates = _coupled(settings, coupling, layers, candidates, site, notes)
    if settings.exact:
        _refuse_inexact(coupling, layers, candidates, site)
    return Survey(coupling, layers, wanted, candidates, tuple(notes))


def _chosen(settings: Remove, captured: Captured, found: Survey, site: Site) -> Outcome:
    """Choose among what was found by its scores, and remove that."""
    coupling, layers, candidates, notes = found.coupling, found.layers, found.candidates, list(found.notes)
    groups = Groups(coupling, layers, candidates)
    doomed, scores = np.zeros(coupling.count, dtype=np.bool_), np.zeros(coupling.count)
    measured: Measured | None = None
    if candidates.any():
        measured = measured_for(settings, coupling, candidates, site)
        scores = scores_of(settings, coupling, layers, candidates, measured)
        ranking = Ranking(settings, groups, scores)
        doomed = ranking.choose()
        notes += ranking.notes
    notes += shortfalls(settings, coupling, layers, found.wanted, doomed)
    if not doomed.any() and settings.spread is not None:
        return Outcome((), tuple(notes))
    if not doomed.any():
        raise _nothing(settings, coupling, layers, found.wanted, notes, site)
    return _removed(settings, captured, coupling, layers, Choice(doomed, scores, tuple(notes)), measured, site)


def _removed(settings: Remove, captured: Captured, coupling: Coupling, layers: list[Layer], choice: Choice,
             measured: Measured | None, site: Site) -> Outcome:
    """Remove what was chosen, and prove it."""
    doomed, notes = choice.doomed, [*choice.notes, *_inexact_notes(coupling, layers, choice.doomed)]
    if captured.concrete and settings.verify != "off":
        notes += _proven(captured, coupling, doomed, settings.verify == "float64")
    return _carried_out(settings, captured, coupling, layers, doomed, choice.scores, measured, site, notes)


def _error(code: str, message: str, site: Site, notes: list[str], help_: str) -> PlanError:
    primary = Label(site.span) if site.span is not None else None
    return PlanError([Diagnostic(code, message, primary, notes=tuple(notes), help=help_)])


# What the selection means


def _wanted(coupling: Coupling, layers: list[Layer], what: str, site: Site) -> Mask:
    """The components that the selection speaks of."""
    selected = [layer for layer in layers if layer.selected]
    mask = mask_of(selected, coupling.count)
    if what in ("heads", "head_dim"):
        mask &= coupling.heads
    elif what == "hidden":
        mask &= _hidden(coupling, layers)
    elif what == "embedding":
        mask &= stream(coupling)
    if not mask.any():
        kinds = sorted({kind_of(node) for node in site.nodes})
        text = {"channels": "no channels", "hidden": "no inner width of a perceptron",
                "embedding": "no channels of a residual stream"}.get(what, "no attention heads")
        raise _error(
            "FXC0342", f"what is selected has {text} to remove", site,
            [f"selected: {len(site.nodes)} operators of kind {', '.join(kinds[:6])}"],
            "select convolutions, linear, embedding or recurrent layers or attentions, or remove `channels` of them")
    return mask


def _hidden(coupling: Coupling, layers: list[Layer]) -> Mask:
    """Channels made by linear layers (or convolutions), no heads, that one such layer reads and nothing else."""
    def is_linear(node: fx.Node) -> bool:
        products = kind_of(node) in ("addmm", "matmul") and any(i.op == "get_attr" for i in node.all_input_nodes)
        return products or kind_of(node) in ("linear", "conv1d", "conv2d", "conv3d")

    readers = np.zeros(coupling.count, dtype=np.int64)
    for entry in coupling.flow.consumed:
        linear = is_linear(entry.node)
        components = np.unique(coupling.of(entry.labels))
        readers[components[components >= 0]] += 1 if linear else 2
    makers = np.ones(coupling.count, dtype=np.bool_)
    for layer in layers:
        if not is_linear(layer.node):
            makers[layer.present] = False
    hidden: Mask = (readers == 1) & makers & ~coupling.heads & ~coupling.inexact
    return hidden


def _coupled(settings: Remove, coupling: Coupling, layers: list[Layer], candidates: Mask, site: Site,
             notes: list[str]) -> Mask:
    """Deal with layers that are tied to selected ones without being selected."""
    others = [layer for layer in layers if not layer.selected and not layer.follows and layer.inside(candidates)]
    if settings.couple == "extend" or not others:
        return candidates
    tied = candidates & mask_of(others, coupling.count)
    if settings.couple == "error":
        lines = [f"{layer.path} ({kind_of(layer.node)}) is {reason}"
                 for layer, reason in zip(others, coupled_reasons(coupling, layers, others), strict=True)]
        count = f"{len(others)} layers" if len(others) > 1 else "a layer"
        raise _error(
            "FXC0304", f"{count} would shrink with the selected ones, without being selected", site,
            lines[:12] + [f"and {len(lines) - 12} more"] * (len(lines) > 12),
            "select them too, or say `couple = extend` to shrink them too, or `couple = skip` to leave what is tied as "
            "it is")
    owner = owners_of(others, coupling.count)
    for layer in layers:
        if layer.selected and layer.inside(tied):
            owners = owner[layer.present]
            other = others[int(owners[owners >= 0].min())]
            notes.append(f"{layer.path} keeps what is tied to {other.path}, which isn't selected (couple = skip)")
    return candidates & ~tied


def _refuse_inexact(coupling: Coupling, layers: list[Layer], candidates: Mask, site: Site) -> None:
    inexact = candidates & coupling.inexact
    if not inexact.any():
        return
    lines = _inexact_notes(coupling, layers, inexact)
    raise _error("FXC0341", "what is selected can't be removed exactly", site, lines,
                 "select layers that no normalisation over their channels reads, such as `hidden(linear)` or "
                 "`heads(linear)`, or say `exact = false`")


def _inexact_notes(coupling: Coupling, layers: list[Layer], chosen: Mask) -> list[str]:
    """One line for each operator that notices a removal among `chosen`, with the layers concerned."""
    lines: dict[str, list[str]] = {}
    noticed = chosen & coupling.inexact
    for layer in layers if noticed.any() else ():
        inside = layer.present[noticed[layer.present]]
        if len(inside):
            event = coupling.notice(int(inside[0]))
            assert event is not None
            lines.setdefault(f"{place_of(event.node)} {event.reason}", []).append(layer.path)
    return [f"inexact: {reason}; it concerns {_listed(paths)}" for reason, paths in lines.items()]


def _listed(paths: list[str], limit: int = 4) -> str:
    paths = list(dict.fromkeys(paths))
    return ", ".join(paths[:limit]) + (f" and {len(paths) - limit} more" if len(paths) > limit else "")


def _nothing(settings: Remove, coupling: Coupling, layers: list[Layer], wanted: Mask, notes: list[str],
             site: Site) -> PlanError:
    reasons = blocked(coupling, layers, wanted) or notes
    small = not (wanted & coupling.barred).any()
    return _error("FXC0340", f"nothing can be removed from {site.selection or 'what is selected'}", site,
                  list(dict.fromkeys(reasons + notes))[:8],
                  "ask for a larger `ratio` or `max_ratio`, or a smaller `align` or `min_channels`" if small
                  else "select layers inside the model, whose channels other layers read")


# The removal


def _proven(captured: Captured, coupling: Coupling, doomed: Mask, double: bool) -> list[str]:
    """Carry the exact part of the removal out on a copy and compare. Returns what to note."""
    exact = doomed & ~coupling.inexact
    if not exact.any():
        return ["not proven: everything that leaves is inexact"]
    trial = captured.copy()
    again = analyse(trial, coupling.flow.split, coupling.flow.flipped)
    apply_removal(again, exact)
    proof = prove(captured, trial, coupling, exact[coupling.component], double=double)
    some = f" for {int(exact.sum())} of {int(doomed.sum())} components, the exact ones"
    partly = "" if exact.sum() == doomed.sum() else some
    return [f"proven equal to the model with these channels zeroed, to {proof.shown}{partly}"]


def _carried_out(settings: Remove, captured: Captured, coupling: Coupling, layers: list[Layer], doomed: Mask,
                 scores: Scores | None, measured: Measured | None, site: Site, notes: list[str]) -> Outcome:
    kinds = {node: node.meta["fxc"].kind for node in coupling.flow.nodes}
    before = {node.name: (signature(node), len(origins_of(node))) for node in coupling.flow.nodes}
    changes = changes_of(coupling, layers, doomed, kinds)
    digits = None if scores is None else rounded(scores)
    which = [left_of(shrunk, settings.by, digits) if captured.concrete else None for shrunk in changes]
    fold = Fold(coupling, doomed[coupling.component], measured if settings.compensates(site) else None).gather()
    removal: Removal = apply_removal(coupling, doomed)
    readers = fold.carry_out()
    mark, now = Marker(settings, site), {node.name: node for node in captured.module.graph.nodes}
    for reader in readers:
        for place in _living(captured, reader, now):
            mark.touch(place, "takes what left into its bias")
    notes += fold.notes()
    for shrunk, left in zip(changes, which, strict=True):
        node, change = shrunk.node, shrunk.change
        for place in _living(captured, node, now):
            mark.touch(place, f"{change.what} {change.before} -> {change.after}", (node.name,), left)
    for node in now.values():
        was, count = before.get(node.name, (None, 0))
        if was != signature(node) and len(origins_of(node)) == count and node.op not in ("placeholder", "output"):
            mark.touch(node, "follows what left" if was else "a step of a module written out")
    shown = [shrunk.change for shrunk in changes]
    unknown: tuple[str, ...] = ()
    if not captured.concrete:
        unknown = ("which channels leave",)
        if settings.scope != "local":
            unknown = ("which channels leave, and how many of each layer",)
            shown = [Change(c.path, c.kind, c.what, c.before, UNKNOWN_WEIGHTS, c.why) for c in shown]
    return Outcome(tuple(shown), tuple(notes), unknown, resized=removal.resized)


def _living(captured: Captured, node: fx.Node, now: Mapping[str, fx.Node]) -> list[fx.Node]:
    """The node, or those that took its place, of the nodes `now` in the graph by name."""
    names = captured.moved.get(node.name)
    return [node] if names is None else [now[name] for name in names if name in now]
