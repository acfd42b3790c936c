"""What a removal asks of the graph's constants: the registry of operators that hold sizes, and their view of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from .coupling_flow import Dim, Dims, Flow, Labels
from .ops import OPS, arguments, op_of

Kept = npt.NDArray[np.bool_]
Resize = Callable[["Edit", fx.Node, Mapping[str, Any]], None]

RESIZES: dict[str, Resize] = {}


def resize(*kinds: str) -> Callable[[Resize], Resize]:
    """Decorator: how the constants of the canonical operators `kinds` follow a removal."""

    def register(function: Resize) -> Resize:
        RESIZES.update(dict.fromkeys(kinds, function))
        return function

    return register


@dataclass
class Edit:
    """The labels of a graph, and which of them leave (`gone`, one truth value per label). Rules write what they can't
    write into the graph itself to `modules`."""

    flow: Flow
    gone: Kept
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)  # attributes of modules that change, by path
    later: list[Callable[[], None]] = field(default_factory=list)  # rewrites that replace nodes, run last
    _kept: dict[int, tuple[Labels, Kept | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What stays: an entry for each label, and a last one for the label -1."""
        self._stays = np.append(~self.gone, True)

    def kept(self, dim: Dim) -> Kept | None:
        """Which indices of a dimension stay; None if all do."""
        if dim is None:
            return None
        known = self._kept.get(id(dim))
        if known is None:
            mask: Kept = self._stays[dim]
            whole = np.count_nonzero(mask) == len(mask)
            known = self._kept[id(dim)] = dim, None if whole else mask  # holds `dim`, so that its id stays its own
        return known[1]

    def changed(self, dim: Dim) -> bool:
        """Whether a dimension loses an index."""
        return self.kept(dim) is not None

    def before(self, dim: Dim, place: int, size: int) -> int:
        """How many of the first `place` indices (of `size`) stay: where that boundary is afterwards."""
        mask = self.kept(dim)
        place = min(max(place + size, 0) if place < 0 else place, size)
        return place if mask is None else int(mask[:place].sum())

    def size(self, dim: Dim, size: int) -> int:
        """What remains of a dimension of `size`."""
        mask = self.kept(dim)
        return size if mask is None else int(mask.sum())

    def of(self, value: object) -> Dims:
        """Labels of a node's tensor value."""
        return self.flow.of(value)

    def parts(self, node: fx.Node) -> list[Dims]:
        """Labels of the tensors of a node that gives several."""
        value = self.flow.values[node]
        return value if isinstance(value, list) else [value]

    def set(self, node: fx.Node, **values: Any) -> None:
        """Give arguments of a canonical call new values."""
        op = op_of(node)
        assert op is not None
        node.args, node.kwargs = op.normal({**arguments(node), **values})

    def become(self, node: fx.Node, kind: str, **values: Any) -> None:
        """Turn a node into a call of another canonical operator."""
        op = OPS[kind]
        node.target = op.target
        node.args, node.kwargs = op.normal(op.bind((), values))

    def sizes(self, node: fx.Node, given: tuple[Any, ...], dims: Dims) -> tuple[Any, ...] | None:
        """`given` sizes of a result with labels `dims`, shrunk; None if none changes. A -1 or a node stays."""
        offset = len(dims) - len(given)
        new = tuple(self.size(dims[offset + place], size) if isinstance(size, int) and size > 1 else size
                    for place, size in enumerate(given))
        return new if new != tuple(given) else None


def kept_of(labels: Labels, gone: Kept) -> Kept:
    """Which indices stay, for one label array."""
    kept: Kept = ~gone[labels] | (labels < 0)
    return kept
