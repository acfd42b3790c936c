"""The helper `coupled(s)` of selectors."""

from __future__ import annotations

import numpy as np
from torch import fx

from .captured import Captured
from .coupling import analyse


def coupled(captured: Captured, nodes: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """`nodes` and the operators of `captured` some of whose output channels must leave together with theirs."""
    coupling = analyse(captured)
    touched = np.zeros(coupling.count, dtype=np.bool_)
    for node in nodes:
        for made in coupling.produced.get(node, []):
            touched |= coupling.touched(made.labels)
    tied = (node for node, entries in coupling.produced.items()
            if any((touched & coupling.touched(made.labels)).any() for made in entries))
    return nodes.union(tied)
