"""Operators that allow one of two axes to shrink: which of them to turn to the other.

The rules choose from what is near. Where the choice leaves nothing of a dimension to remove (all of it is barred, or
leaves at once), or only inexactly, the other may do better: groups in place of the offsets in each, and the reverse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from .coupling_flow import tracked
from .ops import arguments

if TYPE_CHECKING:
    from .coupling import Coupling

Freedom = tuple[int, bool]  # how much can leave (nothing, all at once, some), and whether exactly
FREE: Freedom = (2, True)


def stuck(coupling: Coupling) -> list[fx.Node]:
    """The operators whose input can't shrink as it should. Attention isn't among them: its axis is asked for."""
    return [node for node, form in coupling.flow.grouped.items() if form != "heads" and freedom(coupling, node) < FREE]


def freedom(coupling: Coupling, node: fx.Node) -> Freedom:
    """What can leave of the input of `node`."""
    labels = tracked(coupling.flow.values[arguments(node)["input"]])
    if not labels:
        return FREE
    components = np.unique(coupling.of(np.concatenate(labels)))
    components = components[components >= 0]
    free = components[~coupling.barred[components]]
    exact = coupling.flow.grouped.get(node) != "split" or not len(free) or not coupling.inexact[free].all()
    return min(len(free), 2), bool(exact)
