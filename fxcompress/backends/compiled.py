"""Finished GraphModules compiled by Inductor, their weights frozen into the code, so that they are packed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils._pytree import tree_leaves

from ..nn.dynamic import DynamicLinear
from ..nn.engines import OTHER
from ..nn.integer import Product

_STATE = ("GLOBAL_STATE", "SHAPE_ENV", "DUPLICATE_INPUT")  # guards that aren't about the module


class Frozen:
    """Calls `module` compiled for each new shape of its inputs: at its first call with one, which takes from seconds to
    minutes. Without gradients, and as the module is then: what is changed in it later isn't looked at."""

    def __init__(self, module: fx.GraphModule) -> None:
        """Compiles nothing yet."""
        for part in module.modules():
            if isinstance(part, Product | DynamicLinear):
                part.check()
        run: Callable[..., Any] = module._call_impl
        self._names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]

        def call(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        # What is compiled is found by the code object. Each module has its own, so that none is taken for another,
        # though nothing in it is looked at.
        own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
        self._run: Any = torch.compile(own, fullgraph=True, dynamic=False, options={"guard_filter_fn": _guards})
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        if kwargs:
            args, kwargs = self._by_place(args, kwargs)
        key = (*_state(), *kwargs, *map(_looked_at, tree_leaves((args, kwargs))))
        with torch.no_grad():
            if key in self._seen:
                return self._run(*args, **kwargs)
            # The tracer looks at the setting too, so that the `options` of `torch.compile` are not enough.
            with torch._inductor.config.patch(freezing=True, cpp_wrapper=True, post_grad_custom_post_pass=AddInPlace()):
                made = self._run(*args, **kwargs)
            self._seen.add(key)
            return made

    def _by_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments given by name are given by place, as far as none is left out before them: compiled once."""
        left = dict(kwargs)
        for name in self._names[len(args):]:
            if name not in left:
                break
            args = (*args, left.pop(name))
        return args, left


def _looked_at(leaf: Any) -> Any:
    """What Dynamo compiles anew for in an input."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad, leaf.is_inference()


def _state() -> tuple[Any, ...]:
    """torch's settings that Dynamo compiles anew for."""
    return (torch.is_inference_mode_enabled(), torch.get_num_threads(), torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled())


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards are asked at each call: those on the inputs and on torch's settings. Those on a module's
    parts take longer than a small module."""
    return [entry.guard_type in _STATE or not entry.name.startswith(("run.", "G[")) for entry in entries]


class AddInPlace(CustomGraphPass):
    """Lets the integer products that add write into what they add, or into a copy where that is read again: Inductor
    keeps the order, and knows what is written into. It comes behind Inductor's own passes, which take copies out."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites `graph` in place."""
        order = {node: place for place, node in enumerate(graph.nodes)}
        adding, binary = torch.ops.fxcompress.conv2d_add.default, torch.ops.onednn.qconv2d_pointwise.binary
        for node in graph.find_nodes(op="call_function", target=adding):
            other = node.args[OTHER]
            assert isinstance(other, fx.Node)
            with graph.inserting_before(node):
                if not _own(other) or any(order[user] > order[node] for user in other.users) or other is node.args[0]:
                    copied = graph.call_function(torch.ops.aten.clone.default, (other,),
                                                 {"memory_format": torch.channels_last})
                    copied.meta.update(other.meta)
                    other = copied
                made = graph.call_function(binary, (*node.args[:OTHER], other, *node.args[OTHER + 1:]))
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            order[made] = order[node]
            graph.erase_node(node)

    def uuid(self) -> Any:
        """What it does, for Inductor's cache."""
        return get_hash_for_files((__file__,))


def _own(node: fx.Node) -> bool:
    """Whether a node's value is memory of its own, and nobody's else."""
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "onednn"


def compile_in_place(module: fx.GraphModule) -> fx.GraphModule:
    """Let calls of `module` run compiled, as `nn.Module.compile` does; returns it. Copies and what is saved aren't
    compiled."""
    module._compiled_call_impl = Frozen(module)
    return module
