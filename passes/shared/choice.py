"""Which components leave: chosen by a ranking, or known from before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxcompress.graph.coupling import Coupling, Mask
from fxcompress.graph.site import Cuts
from fxcompress.passes.shared.ranking import Scores


@dataclass(frozen=True)
class Choice:
    """The components that leave, what each scored (None where it isn't known any more), and what is to be noted."""

    doomed: Mask
    scores: Scores | None = None
    notes: tuple[str, ...] = ()


def repeated(coupling: Coupling, kept: Mapping[str, Cuts]) -> Choice:
    """The choice that left `kept` of each tensor: the components of which nothing was kept."""
    doomed = np.zeros(coupling.count, dtype=np.bool_)
    stays = np.zeros(coupling.count, dtype=np.bool_)
    for part in coupling.slices:
        cuts = next((kept[name] for name in part.owner.names if name in kept), ())
        left = next((indices.cpu().numpy() for dim, indices in cuts if dim == part.dim), None)
        inside = np.ones(len(part.components), dtype=np.bool_)
        if left is not None:
            gone = np.delete(part.components, left)
            doomed[gone[gone >= 0]] = True
            inside[:] = False
            inside[left] = True
        staying = part.components[inside]
        stays[staying[staying >= 0]] = True
    return Choice(doomed & ~stays)
