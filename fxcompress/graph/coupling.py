"""Channel coupling, exactly: which slices of which parameters must leave a model together.

`analyse` interprets the graph once (`coupling_flow.py`, rules in `rules/`) and joins equal labels with one call to
`scipy.sparse.csgraph.connected_components`. A component is the unit of removal. Its labels touch the model's inputs or
outputs, or an operator without a rule: then it can't be removed, and `barrier` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components
from torch import fx

from . import rules
from .captured import Captured
from .coupling_flow import Event, Flow, Labels, Produced, TensorLabels, run
from .coupling_forms import freedom, stuck
from .ops import arguments

Mask = npt.NDArray[np.bool_]

__all__ = ["Coupling", "Slice", "analyse", "rules"]


@dataclass(frozen=True)
class Slice:
    """One dimension of a parameter or buffer: the component of each index, -1 where it belongs to none."""

    owner: TensorLabels
    dim: int
    components: Labels

    @property
    def name(self) -> str:
        """The tensor's first name in the model."""
        return self.owner.names[0]


@dataclass
class Coupling:
    """The components of a graph. Arrays are indexed by component, `component` by label."""

    flow: Flow
    component: Labels
    count: int

    @property
    def captured(self) -> Captured:
        """The model that was analysed."""
        return self.flow.captured

    @cached_property
    def _by_label(self) -> Labels:
        """`component`, and a last entry for the label -1."""
        return np.append(self.component, -1)

    def of(self, labels: Labels) -> Labels:
        """The components of labels; -1 stays."""
        return self._by_label[labels]

    def touched(self, labels: Iterable[Labels]) -> Mask:
        """The components that any of `labels` belong to, as one truth value each."""
        mask = np.zeros(self.count + 1, dtype=np.bool_)
        for one in labels:
            mask[self._by_label[one]] = True
        return mask[:-1]

    def meets(self, mask: Mask, labels: Labels) -> bool:
        """Whether any of `labels` belongs to a component of `mask`."""
        return bool(mask[self.component[labels[labels >= 0]]].any())

    def _marked(self, events: list[tuple[Labels, Event]]) -> Labels:
        """For each component the number of the first event that touches it, -1 for none."""
        first = np.full(self.count, -1, dtype=np.int64)
        for place in range(len(events) - 1, -1, -1):
            labels = events[place][0]
            first[self.component[labels[labels >= 0]]] = place
        return first

    @cached_property
    def _barriers(self) -> Labels:
        return self._marked(self.flow.fixed)

    @cached_property
    def _notices(self) -> Labels:
        return self._marked(self.flow.noticed)

    @cached_property
    def barred(self) -> Mask:
        """Components that can't be removed."""
        barred: Mask = self._barriers >= 0
        return barred

    @cached_property
    def inexact(self) -> Mask:
        """Components whose removal a normalisation notices."""
        inexact: Mask = self._notices >= 0
        return inexact

    def barrier(self, component: int) -> Event | None:
        """What keeps a component in the model."""
        place = int(self._barriers[component])
        return self.flow.fixed[place][1] if place >= 0 else None

    def notice(self, component: int) -> Event | None:
        """What makes a component inexact."""
        place = int(self._notices[component])
        return self.flow.noticed[place][1] if place >= 0 else None

    @cached_property
    def slices(self) -> list[Slice]:
        """Every tracked dimension of every parameter and buffer."""
        found = [(owner, place, dim) for owner in self.flow.tensors.values()
                 for place, dim in enumerate(owner.dims) if dim is not None]
        labels, starts = end_to_end([dim for _, _, dim in found])
        components, ends = self.of(labels), (*starts[1:].tolist(), len(labels))
        return [Slice(owner, place, components[start:end])
                for (owner, place, _), start, end in zip(found, starts.tolist(), ends, strict=False)]

    @cached_property
    def produced(self) -> dict[fx.Node, list[Produced]]:
        """The channels each node makes."""
        found: dict[fx.Node, list[Produced]] = {}
        for entry in self.flow.produced:
            found.setdefault(entry.node, []).append(entry)
        return found

    @cached_property
    def signature(self) -> npt.NDArray[np.uint64]:
        """A number for each component, equal for those that take the same share of the same dimensions: removing one or
        another of them leaves tensors of the same shapes."""
        return self._hashed(lambda part: (part.name, part.dim))

    @cached_property
    def structure(self) -> npt.NDArray[np.uint64]:
        """A number for each component, equal for those that take as much of the same dimensions of the same parameters
        of modules of the same classes, wherever these are: of isomorphic substructures (Fang et al., "Isomorphic
        Pruning for Vision Models", 2024)."""
        root = self.captured.module

        def place(part: Slice) -> tuple[object, ...]:
            holder, _, name = part.name.rpartition(".")
            return type(root.get_submodule(holder)), name, part.dim

        return self._hashed(place)

    def _hashed(self, key: Callable[[Slice], object]) -> npt.NDArray[np.uint64]:
        """For each component the sum, over what it takes, of random 64-bit numbers, one a `key`."""
        numbers: dict[object, int] = {}
        each = np.array([numbers.setdefault(key(part), len(numbers)) for part in self.slices], dtype=np.int64)
        drawn = np.random.default_rng(0).integers(1, 2**63, size=len(numbers), dtype=np.uint64)
        sizes = [len(part.components) for part in self.slices]
        total = np.zeros(self.count + 1, dtype=np.uint64)
        np.add.at(total, end_to_end([part.components for part in self.slices])[0], np.repeat(drawn[each], sizes))
        return total[:-1]

    @cached_property
    def heads(self) -> Mask:
        """Components that are heads of an attention, or places in every head of it."""
        return self.touched(labels for labels, _ in self.flow.heads)

    def tying(self, one: Labels, other: Labels) -> Iterator[fx.Node]:
        """The operators on a shortest chain of ties between `one` and `other` (labels of two layers), those next to
        `other` first. Trees of one start are kept, so that asking for many others of one layer stays linear."""
        shared = np.intersect1d(self.of(one[one >= 0]), self.of(other[other >= 0]))
        if len(shared):
            start = int(one[self.of(one) == shared[0]][0])
            tree = self._trees.get(start) or self._trees.setdefault(start, self._tree(int(shared[0]), start))
            label = int(other[self.of(other) == shared[0]][0])
            while label in tree:
                label, place = tree[label]
                yield self.flow.nodes[place]

    @cached_property
    def _trees(self) -> dict[int, dict[int, tuple[int, int]]]:
        return {}

    def _tree(self, component: int, start: int) -> dict[int, tuple[int, int]]:
        """For each label of a component the one before it on the way from `start`, and the node that ties them."""
        begin, end = np.searchsorted(self._edges[3], [component, component + 1])
        a, b, nodes = (array[begin:end] for array in self._edges[:3])
        labels, flat = np.unique(np.concatenate([a, b, [start]]), return_inverse=True)
        x, y = flat[: len(a)], flat[len(a) : 2 * len(a)]
        size = len(labels)
        graph = coo_matrix((np.ones(len(a)), (x, y)), shape=(size, size)).tocsr()
        order, before = breadth_first_order(graph, int(flat[-1]), directed=False)
        by_pair = {(int(p), int(q)): int(n) for p, q, n in zip(x, y, nodes, strict=True)}
        return {int(labels[i]): (int(labels[j]), by_pair.get((i, j), by_pair.get((j, i), 0)))
                for i, j in ((int(i), int(before[i])) for i in order[1:])}

    @cached_property
    def _edges(self) -> tuple[Labels, Labels, Labels, Labels]:
        """Every tie as (label, label, number of the node that ties them, component), sorted by component."""
        a, b = _edges(self.flow)
        counts = np.array([(tie[2], len(tie[0])) for tie in self.flow.ties], dtype=np.int64).reshape(-1, 2)
        nodes = np.repeat(counts[:, 0], counts[:, 1])
        order = np.argsort(self.component[a], kind="stable")
        return a[order], b[order], nodes[order], self.component[a[order]]


