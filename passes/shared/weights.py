"""Weights as edges of the graph: a module's call becomes a function on `get_attr` nodes, and back.

The node itself stays (its name, its place, whoever holds it); only what it calls changes. The module stays too, as the
holder of its parameters, so `state_dict` keys don't change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import fx, nn

from fxcompress.diagnostics import Diagnostic, PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.modules import keeps_forward, module_kind
from fxcompress.graph.ops import OPS, arguments, kind_of, module_of, path_of

_CONVS = tuple(f"conv{n}d" for n in (1, 2, 3))
_TRANSPOSED = tuple(f"conv_transpose{n}d" for n in (1, 2, 3))
EXPOSABLE = (*_CONVS, *_TRANSPOSED, "linear", "embedding")  # kinds whose module can become a function and come back
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_CONVS, ("stride", "padding", "dilation", "groups")),
    **dict.fromkeys(_TRANSPOSED, ("stride", "padding", "output_padding", "groups", "dilation")),
    "linear": (),
    "embedding": ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}
_SIZES = {
    **dict.fromkeys(_CONVS, ("out_channels", "in_channels")),
    **dict.fromkeys(_TRANSPOSED, ("in_channels", "out_channels")),
    "linear": ("out_features", "in_features"), "embedding": ("num_embeddings", "embedding_dim"),
}


def expose(captured: Captured, node: fx.Node, name: str = "weight") -> fx.Node:
    """The node that feeds argument `name` of `node`, which becomes a function if it was a module's call.

    That is a `get_attr` node, or what an earlier pass put behind one. Raises PlanError (FXC0510) where the call can't
    be a function: another kind, an overridden `forward`, a renormalised embedding, an `output_size` at the call.
    """
    if node.op == "call_module":
        _to_function(captured, node)
    source = arguments(node).get(name)
    if not isinstance(source, fx.Node):
        raise _refused(node, f"it has no {name}")
    return source


def of_parameters(value: object) -> bool:
    """Whether a value is a parameter or buffer, or is computed from such alone: standardised, transposed, split."""
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node.op == "placeholder":
            return False
        if node not in seen:
            seen.add(node)
            if node.op != "get_attr" and not node.all_input_nodes:
                return False  # drawn at random, or by the mode
            stack += node.all_input_nodes
    return True


def unexposable(node: fx.Node) -> str | None:
    """Why the module's call `node` can't become a function on its weight, or None."""
    module = module_of(node)
    if kind_of(node) not in EXPOSABLE:
        return f"a {kind_of(node)} isn't computed by one function of its weight"
    if not keeps_forward(module):
        return f"its class {type(module).__name__} overrides `forward`"
    if getattr(module, "max_norm", None) is not None:
        return "`max_norm` rewrites the weight in the forward pass"
    if len(node.args) + len(node.kwargs) > 1:
        return "`output_size` is given at the call"
    return None


def _refused(node: fx.Node, why: str) -> PlanError:
    return PlanError([Diagnostic("FXC0510", f"the weight of `{path_of(node)}` can't be rewritten: {why}",
                                 help="leave this layer out of the selection")])


def _to_function(captured: Captured, node: fx.Node) -> None:
    why = unexposable(node)
    if why is not None:
        raise _refused(node, why)
    kind, module, path = kind_of(node), module_of(node), str(node.target)
    values = {key: getattr(module, key) for key in _SETTINGS[kind]}
    (data,) = (*node.args, *node.kwargs.values())
    with captured.module.graph.inserting_before(node):
        if getattr(module, "padding_mode", "zeros") != "zeros":
            data = _pad(captured.module.graph, module, data, path)
            values["padding"] = 0
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                values[name] = captured.module.graph.get_attr(f"{path}.{name}")
    node.op, node.target = "call_function", OPS[kind].target
    node.args, node.kwargs = OPS[kind].normal({**values, "input": data})
    node.meta["path"] = path


def _pad(graph: fx.Graph, module: nn.Module, data: Any, path: str) -> fx.Node:
    """The padding that a convolution of another `padding_mode` does first."""
    amounts = tuple(cast(list[int], module._reversed_padding_repeated_twice))
    call = {"input": data, "pad": amounts, "mode": module.padding_mode}
    args, kwargs = OPS["pad"].normal(call)
    node = graph.call_function(OPS["pad"].target, args, kwargs)
    node.meta["path"] = path
    return node


def absorb(captured: Captured, node: fx.Node) -> bool:
    """Make a function on the plain weights of one module that module's call again; say whether that could be done.

    The module takes over the sizes and settings that the function has now.
    """
    values = arguments(node)
    path = _holder(captured, node, values)
    if path is None:
        return False
    module, kind, data = captured.module.get_submodule(path), kind_of(node), values["input"]
    if getattr(module, "padding_mode", "zeros") != "zeros":
        if not (isinstance(data, fx.Node) and kind_of(data) == "pad" and path_of(data) == path):
            return False
        data = arguments(data)["input"]
        values["padding"] = module.padding
    for key in _SETTINGS[kind]:
        setattr(module, key, _like(values[key], getattr(module, key)))
    _set_sizes(module, kind)
    unused = [value for value in node.all_input_nodes if value is not data]
    node.op, node.target, node.args, node.kwargs = "call_module", path, (data,), {}
    for value in unused:
        if not value.users:
            captured.module.graph.erase_node(value)
    return True


def _holder(captured: Captured, node: fx.Node, values: Mapping[str, Any]) -> str | None:
    """The path of the module whose parameters are exactly those that `node` reads."""
    weight, bias = values.get("weight"), values.get("bias")
    if node.op != "call_function" or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    path, _, name = str(weight.target).rpartition(".")
    if not path or name != "weight":
        return None
    module = captured.module.get_submodule(path)
    if not keeps_forward(module) or module_kind(module) != kind_of(node):
        return None
    wanted = None if getattr(module, "bias", None) is None else f"{path}.bias"
    found = bias.target if isinstance(bias, fx.Node) and bias.op == "get_attr" else bias
    return path if found == wanted else None


def _like(value: Any, was: Any) -> Any:
    """`value` as a tuple where the module has one (`stride=1` for `(1, 1)`)."""
    return (value,) * len(was) if isinstance(was, tuple) and isinstance(value, int) else value


def _set_sizes(module: nn.Module, kind: str) -> None:
    """Bring `in_channels` and the like up to date with the weight's shape."""
    first, second = _SIZES[kind]
    groups = getattr(module, "groups", 1)
    weight = module.get_parameter("weight")
    setattr(module, first, weight.shape[0])
    setattr(module, second, weight.shape[1] * groups)
