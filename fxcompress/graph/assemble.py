"""From a trace to a `Captured`: the module tree, constants, modes, facts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from .captured import Captured, Example, code_of
from .modes import merge_modes
from .modules import MODULES
from .ops import call, submodule
from .probe import Fakes
from .propagate import Results, drop_dead, write_facts
from .trace import Traced, drop_rate, leaf_kind
from .tree import graph_module, named_tensors, plain_tree
from .twins import make_twin


def assemble(
    model: nn.Module, traced: Traced, other: Traced | None, example: Example, way: Literal["fx", "export"], name: str
) -> Captured:
    """The captured form of `model`, which is given up: its leaf modules and tensors go into the result. `other` is the
    trace in the other mode, where the model asks which mode it is in."""
    recorder, graph = traced.recorder, traced.graph
    notes = list(recorder.notes)
    _detach_no_grad(traced)
    drop_dead(graph)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    leaves = {path: _leaf(model, path, traced) for path in called}
    _out_of_place(leaves)
    tree = plain_tree(model, leaves)
    _register_constants(tree, traced)
    if other is not None:
        _detach_no_grad(other)
        drop_dead(other.graph)
        if not merge_modes(graph, other.graph, tree, model.training):
            mode = "training" if model.training else "evaluation"
            notes.append("the model takes another way through its code in the other mode: "
                         f"the graph always is that of {mode}")
    module = graph_module(tree, graph, re.sub(r"\W", "_", name))
    results = {node: traced.recorder.results[node] for node in graph.nodes if node in traced.recorder.results}
    _complete(graph, module, recorder.fakes, results)
    write_facts(graph, module, results)
    named = named_tensors(module).parameters
    unread = _unread(graph, named)
    if unread:
        notes.append(f"not read by the graph, kept in state_dict: {', '.join(unread)}")
    concrete = all(not tensor.is_meta for tensor in named.values())
    return Captured(module, example, way, name, concrete, notes=tuple(notes), _code=code_of(graph))


def _leaf(model: nn.Module, path: str, traced: Traced) -> nn.Module:
    """The module that stays at `path`: the model's own, or a plain one that computes the same."""
    module = submodule(model, path)
    if path in traced.twins:
        return make_twin(module, traced.twins[path])
    if leaf_kind(module) == "stochastic_depth" and not isinstance(module, StochasticDepth):
        depth: nn.Module = StochasticDepth(drop_rate(module), "row").train(module.training)
        return depth
    if type(module) not in MODULES and not hasattr(module, "parametrizations"):
        return make_twin(module, next(base for base in type(module).__mro__ if base in MODULES))
    return module


def _out_of_place(leaves: Mapping[str, nn.Module]) -> None:
    """Let no module work in place: what reads its input afterwards reads its result by now (`writes.py`)."""
    for leaf in leaves.values():
        if leaf.__dict__.get("inplace", False):
            leaf.inplace = False  # type: ignore[assignment]


def _register_constants(tree: nn.Module, traced: Traced) -> None:
    used = {node.target for node in traced.graph.nodes if node.op == "get_attr"}
    for name, tensor in traced.recorder.constants.items():
        if name in used:
            tree.register_buffer(name, tensor, persistent=False)


def _complete(graph: fx.Graph, module: nn.Module, fakes: Fakes, results: Results) -> None:
    """Results of the nodes that were added after the trace: `detach`, `ByMode` modules and the output."""
    for node in graph.nodes:
        if node not in results:
            results[node] = tuple(_late(node, module, results, probe) for probe in range(len(fakes.batches)))


def _late(node: fx.Node, module: nn.Module, results: Results, probe: int) -> Any:
    if node.op == "call_module":
        return module.get_submodule(str(node.target))()
    return fx.map_arg(node.args[0], lambda other: results[other][probe])


def _detach_no_grad(traced: Traced) -> None:
    """Where the model switched gradients off, an edge that leaves that region gets a `detach`: switching alone would be
    lost in a graph."""
    graph, results = traced.graph, traced.recorder.results
    if not any(node.meta.get("no_grad") for node in graph.nodes):
        return
    grads: set[fx.Node] = set()
    for node in list(graph.nodes):
        value = results.get(node, (None,))[0]
        source = node.op in ("placeholder", "get_attr") or any(used in grads for used in node.all_input_nodes)
        whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
        if whole or not source:
            continue
        outside = [user for user in node.users if not user.meta.get("no_grad")]
        inside = node.meta.get("no_grad") and node.op not in ("placeholder", "get_attr")
        if inside and outside and isinstance(value, Tensor):
            with graph.inserting_after(node):
                cut = call(graph, "detach", node)
            cut.meta.update({key: node.meta[key] for key in ("path", "source") if key in node.meta})
            for user in outside:
                user.replace_input_with(node, cut)
            continue
        grads.add(node)


def _unread(graph: fx.Graph, named: Mapping[str, nn.Parameter]) -> list[str]:
    """The top-level branches whose parameters, those of `named`, the graph never reads."""
    read = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    is_read = {path: any(owner in read for owner in _owners(path)) for path in named}
    shared = {id(tensor) for path, tensor in named.items() if is_read[path]}
    return sorted({path.rpartition(".")[0] or path for path, tensor in named.items()
                   if not is_read[path] and id(tensor) not in shared})


def _owners(path: str) -> Iterator[str]:
    """`path` and every module that it is in: `a.b.c`, `a.b`, `a`."""
    while path:
        yield path
        path = path.rpartition(".")[0]

