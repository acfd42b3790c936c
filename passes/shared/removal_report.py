"""What `remove` says of its work: each layer before and after and why, ratios that weren't reached, barriers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from fxcompress.graph.captured import Left
from fxcompress.graph.coupling import Coupling, Mask
from fxcompress.graph.coupling_flow import Labels
from fxcompress.graph.ops import kind_of, path_of
from fxcompress.graph.provenance import removed, survivors
from fxcompress.graph.site import Change
from fxcompress.passes.shared.layers import Ints, Layer, owners_of
from fxcompress.passes.shared.ranking import Scores

if TYPE_CHECKING:
    from fxcompress.passes.remove import Remove

_PARAMETERISED = ("conv", "linear", "batchnorm", "layernorm", "groupnorm", "embedding", "parameter", "instancenorm")


_READS, _FOLLOWS = "reads what left", "follows its input"
_FOLLOWING = (_READS, _FOLLOWS)


@dataclass(frozen=True)
class Shrunk:
    """One dimension of a layer that gets smaller: `components`: one entry an index; `gone`: indices that leave."""

    node: fx.Node
    change: Change
    components: Labels
    gone: Ints


def place_of(node: fx.Node) -> str:
    """`add at resnet.py:102`, or the operator with its path where the source isn't known."""
    kind, source = kind_of(node), getattr(node.meta.get("fxc"), "source", "") or ""
    if kind == "output":
        return "the model"
    return f"{kind} at {source.split(' ')[0]}" if source else f"{kind} ({path_of(node) or node.name})"


def coupled_reasons(coupling: Coupling, layers: list[Layer], others: list[Layer]) -> list[str]:
    """For each of `others`, `coupled to conv1 by add at resnet.py:102`: the selected layer that it is tied to, and the
    operator next to it that ties them."""
    selected = [layer for layer in layers if layer.selected]
    owner = owners_of(selected, coupling.count)
    reasons = []
    for layer in others:
        owners = owner[layer.present]
        owners = owners[owners >= 0]
        first = selected[int(owners.min())] if len(owners) else None
        chain = coupling.tying(first.made.labels, layer.made.labels) if first else iter(())
        joint = next((node for node in chain if not kind_of(node).startswith(_PARAMETERISED)), None)
        tie = f" by {place_of(joint)}" if joint is not None else ""
        reasons.append(f"coupled to {first.path}{tie}" if first else "coupled to what is selected")
    return reasons


def blocked(coupling: Coupling, layers: list[Layer], wanted: Mask) -> list[str]:
    """One line for each barrier that keeps channels of selected layers in the model."""
    lines: dict[str, list[str]] = {}
    barred = wanted & coupling.barred
    for layer in layers:
        inside = layer.present[barred[layer.present]] if layer.selected else layer.present[:0]
        if len(inside):
            event = coupling.barrier(int(inside.min()))
            assert event is not None
            lines.setdefault(f"{place_of(event.node)} {event.reason}", []).append(layer.path)
    return [f"{_names(paths)} can't shrink: {reason}" for reason, paths in lines.items()]


def _names(paths: list[str]) -> str:
    paths = list(dict.fromkeys(paths))
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def shortfalls(settings: Remove, coupling: Coupling, layers: list[Layer], wanted: Mask, doomed: Mask) -> list[str]:
    """The barriers met, and each selected layer of which less left than asked for, by more than rounding."""
    notes = blocked(coupling, layers, wanted)
    if settings.scope != "local":
        return notes
    free = wanted & ~coupling.barred
    for layer in layers:
        speaks = layer.present[free[layer.present]] if layer.selected else layer.present[:0]
        left = int(np.count_nonzero(doomed[speaks]))
        if len(speaks) and left <= settings.share * len(speaks) - max(1.0, 0.02 * len(speaks)):
            each = len(speaks) / len(np.unique(speaks))
            units = [f"its channels leave {each:g} at a time, with those of other layers"] if each > 1 else []
            reason = " or ".join(_limits(settings) + units) or "what it is coupled to doesn't shrink further"
            got = f"{left / len(speaks):.0%} removed of {settings.share:.0%} asked"
            notes.append(f"{layer.path}: {got}, because of {reason}")
    return notes


