"""What `remove` works on: the layers that make channels, the groups of components that are alike, and how layers are
tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import fx

from fxcompress.graph.coupling import Coupling, Mask
from fxcompress.graph.coupling_flow import Labels, Produced
from fxcompress.graph.ops import kind_of, path_of

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """Channels one node makes. `components` has one entry a channel, -1 where it can't leave."""

    node: fx.Node
    made: Produced
    components: Labels
    selected: bool

    @cached_property
    def present(self) -> Ints:
        """The components of the channels that can leave."""
        return self.components[self.components >= 0]

    @cached_property
    def path(self) -> str:
        """The path of the module that holds the weights, or the node's name where there is none."""
        holder = self.made.weights[0][0].rpartition(".")[0] if self.made.weights else ""
        return (path_of(self.node) if self.node.op == "call_module" else holder) or self.node.name

    @property
    def follows(self) -> bool:
        """Whether it only carries its input's channels on, one by one."""
        return self.made.follows

    @property
    def what(self) -> str:
        """How a person calls these channels."""
        kind = kind_of(self.node)
        if kind == "linear":
            return "out_features"
        if kind == "multihead_attention":
            return "inner width" if self.made.weights[0][0].endswith("proj_weight") else "out_features"
        return {"embedding": "embedding_dim", "lstm": "hidden_size", "gru": "hidden_size", "rnn": "hidden_size"}.get(
            kind, "out_channels")

    def inside(self, mask: Mask) -> bool:
        """Whether any of its channels belongs to the components of `mask`."""
        return bool(mask[self.present].any())


def layers_of(coupling: Coupling, selected: Sequence[fx.Node]) -> list[Layer]:
    """Every layer of the model, in graph order."""
    chosen = set(selected)
    return [Layer(made.node, made, coupling.of(made.labels), made.node in chosen) for made in coupling.flow.produced]


def mask_of(layers: Sequence[Layer], count: int) -> Mask:
    """The components that any of `layers` makes."""
    mask = np.zeros(count, dtype=np.bool_)
    for layer in layers:
        mask[layer.present] = True
    return mask


def owners_of(layers: Sequence[Layer], count: int) -> Ints:
    """For each component the number of the first of `layers` that makes it, -1 for none."""
    owner = np.full(count, -1, dtype=np.int64)
    for number in range(len(layers) - 1, -1, -1):
        owner[layers[number].present] = number
    return owner


def counted(numbers: Ints) -> list[tuple[int, int]]:
    """Each of some numbers, from the smallest, and how often it is there."""
    if not len(numbers):
        return []
    low, high = int(numbers.min()), int(numbers.max())
    if high - low > 4 * len(numbers):
        return [(int(n), int(count)) for n, count in zip(*np.unique(numbers, return_counts=True), strict=True)]
    return [(low + place, count) for place, count in enumerate(np.bincount(numbers - low).tolist()) if count]


@dataclass
class Groups:
    """Candidates sorted into groups of one signature, of which any is as good as another for the shapes, and groups
    that share a layer into clusters."""

    coupling: Coupling
    layers: list[Layer]
    candidates: Mask

    @cached_property
    def of(self) -> Ints:
        """The group of each component, -1 for those that aren't candidates. Groups are numbered in graph order."""
        group = np.full(self.coupling.count, -1, dtype=np.int64)
        members = np.flatnonzero(self.candidates)
        _, first, inverse = np.unique(self.coupling.signature[members], return_index=True, return_inverse=True)
        group[members] = np.argsort(np.argsort(first))[inverse]
        return group

    @cached_property
    def members(self) -> list[Ints]:
        """The components of each group."""
        order = np.argsort(self.of, kind="stable")
        order = order[self.of[order] >= 0]
        counts = np.bincount(self.of[order]) if len(order) else np.zeros(0, dtype=np.int64)
        return np.split(order, np.cumsum(counts)[:-1]) if len(counts) else []

    @cached_property
    def structures(self) -> list[list[int]]:
        """The groups, by number, those of one structure together; in order of their first group."""
        found: dict[int, list[int]] = {}
        for group, members in enumerate(self.members):
            found.setdefault(int(self.coupling.structure[members[0]]), []).append(group)
        return list(found.values())

    @cached_property
    def shares(self) -> list[dict[int, int]]:
        """For each layer its groups, and how many of its channels one component of the group takes."""
        shares: list[dict[int, int]] = []
        for layer in self.layers:
            inside = self.of[layer.present]
            shares.append({group: count // len(self.members[group]) for group, count in counted(inside[inside >= 0])})
        return shares

    @cached_property
    def clusters(self) -> list[list[int]]:
        """Groups that meet in a layer, together; in order of their first group."""
        parent = list(range(len(self.members)))

        def root(place: int) -> int:
            while parent[place] != place:
                parent[place] = parent[parent[place]]
                place = parent[place]
            return place

        for share in self.shares:
            ends = [root(group) for group in share]
            for end in ends[1:]:
                parent[root(end)] = root(ends[0])
        found: dict[int, list[int]] = {}
        for group in range(len(parent)):
            found.setdefault(root(group), []).append(group)
        return list(found.values())

    @cached_property
    def in_cluster(self) -> list[list[int]]:
        """The layers of each cluster, by number."""
        place = {group: number for number, cluster in enumerate(self.clusters) for group in cluster}
        found: list[list[int]] = [[] for _ in self.clusters]
        for number, share in enumerate(self.shares):
            for cluster in dict.fromkeys(place[group] for group in share):
                found[cluster].append(number)
        return found
