"""Module trees: copies of models and of graph modules that keep keys, order, modes and the identity of shared
tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn


def copy_tensors(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    """A memo for `copy.deepcopy`: for every parameter, buffer and tensor attribute of `modules` its copy by `make`, for
    one that occurs twice the same copy."""
    memo: dict[int, Any] = {}
    for module in modules:
        plain = [value for value in module.__dict__.values() if isinstance(value, Tensor)]
        for tensor in (*module._parameters.values(), *module._buffers.values(), *plain):
            if tensor is not None and id(tensor) not in memo:
                made = make(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, tensor.requires_grad)
                    made.__dict__.update(tensor.__dict__)
                memo[id(tensor)] = made
    return memo


def meta(tensor: Tensor) -> Tensor:
    """A tensor like `tensor` on the `meta` device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def clone_model(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of `model` with tensors made by `make`, also of one whose tensor attributes hang in an autograd
    graph."""
    copied: nn.Module = copy.deepcopy(model, copy_tensors(model.modules(), make))
    return copied


def plain_tree(model: nn.Module, leaves: dict[str, nn.Module]) -> nn.Module:
    """The tree of `model` with the modules of `leaves` (by path) as they are and plain `nn.Module`s above them:
    parameters, buffers and children in their old order, so that `state_dict` is equal key for key. Branches without
    state and without leaves are left out."""
    return _plain(model, "", leaves) or nn.Module()


def _plain(module: nn.Module, path: str, leaves: dict[str, nn.Module]) -> nn.Module | None:
    leaf = leaves.get(path) if path else None
    if leaf is not None:
        return leaf
    box = nn.Module()
    box.train(module.training)
    box._parameters.update(module._parameters)
    box._buffers.update(module._buffers)
    box._non_persistent_buffers_set |= module._non_persistent_buffers_set
    for name, child in module._modules.items():
        made = None if child is None else _plain(child, f"{path}.{name}" if path else name, leaves)
        if made is not None:
            box._modules[name] = made
    return box if box._parameters or box._buffers or box._modules else None


def graph_module(tree: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule of `graph` on the very modules and tensors of `tree`; its keys and their order are those of
    `tree`."""
    module = fx.GraphModule(nn.Module(), fx.Graph(), name)
    module._parameters.update(tree._parameters)
    module._buffers.update(tree._buffers)
    module._modules.update(tree._modules)
    module._non_persistent_buffers_set |= tree._non_persistent_buffers_set
    module.training = tree.training
    module.graph = graph
    return module


def copy_module(module: fx.GraphModule, make: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    """A deep copy of a graph module with tensors made by `make`; nodes keep names and meta."""
    memo = copy_tensors(module.modules(), make)
    tree = nn.Module()
    tree.training = module.training
    tree._parameters.update({key: copy.deepcopy(value, memo) for key, value in module._parameters.items()})
    tree._buffers.update({key: copy.deepcopy(value, memo) for key, value in module._buffers.items()})
    tree._non_persistent_buffers_set |= module._non_persistent_buffers_set
    for name, child in module._modules.items():
        tree._modules[name] = copy.deepcopy(child, memo)
    return graph_module(tree, copy_graph(module.graph), type(module).__name__)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` whose nodes have the same names and shallow copies of `meta`."""
    made = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = made.node_copy(node, lambda old: nodes[old])
        if copied.name != node.name:
            copied.name = node.name
        copied.meta = dict(node.meta)
        nodes[node] = copied
    return made
