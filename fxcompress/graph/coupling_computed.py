"""Weights that a module computes from other parameters: `weight_norm` and `spectral_norm` (parametrizations).

Both norms run over a whole filter, so that its survivors change when one of its columns leaves: the removal is inexact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .coupling_flow import Dim, Dims, Flow


def held_by(flow: Flow, path: str, name: str) -> str | None:
    """The tensor that the parameter `name` of the module at `path` is computed from, of the same shape: itself for a
    plain one; None where that isn't known."""
    original = f"{path}.parametrizations.{name}.original"
    return next((found for found in (f"{path}.{name}", f"{original}1", original) if flow.has(found)), None)


def computed(flow: Flow, path: str, name: str, track: Iterable[int] | None) -> Dims | None:
    """Labels of a parameter that the current node's module computes; None where no rule is known."""
    base = f"{path}.parametrizations.{name}"
    if flow.has(f"{base}.original1") and flow.has(f"{base}.original0"):
        return _weight_norm(flow, base, track)
    if flow.has(f"{base}.original") and flow.has(f"{base}.0._u"):
        first = getattr(flow.captured.module.get_submodule(f"{base}.0"), "dim")  # noqa: B009 - for the type checker
        return _spectral_norm(flow, base, int(first), track)
    return None


def _weight_norm(flow: Flow, base: str, track: Iterable[int] | None) -> Dims:
    """`g · v / |v|` (Salimans and Kingma, "Weight Normalization", 2016): g has size 1 where |v| sums."""
    dims = list(flow.tensor(f"{base}.original1", track))
    for place, scale in enumerate(flow.tensor(f"{base}.original0", track)):
        if scale is None:
            flow.notice(dims[place], "has a weight normalised over it")
        else:
            dims[place] = flow.tie(dims[place], scale)
    return tuple(dims)


def _spectral_norm(flow: Flow, base: str, first: int, track: Iterable[int] | None) -> Dims:
    """`W / (uᵀ W v)` (Miyato et al., "Spectral Normalization", 2018), W seen as a matrix with `first` as its rows."""
    dims = flow.tensor(f"{base}.original", track)
    shape = flow.shape(f"{base}.original")
    columns = [place for place in range(len(dims)) if place != first]
    for dim in dims:
        flow.notice(dim, "has a weight normalised over it")
    flow.tie(dims[first], flow.tensor(f"{base}.0._u")[0])
    flow.tie(_merged([dims[place] for place in columns], [shape[place] for place in columns]),
             flow.tensor(f"{base}.0._v")[0])
    return dims


def _merged(dims: list[Dim], sizes: list[int]) -> Dim:
    """The one tracked dimension among `dims`, repeated as flattening all of them repeats it."""
    tracked = [place for place, dim in enumerate(dims) if dim is not None]
    if len(tracked) != 1:
        return None
    labels = dims[tracked[0]]
    assert labels is not None
    inner, outer = int(np.prod(sizes[tracked[0] + 1 :])), int(np.prod(sizes[: tracked[0]]))
    return np.tile(np.repeat(labels, inner), outer)
