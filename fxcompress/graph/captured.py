"""A captured model: its graph in normal form, its facts, and the memory of what was done to it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, fx, nn

from . import ops
from .facts import Facts, totals
from .fingerprint import fingerprint
from .ops import path_of
from .propagate import propagate
from .stamp import Stamp, stamp
from .tree import copy_module, meta, own

if TYPE_CHECKING:
    from .teacher import Teachers


@dataclass(frozen=True)
class Example:
    """The example inputs a model was captured with. `kwargs` are inputs given by keyword (by placeholder name)."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every input tensor, in order."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    @property
    def batch(self) -> int:
        """The batch size: the first dimension of the first tensor that has one, else 1."""
        return next((tensor.shape[0] for tensor in self.tensors() if tensor.dim()), 1)


@dataclass(frozen=True)
class Left:
    """Which indices of a dimension of a layer one removal took: `indices` in the numbering of the layer as it was
    captured, of `size`; `scores` are what the criterion `by` gave each, `least_kept` the least score that stayed."""

    what: str  # "out_channels", "in_features"
    size: int
    indices: tuple[int, ...]
    why: str  # "selected", "coupled to conv1 by add at resnet.py:102", "reads what left"
    by: str
    scores: tuple[float, ...]
    least_kept: float | None


@dataclass(frozen=True)
class Origin:
    """One entry of a node's provenance: which rule touched it, from where in the policy, and how."""

    verb: str
    place: str  # "edge.fxc:14:9", or "python" for a pass applied from Python
    line: str  # the policy line's text, or the pass's repr
    phase: str
    detail: str  # what it did to this node: "out_channels 64 -> 44"
    was: tuple[str, ...] = ()  # names of the nodes it came from, for a node the pass made
    left: Left | None = None  # which indices left, where a removal took some


@dataclass
class Captured:
    """A model in normal form. Passes rewrite it in place; `copy()` first to keep the input.

    * parameterised operators are `call_module` nodes, everything else one call under one canonical name
      (`graph/ops.py`)
    * `concrete` is False for a skeleton: its weights are fake (on the `meta` device), and nothing may depend on
      their values
    * `node.meta["fxc"]` holds the node's `NodeFact` (`graph/facts.py`), refreshed by `refresh()`
    * `node.meta["origins"]` holds its provenance, a tuple of `Origin`
    * `fixed_batch` says, where it isn't empty, why the graph only works for the example's batch size
    * `notes` are what a user should know about the capture: outputs left out, modes that aren't followed
    """

    module: fx.GraphModule
    example: Example
    way: Literal["fx", "export"]
    model_name: str = ""
    concrete: bool = True
    moved: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name of a node that is gone -> its successors
    notes: tuple[str, ...] = ()
    fixed_batch: str = ""
    teachers: Teachers | None = field(default=None, repr=False)  # what its policy's actions learn from
    _facts: Facts | None = field(default=None, repr=False)
    _code: list[object] = field(default_factory=list, repr=False)  # `code_of` what `module` was last compiled from
    _stamp: Stamp | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def graph(self) -> fx.Graph:
        """The graph of `module`."""
        return self.module.graph

    @property
    def facts(self) -> Facts:
        """Totals over the graph as of the last `refresh()`."""
        if self._facts is None:
            self._facts = totals(self.graph, self.module, self.example.batch)
        return self._facts

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that shapes are computed at: two, or one where the batch is fixed."""
        batch = self.example.batch
        return (batch,) if self.fixed_batch else (batch, 2 * batch)

    def copy(self) -> Captured:
        """A deep copy: its own graph and weights (shared weights stay shared), same node names and facts."""
        return self._copied(own)

    def skeleton(self) -> Captured:
        """The same graph with weights on the `meta` device: nothing is allocated. Free for one that is a skeleton
        already in memory, not in identity: its graph is a copy too."""
        return replace(self._copied(meta), concrete=False)

    def _copied(self, make: Callable[[Tensor], Tensor]) -> Captured:
        module = copy_module(self.module, make)
        return replace(self, module=module, moved=dict(self.moved), _code=code_of(module.graph))

    def refresh(self) -> None:
        """After a rewrite: drop dead nodes, check and recompile the graph, compute shapes and facts anew. Takes time
        linear in the nodes and computes on fakes only. Raises RewriteError (FXC0406) where a node can't be computed."""
        propagate(self)
        code = code_of(self.graph)
        if len(code) != len(self._code) or any(map(operator.is_not, code, self._code)):
            self.module.recompile()
            self._code = code
        self._facts = None
        self._stamp = stamp(self)

    def is_fresh(self) -> bool:
        """Whether nothing that facts depend on has changed since the last `refresh()`."""
        return self._stamp is not None and self._stamp == stamp(self)

    def replace(self, old: fx.Node, new: fx.Node, successors: Iterable[fx.Node] = ()) -> None:
        """Let `new` take the place of `old`: its users, path and provenance go over, `old` is erased and `moved`
        remembers its `successors` (by default `new` alone)."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        for key in ("origins", "path", "source"):
            if key in old.meta and key not in new.meta:
                new.meta[key] = old.meta[key]
        if old.op == "call_module" and new.op != "call_module":
            new.meta["path"] = path_of(old)
        self.graph.erase_node(old)
        self.moved[old.name] = tuple(node.name for node in successors) or (new.name,)

    def node(self, path: str) -> fx.Node:
        """The node called `path`, or the operator at module path `path`. Raises LookupError if there is none or
        several."""
        found = [n for n in self.graph.nodes if n.name == path]
        found = found or [n for n in self.graph.nodes if path_of(n) == path and n.op == "call_module"]
        found = found or [n for n in self.graph.nodes if path_of(n) == path and n.op == "call_function"]
        if len(found) != 1:
            raise LookupError(f"{len(found)} nodes at {path!r}")
        node: fx.Node = found[0]
        return node

    def nodes_named(self, names: Iterable[str]) -> tuple[fx.Node, ...]:
        """The nodes of these names in graph order, following `moved` for those that are gone."""
        wanted: set[str] = set()
        rest = list(names)
        while rest:
            name = rest.pop()
            if name not in wanted:
                wanted.add(name)
                rest.extend(self.moved.get(name, ()))
        return tuple(node for node in self.graph.nodes if node.name in wanted)

    def module_of(self, node: fx.Node) -> nn.Module:
        """The module that a `call_module` node calls. Raises LookupError for any other node."""
        return ops.module_of(node)

    def fingerprint(self) -> str:
        """A hash of the graph, the modules' settings and all shapes and dtypes, not of the weights' values."""
        return fingerprint(self)


def code_of(graph: fx.Graph) -> list[object]:
    """What the code of `graph` is written from. As long as these are the same objects, so is the code: setting an
    argument of a node makes new tuples."""
    return [part for node in graph.nodes for part in (node, node.name, node.target, node.args, node.kwargs)]


Nodes = Iterable[fx.Node]
