"""The canonical operators: one name, one callable and one order of arguments, however a model wrote the call.

`operator.add`, `torch.add`, `Tensor.add_` and `aten.add.Tensor` are all `add`; `nn.Conv2d` and `F.conv2d` are both
`conv2d`. The data are in `ops_table.py` (functions) and `modules.py` (modules that stay `call_module` nodes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from .modules import MODULES, module_arguments, module_kind
from .opbase import REQUIRED, Op, Param, bind, parse_signature
from .ops_table import TABLE

OPS: Mapping[str, Op] = {op.name: op for op in TABLE}
BY_TARGET: Mapping[Callable[..., Any], Op] = {op.target: op for op in TABLE}

__all__ = ["BY_TARGET", "MODULES", "OPS", "REQUIRED", "Op", "Param", "arguments", "bind", "call", "kind_of",
           "named_call", "op_of", "parameter_names", "parse_signature", "path_of", "qualified_name"]

_RANKED = ("batchnorm", "instancenorm")  # kinds with 1d, 2d or 3d after them, by the rank of the input less two


ON_WEIGHTS = frozenset({"mask", "quantizer"})  # kinds of modules on the edge of a weight: part of the layer it feeds


def qualified_name(target: object) -> str:
    """`torch.fft.fft2`, `aten.foo.default`, `mylib.f`: the name of an operator that has no canonical one."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, str):
        return f"Tensor.{target}"
    module = getattr(target, "__module__", None) or ("torch.Tensor" if hasattr(torch.Tensor, _name(target)) else "")
    module = {"_operator": "operator", "torch._C._nn": "torch.nn.functional", "builtins": ""}.get(module, module)
    return f"{module}.{_name(target)}" if module else _name(target)


def _name(target: object) -> str:
    return str(getattr(target, "__qualname__", None) or getattr(target, "__name__", repr(target))).split(".")[-1]


def op_of(node: fx.Node) -> Op | None:
    """The canonical operator of a `call_function` node, None for any other node or an unknown operator."""
    return BY_TARGET.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]


def kind_of(node: fx.Node) -> str:
    """The canonical kind of any node: `conv2d`, `add`, ...; `input`, `output`, `parameter` (for `get_attr`); the
    qualified name of an operator or module class outside the tables."""
    if node.op == "call_function":
        op = BY_TARGET.get(node.target)  # type: ignore[arg-type]
        if op is None:
            return qualified_name(node.target)
        return op.name + _rank(node) if op.name in _RANKED else op.name
    if node.op == "call_module":
        return module_kind(module_of(node))
    if node.op == "call_method":
        return qualified_name(node.target)
    return {"placeholder": "input", "output": "output", "get_attr": "parameter"}[node.op]


def _rank(node: fx.Node) -> str:
    """The `2d` of a functional `batch_norm`, from the rank of its value; empty while that is unknown."""
    shape = getattr(node.meta.get("fxc"), "shape", None)
    return f"{max(1, len(shape) - 2)}d" if shape is not None else ""


def module_of(node: fx.Node) -> nn.Module:
    """The module a `call_module` node calls. Raises LookupError for another node."""
    module = node.graph.owning_module
    if node.op != "call_module" or module is None:
        raise LookupError(f"{node.name} calls no module")
    return submodule(module, str(node.target))


def submodule(root: nn.Module, path: str) -> nn.Module:
    """`root.get_submodule(path)`, several times as fast. Raises AttributeError where that does."""
    module: nn.Module | None = root
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module if module is not None else root.get_submodule(path)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of `node` by canonical name, defaults filled in; values that come from nodes are nodes.

    For a `call_module` node these are its inputs, then the module's parameters (`weight`, `bias`: tensors or None) and
    settings (`stride`, `padding`, `groups`, `eps`, ...). For an operator outside the tables: its keyword arguments, and
    its positional ones under `"0"`, `"1"`, ...
    """
    if node.op == "call_module":
        return module_arguments(module_of(node), node.args, node.kwargs)
    op = op_of(node)
    if op is not None:
        return op.bind(node.args, node.kwargs)
    return {**{str(place): value for place, value in enumerate(node.args)}, **node.kwargs}


def parameter_names(node: fx.Node) -> dict[str, str]:
    """The `state_dict` names of the parameters and buffers that `node` itself reads, by canonical argument name:
    `{"weight": "conv1.weight"}`, for a module and for a function on `get_attr` nodes alike. An argument that is
    computed (a masked weight) is not in it."""
    if node.op == "call_module":
        module = module_of(node)
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return {name: f"{node.target}.{name}" for name, _ in named}
    return {name: str(value.target) for name, value in arguments(node).items()
            if isinstance(value, fx.Node) and value.op == "get_attr"}


def path_of(node: fx.Node) -> str:
    """The module path a node stands under: its own for `call_module`, that of the enclosing module for a function
    (a functional convolution on a masked weight keeps its module's); a node a pass made may set `node.meta["path"]`."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return str(node.meta.get("path", ""))


def call(graph: fx.Graph, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
    """Append a canonical call of `kind` at the graph's insertion point; arguments by canonical name or in order."""
    return named_call(graph, None, kind, *args, **kwargs)


def named_call(graph: fx.Graph, name: str | None, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
    """As `call`; the node is called `name`, or as that with a number where it is taken."""
    op = OPS[kind]
    normal_args, normal_kwargs = op.normal(op.bind(args, kwargs))
    return graph.create_node("call_function", op.target, normal_args, normal_kwargs, name)
