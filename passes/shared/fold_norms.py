"""Batch norms folded into the convolutions and linear layers before them, as they compute in evaluation mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, kind_of, module_of, op_of, path_of
from fxcompress.graph.tree import named_tensors
from fxcompress.passes.shared.masking import parameter_of
from fxcompress.passes.shared.weights import expose, unexposable

_PRODUCTS = ("conv1d", "conv2d", "conv3d", "linear")
_NORMS = ("batchnorm1d", "batchnorm2d", "batchnorm3d")


def fold(captured: Captured, nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, str]]:
    """Fold the batch norm behind each of `nodes` where there is one to fold; returns those nodes, each with the path of
    its norm, which is gone. Masked weights stay masked: their channels are only scaled. The caller refreshes.

    w' = w·γ/√(σ² + ε), b' = (b − μ)·γ/√(σ² + ε) + β (Jacob et al., 2018, section 3.2).
    """
    sharing, folded = _Sharing(captured), []
    for node in nodes:
        norm = sharing.norm_behind(node)
        if norm is not None:
            path = str(norm.target)
            _fold(captured, node, norm)
            captured.module.delete_submodule(path)
            folded.append((node, path))
    return folded


def norms_behind(captured: Captured, nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The batch norm behind each of `nodes` that `fold` would fold into it."""
    sharing = _Sharing(captured)
    found = {node: sharing.norm_behind(node) for node in nodes}
    return {node: norm for node, norm in found.items() if norm is not None}


class _Sharing:
    """How often modules are called, and tensors are held or read, in a graph as it was before anything was folded."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.calls = Counter(str(node.target) for node in captured.graph.nodes if node.op == "call_module")
        names = {name: id(tensor) for name, tensor in named_tensors(captured.module).parameters.items()}
        self.holders = Counter(names.values())
        self.readers = Counter(names[str(node.target)] for node in captured.graph.nodes
                               if node.op == "get_attr" and str(node.target) in names)

    def norm_behind(self, node: fx.Node) -> fx.Node | None:
        """The batch norm that can be folded into `node`: a call of a module that alone reads the product, whose weight
        nothing else reads. None where there is none."""
        users = list(node.users)
        if kind_of(node) not in _PRODUCTS or len(users) != 1 or kind_of(users[0]) not in _NORMS:
            return None
        norm, name = users[0], parameter_of(node, "weight")
        if norm.op != "call_module" or module_of(norm).running_mean is None or self.calls[str(norm.target)] > 1:
            return None
        if node.op == "call_module" and (unexposable(node) or self.calls[str(node.target)] > 1):
            return None
        if name is None:
            return None
        weight = id(self.captured.module.get_parameter(name))
        return norm if self.holders[weight] == 1 and self.readers[weight] <= 1 else None


def _fold(captured: Captured, node: fx.Node, norm: fx.Node) -> None:
    module: Any = module_of(norm)
    expose(captured, node)
    name = parameter_of(node, "weight")
    assert name is not None
    weight = captured.module.get_parameter(name)
    with torch.no_grad():
        scale = (module.running_var.double() + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.double()
        shift = -module.running_mean.double() * scale
        if module.bias is not None:
            shift = shift + module.bias.double()
        bias = _bias(captured, node, weight)
        bias.copy_((bias.double() * scale + shift).to(bias.dtype))
        weight.copy_((weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype))
    path = path_of(node)
    captured.replace(norm, node)
    node.meta["path"] = path


def _bias(captured: Captured, node: fx.Node, weight: Tensor) -> Tensor:
    """The bias parameter of `node`; one of zeros is made where there is none."""
    name = parameter_of(node, "bias")
    if name is None:
        owner = captured.module.get_submodule(path_of(node))
        owner.register_parameter("bias", nn.Parameter(weight.new_zeros(weight.shape[0])))
        name = f"{path_of(node)}.bias"
        with captured.graph.inserting_before(node):
            read = captured.graph.get_attr(name)
        read.meta["path"] = path_of(node)
        op = op_of(node)
        assert op is not None
        node.args, node.kwargs = op.normal({**arguments(node), "bias": read})
    return captured.module.get_parameter(name)
