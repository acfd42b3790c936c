"""The ends of pairs: where in a graph the value is that a pair names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcompress.diagnostics import nearest
from fxcompress.graph.captured import Captured
from fxcompress.graph.distilled import is_control, is_distillation, result_of
from fxcompress.graph.ops import path_of
from fxcompress.policy.words import OUTPUT, quoted

USUAL = ("logits", "out")  # what a model calls the part of its result that matters, where it gives several


@dataclass(frozen=True)
class Missed:
    """Why an end names no value, and what to do."""

    reason: str
    help: str
    notes: tuple[str, ...] = ()


def find(captured: Captured, end: str) -> fx.Node | Missed:
    """The node whose value `end` names: `output`, `output.KEY`, a node's name or a module's path."""
    if end == OUTPUT or (end.startswith(f"{OUTPUT}.") and not _is_there(captured, end)):
        return _of_result(result_of(captured.graph), end)
    nodes = _computed(captured.graph)
    for node in nodes:
        if node.name == end and path_of(node) != end:
            return node
    inside = [node for node in nodes if path_of(node) == end or path_of(node).startswith(f"{end}.")]
    leaving = [node for node in inside if any(user not in inside for user in node.users)]
    if len(leaving) == 1:
        return leaving[0]
    if leaving:
        return Missed(f"`{end}` gives {len(leaving)} values", f"name a node: {quoted(node.name for node in leaving)}")
    return _unknown(captured, end)


def _computed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that depend on the model's inputs, in graph order, without those of a distillation."""
    live: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        if is_control(node) or is_distillation(node) or node.op == "output":
            continue
        if node.op == "placeholder" or any(source in live for source in node.all_input_nodes):
            live.add(node)
            found.append(node)
    return found


def _is_there(captured: Captured, end: str) -> bool:
    return any(node.name == end or (path_of(node) + ".").startswith(f"{end}.") for node in captured.graph.nodes)


def _of_result(result: Any, end: str) -> fx.Node | Missed:
    for key in end.split(".")[1:]:
        parts = _parts(result)
        if key not in parts:
            return Missed(f"the model's result has no `{key}`", f"its parts are {quoted(parts)}" if parts else
                          "it is one tensor: write `output`")
        result = parts[key]
    if isinstance(result, fx.Node):
        return result
    parts = {key: value for key, value in _parts(result).items() if isinstance(value, fx.Node)}
    usual: list[fx.Node] = [parts[key] for key in USUAL if key in parts] or list(parts.values())
    if len(parts) == 1 or any(key in parts for key in USUAL):
        return usual[0]
    return Missed("the model gives several values", f"say which: {quoted(f'{end}.{key}' for key in parts)}")


def _parts(result: Any) -> Mapping[str, Any]:
    if isinstance(result, Mapping):
        return {str(key): value for key, value in result.items()}
    return {str(place): value for place, value in enumerate(result)} if isinstance(result, tuple | list) else {}


def _unknown(captured: Captured, end: str) -> Missed:
    names = known_ends(captured)
    near = nearest(end, names, 3)
    return Missed(f"there is no module or node `{end}`", f"did you mean {quoted(near)}?" if near else
                  "name a module by its path, a node by its name, or `output`")


def known_ends(captured: Captured) -> Iterable[str]:
    """Every path and node's name that `find` may find."""
    found: dict[str, None] = {}
    for node in _computed(captured.graph):
        path = path_of(node)
        while path:
            found[path] = None
            path = path.rpartition(".")[0]
        found[node.name] = None
    return found