def end_to_end(arrays: Sequence[Labels]) -> tuple[Labels, Labels]:
    """Arrays in one, and where each of them starts in it."""
    if not arrays:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.concatenate(arrays), np.cumsum([0, *map(len, arrays[:-1])])


def _edges(flow: Flow) -> tuple[Labels, Labels]:
    """Every tie as (label, label)."""
    return end_to_end([tie[0] for tie in flow.ties])[0], end_to_end([tie[1] for tie in flow.ties])[0]


def analyse(captured: Captured, split: str = "heads", flipped: frozenset[str] | None = None) -> Coupling:
    """The coupling of `captured`, in time linear in its nodes and channels.

    `split` says which axis of a head split stays removable: whole "heads", or the same place in every head
    ("head_dim"). Other grouped operators take the form that leaves more to remove; where that is known, `flipped` are
    the names of the nodes that don't take their first one. Never raises for want of a rule.
    """
    coupling = _interpreted(captured, split, flipped or frozenset())
    nodes = stuck(coupling) if flipped is None else []
    if not nodes:
        return coupling
    other = _interpreted(captured, split, frozenset(node.name for node in nodes))
    better = frozenset(node.name for node in nodes if freedom(other, node) > freedom(coupling, node))
    if len(better) == len(nodes):
        return other
    return _interpreted(captured, split, better) if better else coupling


def _interpreted(captured: Captured, split: str, flipped: frozenset[str]) -> Coupling:
    flow = Flow(captured, split, flipped)
    run(flow, arguments)
    a, b = _edges(flow)
    graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(flow.count, flow.count))
    count, component = connected_components(graph, directed=False) if flow.count else (0, np.zeros(0))
    return Coupling(flow, component.astype(np.int64), int(count))
