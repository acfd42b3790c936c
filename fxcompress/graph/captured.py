"""A captured model: its graph in normal form, its facts, and the memory of what was done to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx


@dataclass(frozen=True)
class Example:
    """The example inputs a model was captured with. `kwargs` are inputs given by keyword (by placeholder name)."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every input tensor, in order."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Origin:
    """One entry of a node's provenance: which rule touched it, from where in the policy, and how."""

    verb: str
    place: str  # "edge.fxc:14:9", or "python" for a pass applied from Python
    line: str  # the policy line's text, or the pass's repr
    phase: str
    detail: str  # what it did to this node: "out_channels 64 -> 44"
    was: tuple[str, ...] = ()  # names of the nodes it came from, for a node the pass made


@dataclass
class Captured:
    """A model in normal form. Passes rewrite it in place; `copy()` first to keep the input.

    * parameterised operators are `call_module` nodes, everything else one call under one canonical name (`graph/ops.py`)
    * `concrete` is False for a skeleton: its weights are fake, and nothing may depend on their values
    * `node.meta["fxc"]` holds the node's `NodeFact` (`graph/facts.py`), refreshed by `refresh()`
    * `node.meta["origins"]` holds its provenance, a tuple of `Origin`
    """

    module: fx.GraphModule
    example: Example
    way: Literal["fx", "export"]
    model_name: str = ""
    concrete: bool = True
    moved: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name of a node that is gone -> its successors

    # The owner of capture completes: facts, graph, copy(), skeleton(), refresh(), replace(), nodes_named(), fingerprint()


Nodes = Iterable[fx.Node]
