"""Evaluation for good: what only acts in training leaves the graph."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, kind_of, module_of
from fxcompress.nn import ByMode

# Kinds that give back their input in evaluation mode; as functions they have a `training` argument that says so.
_PASS_THROUGH = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth".split())


def bake_evaluation(captured: Captured) -> list[fx.Node]:
    """Take dropout, stochastic depth and switches of the mode out of `captured`, in place; returns the nodes that now
    read something else. Modules left without a call go too, unless they hold parameters. The caller refreshes."""
    changed: dict[fx.Node, None] = {}
    for node in list(captured.graph.nodes):
        if node.op == "call_module" and isinstance(module := module_of(node), ByMode):
            for user in list(node.users):
                user.args, user.kwargs = _with((user.args, user.kwargs), node, module.eval_value)
            _drop(captured, node)
        elif vanishes(node):
            source = arguments(node)["input"]
            changed.update(dict.fromkeys(node.users))
            node.replace_all_uses_with(source)
            _drop(captured, node)
    return list(changed)


def _with(arguments_: Any, node: fx.Node, value: Any) -> Any:
    """Arguments of a call with `value` in the place of `node`."""
    return fx.node.map_arg(arguments_, lambda arg: value if arg is node else arg)


def vanishes(node: fx.Node) -> bool:
    """Whether `node` gives back its input in evaluation mode, and is gone from a graph for evaluation alone."""
    if kind_of(node) not in _PASS_THROUGH:
        return False
    if node.op == "call_module":
        return True
    training = arguments(node).get("training")
    if isinstance(training, fx.Node) and training.op == "call_module":
        switch = module_of(training)
        return isinstance(switch, ByMode) and switch.eval_value is False
    return training is False


def _drop(captured: Captured, node: fx.Node) -> None:
    captured.graph.erase_node(node)
    still = any(other.op == "call_module" and other.target == node.target for other in captured.graph.nodes)
    if node.op == "call_module" and not still:
        module: nn.Module = captured.module.get_submodule(str(node.target))
        if not list(module.parameters()) and not list(module.buffers()):
            captured.module.delete_submodule(str(node.target))
