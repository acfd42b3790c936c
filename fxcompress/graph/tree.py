"""Module trees: copies of models and of graph modules that keep keys, order, modes and the identity of shared
tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
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


@dataclass(frozen=True)
class Named:
    """The tensors of a module tree by name, one that is held twice under each of its names. `state` are the names in
    `state_dict`."""

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    state: list[str]

    @property
    def all(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {**self.parameters, **self.buffers}


def named_tensors(root: nn.Module) -> Named:
    """What `named_parameters`, `named_buffers` and `state_dict` tell, in one walk and a tenth of their time."""
    found = Named({}, {}, [])
    stack = [("", root)]
    while stack:
        prefix, module = stack.pop()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.parameters[prefix + name] = parameter
                found.state.append(prefix + name)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found.buffers[prefix + name] = buffer
                if name not in module._non_persistent_buffers_set:
                    found.state.append(prefix + name)
        stack += [(f"{prefix}{name}.", child) for name, child in reversed(module._modules.items()) if child is not None]
    return found


def meta(tensor: Tensor) -> Tensor:
    """A tensor like `tensor` on the `meta` device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def own(tensor: Tensor) -> Tensor:
    """A tensor of its own with the values of `tensor`. Where torch can, memory on the CPU is shared until one of both
    is written, so that a copy that is cut before it is trained never exists whole. (Writes that torch doesn't see,
    through a NumPy array made of `tensor` before, are seen by both.)"""
    lazy = getattr(torch, "_lazy_clone", None)
    size = tensor.numel() * tensor.element_size()
    whole = size >= _SMALL and tensor.device.type == "cpu" and tensor.layout == torch.strided and (
        tensor.untyped_storage().nbytes() == size)
    if lazy is None or not whole:
        return tensor.clone()
    try:
        return lazy(tensor)  # type: ignore[no-any-return]
    except RuntimeError:  # memory that isn't torch's: from NumPy, a file, another process
        return tensor.clone()


_SMALL = 4096  # bytes up to which a copy is as cheap


def clone_model(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of `model` with tensors made by `make`, also of one whose tensor attributes hang in an autograd
    graph. The caches of its modules are empty in the copy: what they hold would be captured as constants, in place of
    the parameters it was computed from."""
    copied: nn.Module = copy.deepcopy(model, _copies(model, make))
    return copied


def _is_cache(value: object) -> bool:
    return type(value) is dict and all(isinstance(item, Tensor) for item in value.values())


def _copies(model: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with copies of the tensors and modules of `model`: what `copy.deepcopy` would make,
    several times as fast, of modules that leave copying to it."""
    modules = list(model.modules())
    memo = copy_tensors(modules, make)
    for module in modules:
        memo.update({id(value): {} for name, value in module.__dict__.items()
                     if "cache" in name and _is_cache(value)})
    plain = [module for module in modules if _copies_by_state(type(module))]  # type: ignore[arg-type]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in reversed(plain):  # a graph module within reads its children when it is copied
        state = memo[id(module)].__dict__
        for name, value in module.__dict__.items():
            kind = type(value)
            empty = kind in _HOOKS and not value  # most attributes are, or atoms
            state[name] = value if kind in _ATOMS else kind() if empty else _copied(value, memo)
    return memo


@lru_cache(maxsize=256)
def _copies_by_state(cls: type[nn.Module]) -> bool:
    """Whether a deep copy of a module of class `cls` is a module with a deep copy of its `__dict__`, nothing else.
    Recurrent layers keep weak references to their weights, which their `__setstate__` makes anew."""
    same = all(getattr(cls, name, None) is getattr(nn.Module, name, None)
               for name in ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__deepcopy__", "__copy__"))
    restore: Any = cls.__setstate__
    slots = any(base.__dict__.get("__slots__") for base in cls.__mro__)
    return (same and not slots and not issubclass(cls, nn.RNNBase)
            and restore.__module__.startswith("torch.nn.modules."))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of an attribute."""
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and all(type(item) in _ATOMS for item in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is set and all(type(item) in _ATOMS for item in value):
        return set(value)
    if kind in _HOOKS and not value:
        return kind()
    if kind in (dict, OrderedDict) and all(type(key) is str for key in value):
        memo[id(value)] = made = kind()
        for key, item in value.items():
            made[key] = _copied(item, memo)
        return made
    return copy.deepcopy(value, memo)


_HOOKS = frozenset((dict, OrderedDict, set))  # what a module has many of that are empty
_ATOMS = frozenset((int, float, bool, str, type(None), torch.dtype))


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
    box.__dict__["training"] = module.training  # setting an attribute of a module looks for what it may replace
    box._parameters.update(module._parameters)
    box._buffers.update(module._buffers)
    box._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
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
    memo = _copies(module, make)
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
