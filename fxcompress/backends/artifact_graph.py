"""The nodes of a graph in normal form to plain data, and back.

Every name that generated code is made of passes `Cursor.identifier` or `Cursor.path`; operators come from the tables of
`artifact_ops.py`; a node can use only nodes above it. So the code that `GraphModule.recompile` makes of a stranger's
file holds names, numbers, quoted texts and known calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .artifact_json import Cursor, fail, printable
from .artifact_meta import read_meta, save_meta
from .artifact_ops import check_call, load_operator, save_operator
from .artifact_values import Decoder, UnsaveableError, encode

OPS = ("input", "parameter", "module", "call", "output")
_FX_OPS = {"input": "placeholder", "parameter": "get_attr", "module": "call_module", "call": "call_function",
           "output": "output"}
_SAVED_OPS = {fx_op: op for op, fx_op in _FX_OPS.items()}


def save_nodes(graph: fx.Graph, tensors: frozenset[str], main_device: torch.device) -> list[dict[str, Any]]:
    """Every node of `graph` as plain data. `tensors` are the names that a `get_attr` may read. Raises UnsaveableError
    that begins with the node's name and place."""
    if type(graph._codegen) is not fx.graph.CodeGen:
        raise UnsaveableError("a graph with inputs of its own kind (a pytree), which is not in normal form,")
    entries = []
    for node in graph.nodes:
        try:
            entries.append(_save_node(node, tensors, main_device))
        except UnsaveableError as error:
            source = getattr(node.meta.get("fxc"), "source", "")
            where = f" ({source})" if source else ""
            raise UnsaveableError(f"the node {node.name}{where}: {error}") from error
    return entries


def _save_node(node: fx.Node, tensors: frozenset[str], main_device: torch.device) -> dict[str, Any]:
    if node.op not in _SAVED_OPS:
        raise UnsaveableError(f"a call of the method {node.target}, which is not in normal form,")
    if node.op == "get_attr" and node.target not in tensors:
        raise UnsaveableError(f"{node.target}, which is not a tensor,")
    entry: dict[str, Any] = {"name": node.name, "op": _SAVED_OPS[node.op]}
    if node.op == "call_function":
        entry["target"] = save_operator(node)
    elif node.op != "output":
        entry["target"] = str(node.target)
    if node.args:
        entry["args"] = [encode(argument, main_device) for argument in node.args]
    if node.kwargs:
        entry["kwargs"] = {name: encode(argument, main_device) for name, argument in node.kwargs.items()}
    meta = save_meta(node)
    if meta:
        entry["meta"] = meta
    return entry


def read_nodes(entries: Cursor, modules: frozenset[str], tensors: frozenset[str], device: torch.device) -> fx.Graph:
    """The graph. `modules` and `tensors` are what it may call and read. Raises ArtifactError."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    decoder = Decoder(nodes, device)
    items = entries.items()
    for place, entry in enumerate(items):
        fields = entry.fields(("name", "op"), ("target", "args", "kwargs", "meta"))
        name = fields["name"].identifier()
        if name in nodes:
            fail("FXC0609", f"{entry.place}: the name {printable(name)} is taken")
        op = fields["op"].choice(OPS)
        if (op == "output") != (place == len(items) - 1):
            fail("FXC0609", f"{entry.place}: the output, and nothing else, must be the last node")
        args, kwargs = _arguments(fields, decoder)
        target = _target(op, fields, entry, modules, tensors)
        _check_form(op, target, args, kwargs, nodes=nodes, place=entry.place)
        node = graph.create_node(_FX_OPS[op], target, args, kwargs, name=name)
        read_meta(node, fields.get("meta"))
        nodes[name] = node
    if not items:
        fail("FXC0609", f"{entries.place}: the graph has no output")
    return graph


def _arguments(fields: Mapping[str, Cursor], decoder: Decoder) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(decoder.value(item) for item in fields["args"].items()) if "args" in fields else ()
    kwargs = {}
    if "kwargs" in fields:
        for key, item in fields["kwargs"].pairs():
            kwargs[Cursor(key, item.place).identifier()] = decoder.value(item)
    return args, kwargs


def _target(op: str, fields: Mapping[str, Cursor], entry: Cursor, modules: frozenset[str],
            tensors: frozenset[str]) -> Any:
    if op == "output":
        return "output"
    if "target" not in fields:
        fail("FXC0604", f"{entry.place}: the field `target` is missing")
    target = fields["target"]
    if op == "call":
        return load_operator(target.text(200), target.place)
    if op == "input":
        return target.identifier()
    path = target.path()
    if path not in (modules if op == "module" else tensors):
        what = "module to call" if op == "module" else "tensor"
        fail("FXC0609", f"{target.place}: no {what} is at {printable(path)}")
    return path


def _check_form(op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *,
                nodes: Mapping[str, fx.Node], place: str) -> None:
    if op == "call":
        check_call(target, args, kwargs, place)
    elif op == "input":
        taken = {node.target for node in nodes.values() if node.op == "placeholder"}
        if kwargs or len(args) > 1 or target in taken or target == "self":
            fail("FXC0609", f"{place}: an input stands under its own name, with at most a default")
        if args and _has_node(args[0]):
            fail("FXC0609", f"{place}: a default is a constant")
    elif op == "parameter" and (args or kwargs):
        fail("FXC0609", f"{place}: a parameter takes no arguments")
    elif op == "output" and (kwargs or len(args) != 1):
        fail("FXC0609", f"{place}: an output has one value")


def _has_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)
