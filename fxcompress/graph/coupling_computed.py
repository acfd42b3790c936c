"""Weights that a module computes from other parameters: `weight_norm` and `spectral_norm`, as parametrizations and as
the hooks of older models.

Both norms run over a whole filter, so that its survivors change when one of its columns leaves: the removal is inexact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

if TYPE_CHECKING:
    from .coupling_flow import Dim, Dims, Flow


def held_by(flow: Flow, path: str, name: str) -> str | None:
    """The tensor that the parameter `name` of the module at `path` is computed from, of the same shape: itself for a
    plain one; None where that isn't known."""
    whole, original = f"{path}.{name}", f"{path}.parametrizations.{name}.original"
    names = [whole, f"{original}1", original, f"{whole}_orig", f"{whole}_v"]
    return next((found for found in names if flow.has(found)), None)


def computed(flow: Flow, path: str, name: str, track: Iterable[int] | None) -> Dims | None:
    """Labels of a parameter that the current node's module computes; None where no rule is known."""
    base, whole = f"{path}.parametrizations.{name}", f"{path}.{name}"
    if flow.has(f"{base}.original1") and flow.has(f"{base}.original0"):
        return _weight_norm(flow, f"{base}.original1", f"{base}.original0", track)
    if flow.has(f"{base}.original") and flow.has(f"{base}.0._u"):
        first = getattr(flow.captured.module.get_submodule(f"{base}.0"), "dim")  # noqa: B009 - for the type checker
        return _spectral_norm(flow, f"{base}.original", f"{base}.0._", int(first), track)
    for hook in _hooks(flow.captured.module.get_submodule(path)):
        if hook.name == name and isinstance(hook, WeightNorm):
            return _weight_norm(flow, f"{whole}_v", f"{whole}_g", track)
        if hook.name == name and isinstance(hook, SpectralNorm):
            return _spectral_norm(flow, f"{whole}_orig", f"{whole}_", hook.dim, track)
    return None


def _hooks(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    """What the older `torch.nn.utils.weight_norm` and `spectral_norm` put before a module's forward."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm)]


def compute_again(module: nn.Module) -> None:
    """Bring the weights that hooks compute, and hold beside the parameters, in line with these."""
    for hook in _hooks(module):
        again = (hook.compute_weight(module) if isinstance(hook, WeightNorm)
                 else hook.compute_weight(module, do_power_iteration=False))
        setattr(module, hook.name, again)


def _weight_norm(flow: Flow, direction: str, scale: str, track: Iterable[int] | None) -> Dims:
    """`g · v / |v|` (Salimans and Kingma, "Weight Normalization", 2016): g has size 1 where |v| sums."""
    dims = list(flow.tensor(direction, track))
    for place, along in enumerate(flow.tensor(scale, track) or (None,) * len(dims)):
        if along is None:
            flow.notice(dims[place], "has a weight normalised over it")
        else:
            dims[place] = flow.tie(dims[place], along)
    return tuple(dims)


def _spectral_norm(flow: Flow, name: str, vector: str, first: int, track: Iterable[int] | None) -> Dims:
    """`W / (uᵀ W v)` (Miyato et al., "Spectral Normalization", 2018), W seen as a matrix with `first` as its rows."""
    dims = flow.tensor(name, track)
    shape = flow.shape(name)
    columns = [place for place in range(len(dims)) if place != first]
    for dim in dims:
        flow.notice(dim, "has a weight normalised over it")
    flow.tie(dims[first], flow.tensor(f"{vector}u")[0])
    flow.tie(_merged([dims[place] for place in columns], [shape[place] for place in columns]),
             flow.tensor(f"{vector}v")[0])
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
