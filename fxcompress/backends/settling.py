"""After kernels were put beside the layers that they replace: they take their places, and what nothing reads goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import fx

from ..graph.captured import Captured
from ..graph.ops import module_of
from ..graph.tree import named_tensors


def settle(captured: Captured, kernels: Iterable[fx.Node]) -> None:
    """Each of `kernels`, put into its layer's module, takes the place of that where nothing else in it is used, and
    what nothing reads any more goes: modules, parameters and buffers of those that stay."""
    root, graph = captured.module, captured.graph
    inside: Counter[str] = Counter()  # how many calls and reads there are at each path, or below it
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = str(node.target).split(".")
            inside.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    for node in kernels:
        path = str(node.target).rpartition(".")[0]
        if inside[path] == 1:
            owner, _, leaf = path.rpartition(".")
            setattr(root.get_submodule(owner), leaf, module_of(node))
            node.target = path
    root.delete_all_unused_submodules()
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in named_tensors(root).all:
        path, _, leaf = name.rpartition(".")
        parts = path.split(".")
        if name not in read and not any(".".join(parts[:length]) in called for length in range(1, len(parts) + 1)):
            delattr(root.get_submodule(path), leaf)
