"""One hash for a captured graph: two captures of the same architecture agree, whatever their weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from .modules import MODULES, leaf_of
from .ops import kind_of

if TYPE_CHECKING:
    from .captured import Captured


def fingerprint(captured: Captured) -> str:
    """SHA-256, in hexadecimal, over kinds, targets, arguments, shapes and dtypes of all nodes, settings of their
    modules and shapes of all weights."""
    digest = hashlib.sha256()
    places = {node: place for place, node in enumerate(captured.graph.nodes)}
    for node in captured.graph.nodes:
        digest.update(_line(captured, node, places).encode())
    for name, tensor in captured.module.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    return digest.hexdigest()


def _line(captured: Captured, node: fx.Node, places: dict[fx.Node, int]) -> str:
    fact = node.meta.get("fxc")
    words: list[Any] = [kind_of(node), node.target if isinstance(node.target, str) and node.op != "placeholder" else "",
                        fx.map_arg((node.args, dict(node.kwargs)), lambda other: f"%{places[other]}")]
    if fact is not None:
        words += [fact.shape, fact.dtype, fact.dynamic]
    if node.op == "call_module":
        module = captured.module_of(node)
        found = leaf_of(type(module))
        settings = MODULES[found[0]].settings if found is not None else ()
        words.append({name: getattr(module, name) for name in settings
                      if not isinstance(getattr(module, name), Tensor)})
    return f"{words}\n"
