"""What the facts of a graph were computed from, so that facts that are current needn't be computed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from .ops import submodule

if TYPE_CHECKING:
    from .captured import Captured

Stamp = tuple[object, ...]

_OF_ANY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = frozenset((int, float, bool, str, tuple, type(None)))


def stamp(captured: Captured) -> Stamp:
    """A value that stays equal as long as `captured.refresh()` would change nothing: it holds the nodes in order with
    their arguments and facts, and the settings and tensors' shapes of the modules they call. Takes a small part of the
    time of a refresh."""
    nodes = captured.graph.nodes
    return (captured.batches, id(captured.example),
            [(node, node.target, node.args, node.kwargs, node.meta.get("fxc")) for node in nodes],
            [held for node in nodes for held in _held(node, captured.module)])


def _held(node: fx.Node, root: nn.Module) -> Iterator[object]:
    if node.op == "call_module":
        called = submodule(root, str(node.target))
        for module in called.modules() if called._modules else (called,):
            yield id(module)
            for name, value in vars(module).items():
                if name not in _OF_ANY_MODULE:
                    yield name, value if type(value) in _PLAIN else id(value)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                yield _shape(tensor)
    elif node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        yield _shape(getattr(submodule(root, owner), name))


def _shape(value: Any) -> object:
    return (id(value), value.shape, value.dtype, value.device) if isinstance(value, Tensor) else id(value)