def _limits(settings: Remove) -> list[str]:
    limits = []
    if settings.align > 1:
        limits.append(f"align = {settings.align}")
    if settings.min_channels > 1:
        limits.append(f"min_channels = {settings.min_channels}")
    if settings.max_ratio < settings.share:
        limits.append(f"max_ratio = {settings.max_ratio:.0%}")
    if settings.couple == "skip":
        limits.append("couple = skip")
    return limits


def changes_of(coupling: Coupling, layers: list[Layer], doomed: Mask,
               kinds: Mapping[fx.Node, str]) -> list[Shrunk]:
    """What gets smaller, in graph order: layers that make fewer channels, that read fewer, and norms between."""
    found: list[Shrunk] = []
    seen: set[tuple[str, str]] = set()
    leaving = np.append(doomed, False)  # the last entry is that of the component -1

    def add(node: fx.Node, path: str, what: str, labels: Labels, why: str) -> None:
        if (path, what) in seen:
            return
        components = coupling.of(labels)
        gone = leaving[components].nonzero()[0]
        if len(gone):
            seen.add((path, what))
            size = len(components)
            change = Change(path, kinds[node], what, str(size), str(size - len(gone)), why)
            found.append(Shrunk(node, change, components, gone))

    shrinking = [layer for layer in layers if layer.inside(doomed)]
    others = [layer for layer in shrinking if not layer.selected and not layer.follows]
    reasons = dict(zip(map(id, others), coupled_reasons(coupling, layers, others), strict=True))
    for layer in shrinking:
        why = reasons.get(id(layer), "selected" if layer.selected else _FOLLOWS)
        add(layer.node, layer.path, layer.what, layer.made.labels, why)
    for entry in coupling.flow.consumed:
        if isinstance(entry.target, str) and not kinds[entry.node].startswith(("lstm", "gru", "rnn")):
            what = "in_features" if kinds[entry.node] == "linear" else "in_channels"
            path = path_of(entry.node) if entry.node.op == "call_module" else entry.target.rpartition(".")[0]
            add(entry.node, path, what, entry.labels, _READS)
    for node in coupling.flow.nodes:
        if node.op == "call_module" and "norm" in kinds[node] and coupling.flow.has(f"{node.target}.weight"):
            for labels in coupling.flow.tensor(f"{node.target}.weight")[:1]:
                if labels is not None:
                    add(node, str(node.target), "num_features", labels, _FOLLOWS)
    order = coupling.flow.index
    return sorted(found, key=lambda shrunk: order[shrunk.node])


def left_of(shrunk: Shrunk, by: str, scores: Scores | None) -> Left:
    """Which of its indices leave, in the numbering of the captured model, and what they scored (see `rounded`) against
    those that stay; of a layer that only reads what left, or norms it, just which."""
    change, components, gone = shrunk.change, shrunk.components, shrunk.gone
    earlier = sum(len(left.indices) for left in removed(shrunk.node, change.what))
    numbers = survivors(shrunk.node, change.what, len(components))[gone] if earlier else gone
    given: tuple[float, ...] = ()
    least = None
    if scores is not None and change.why not in _FOLLOWING:
        given = tuple(scores[components[gone]].tolist())
        stays = np.delete(components, gone)
        kept = scores[stays[stays >= 0]]
        kept = kept[np.isfinite(kept)]
        least = float(kept.min()) if len(kept) else None
    return Left(change.what, len(components) + earlier, tuple(numbers.tolist()), change.why, by, given, least)


def rounded(scores: Scores) -> Scores:
    """Scores to six digits, which is what a person may want to see."""
    with np.errstate(divide="ignore"):
        digits = 5 - np.floor(np.log10(np.abs(scores)))
    unit = 10.0 ** np.abs(np.where(np.isfinite(digits), digits, 0))
    return np.where(digits >= 0, np.round(scores * unit) / unit, np.round(scores / unit) * unit)
