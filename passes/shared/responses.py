"""What channels are on calibration data, measured where they are read: after the norm, the activation and the pooling
that stand between the layer that makes a channel and those that sum over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.graph.calibration import Calibration, Moments, Place
from fxcompress.graph.coupling import Coupling, Mask
from fxcompress.graph.coupling_flow import Consumed
from fxcompress.graph.ops import path_of
from fxcompress.passes.shared.criteria import Response, criterion_of
from fxcompress.passes.shared.layers import Ints

if TYPE_CHECKING:
    from fxcompress.graph.site import Site
    from fxcompress.passes.remove import Remove

Measured = Mapping[Place, Moments]


def places_of(coupling: Coupling, entry: Consumed, live: set[fx.Node]) -> list[Place]:
    """Where the channels that `entry` sums over come in: inputs of its node that depend on the data, and the dimension
    along which they lie. Empty where they arise inside of the node, as the heads of `nn.MultiheadAttention` do."""
    wanted = coupling.of(entry.labels)
    if not (wanted >= 0).any():
        return []
    found = []
    for source in entry.node.all_input_nodes:
        dims = coupling.flow.values[source]
        if source in live and isinstance(dims, tuple):
            found += [(source, place) for place, dim in enumerate(dims) if dim is not None
                      and len(dim) % len(wanted) == 0  # the labels of a grouped reader are those of one group
                      and bool((coupling.of(dim).reshape(-1, len(wanted)) == wanted).all())]
    return found


def live_nodes(coupling: Coupling) -> set[fx.Node]:
    """The nodes whose values depend on the model's inputs."""
    live: set[fx.Node] = set()
    for node in coupling.flow.nodes:
        if node.op == "placeholder" or any(source in live for source in node.all_input_nodes):
            live.add(node)
    return live


def measured_for(settings: Remove, coupling: Coupling, candidates: Mask, site: Site) -> Measured | None:
    """What `settings` have to know of the candidates' values on the calibration data; None without data, or where
    nothing asks for them. Raises as `measure` does."""
    if site.calibration is None or not coupling.captured.concrete:
        return None
    if not settings.compensates(site) and criterion_of(settings.by).needs != "response":
        return None
    return measure(coupling, candidates, site.calibration)


def measure(coupling: Coupling, candidates: Mask, data: Calibration) -> Measured:
    """The moments of every channel that may leave, at each place where one is read; one run over the data.

    Raises PlanError (FXC0570) where the data don't fit the model.
    """
    live = live_nodes(coupling)
    places = {place: None for entry in coupling.flow.consumed if candidates[_inside(coupling, entry)].any()
              for place in places_of(coupling, entry, live)}
    return data.moments(coupling.captured, places)


def _inside(coupling: Coupling, entry: Consumed) -> Ints:
    components = coupling.of(entry.labels)
    return components[components >= 0]


def responses_of(coupling: Coupling, measured: Measured, numbers: Ints) -> tuple[Response, ...]:
    """What criteria see of `measured`; `numbers` are those that components have in the scoring, -1 for none."""
    return tuple(_responses(coupling, measured, numbers))


def _responses(coupling: Coupling, measured: Measured, numbers: Ints) -> Iterator[Response]:
    for (node, dim), moments in measured.items():
        inside = coupling.of(coupling.flow.values[node][dim])
        where = np.where(inside >= 0, numbers[inside], -1)
        present, place, count = np.unique(where[where >= 0], return_inverse=True, return_counts=True)
        if len(present):
            chosen = torch.from_numpy(np.flatnonzero(where >= 0))
            mean, magnitude, square = (
                _means(value[chosen], torch.from_numpy(place), torch.from_numpy(count))
                for value in (moments.mean, moments.magnitude, moments.square))
            yield Response(path_of(node) or node.name, torch.from_numpy(present), mean, magnitude, square)


def _means(values: Tensor, place: Tensor, count: Tensor) -> Tensor:
    """The mean over the indices of each component."""
    return torch.zeros(len(count), dtype=values.dtype).index_add_(0, place, values) / count
