"""Batch norms folded into the convolutions and linear layers before them, as they compute in evaluation mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxcompress.graph.captured import Captured
from fxcompress.graph.interpret import evaluated
from fxcompress.graph.ops import arguments, kind_of, module_of, op_of, path_of
from fxcompress.graph.tree import named_tensors
from fxcompress.nn.mode import ByMode
from fxcompress.passes.shared.masking import parameter_of
from fxcompress.passes.shared.weights import expose, unexposable

_PRODUCTS = ("conv1d", "conv2d", "conv3d", "linear")
_RANKS = {"conv1d": 3, "conv2d": 4, "conv3d": 5, "linear": 2}  # of a value whose channels are dimension 1
_NORMS = ("batchnorm1d", "batchnorm2d", "batchnorm3d")
_STATISTICS = ("running_mean", "running_var", "weight", "bias")


def fold(captured: Captured, nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, str]]:
    """Fold the batch norms behind each of `nodes` where there are any to fold; returns those nodes, each with the path
    (or the node's name) of a norm, which is gone. Masked weights stay masked: their channels are only scaled. The
    caller refreshes.

    w' = w·γ/√(σ² + ε), b' = (b − μ)·γ/√(σ² + ε) + β (Jacob et al., 2018, section 3.2).
    """
    sharing, folded = _Sharing(captured), []
    for node in nodes:
        while (norm := sharing.norm_behind(node)) is not None:
            folded.append((node, path_of(norm) or norm.name))
            _fold(captured, node, norm)
    return folded


@dataclass(frozen=True)
class _Norm:
    """What a batch norm computes with in evaluation mode: (x − mean)/√(var + eps)·weight + bias."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, captured: Captured, node: fx.Node) -> _Norm:
        """That of a module's call, or of a function on tensors that the model holds."""
        values = arguments(node)
        found = [evaluated(captured.module, value) if isinstance(value, fx.Node) else value
                 for value in (values[name] for name in _STATISTICS)]
        return cls(found[0], found[1], found[2], found[3], float(values["eps"]))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The same as x·scale + shift, float64."""
        scale = (self.var.double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -self.mean.double() * scale
        return scale, shift if self.bias is None else shift + self.bias.double()


def norms_behind(captured: Captured, nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The module of a batch norm behind each of `nodes` that `fold` would fold into it."""
    sharing = _Sharing(captured)
    found = {node: sharing.norm_behind(node) for node in nodes}
    return {node: norm for node, norm in found.items() if norm is not None and norm.op == "call_module"}


class _Sharing:
    """How often modules are called, and tensors are held or read, in a graph as it was before anything was folded."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.calls = Counter(str(node.target) for node in captured.graph.nodes if node.op == "call_module")
        self.names = {name: id(tensor) for name, tensor in named_tensors(captured.module).parameters.items()}
        self.holders = Counter(self.names.values())
        self.readers = Counter(self.names[str(node.target)] for node in captured.graph.nodes
                               if node.op == "get_attr" and str(node.target) in self.names)

    def norm_behind(self, node: fx.Node) -> fx.Node | None:
        """The batch norm that can be folded into `node`: one that alone reads the product, whose weight nothing else
        reads. None where there is none."""
        users = list(node.users)
        if kind_of(node) not in _PRODUCTS or len(users) != 1 or kind_of(users[0]) not in _NORMS:
            return None
        if len(getattr(node.meta.get("fxc"), "shape", None) or ()) != _RANKS[kind_of(node)]:
            return None  # the norm's channels aren't the product's
        norm, name = users[0], parameter_of(node, "weight")
        if not self._is_fixed(norm):
            return None
        if node.op == "call_module" and (unexposable(node) or self.calls[str(node.target)] > 1):
            return None
        if name is None or name not in self.names:
            return None
        weight = self.names[name]
        return norm if self.holders[weight] == 1 and self.readers[weight] <= 1 else None

    def _is_fixed(self, norm: fx.Node) -> bool:
        """Whether a norm has statistics that it uses in evaluation mode."""
        if norm.op == "call_module":
            return module_of(norm).running_mean is not None and self.calls[str(norm.target)] == 1
        values = arguments(norm)
        training, tensors = values["training"], [values[name] for name in _STATISTICS]
        if isinstance(training, fx.Node):
            switch = module_of(training) if training.op == "call_module" else None
            training = switch.eval_value if isinstance(switch, ByMode) else True
        return not training and tensors[0] is not None and all(
            value is None or (isinstance(value, fx.Node) and value.op == "get_attr") for value in tensors)


def _fold(captured: Captured, node: fx.Node, norm: fx.Node) -> None:
    expose(captured, node)
    name = parameter_of(node, "weight")
    assert name is not None
    weight = captured.module.get_parameter(name)
    with torch.no_grad():
        scale, shift = _Norm.of(captured, norm).scale_and_shift()
        bias = own_bias(captured, node, weight)
        bias.copy_((bias.double() * scale + shift).to(bias.dtype))
        weight.copy_((weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype))
    path, read = path_of(node), [value for value in norm.all_input_nodes if value is not node]
    target = str(norm.target) if norm.op == "call_module" else None
    captured.replace(norm, node)
    node.meta["path"] = path
    if target is not None:
        captured.module.delete_submodule(target)
    for value in read:
        _drop(captured, value)


def _drop(captured: Captured, node: fx.Node) -> None:
    """Erase a node that gave something to a norm, and what it gave, where nothing else reads it."""
    if node.users:
        return
    captured.graph.erase_node(node)
    if any(str(other.target) == str(node.target) for other in captured.graph.nodes
           if other.op in ("get_attr", "call_module")):
        return
    owner, _, leaf = str(node.target).rpartition(".")
    delattr(captured.module.get_submodule(owner), leaf)


def own_bias(captured: Captured, node: fx.Node, weight: Tensor) -> Tensor:
    """The bias parameter of `node`, its own; one is made, of zeros or of the values of what it reads now, where there
    is none or others read it too."""
    name = parameter_of(node, "bias")
    if name is not None and isinstance(_held(captured, name), nn.Parameter) and _is_own(captured, node, name):
        return captured.module.get_parameter(name)
    given = arguments(node).get("bias")
    values = evaluated(captured.module, given) if isinstance(given, fx.Node) else weight.new_zeros(weight.shape[0])
    owner, _, leaf = str(parameter_of(node, "weight")).rpartition(".")
    home = captured.module.get_submodule(owner)
    label = "bias" if leaf == "weight" and getattr(home, "bias", None) is None else f"{leaf}_bias"
    home.register_parameter(label, nn.Parameter(values.detach().clone()))
    with captured.graph.inserting_before(node):
        read = captured.graph.get_attr(f"{owner}.{label}" if owner else label)
    read.meta["path"] = path_of(node)
    op = op_of(node)
    assert op is not None
    node.args, node.kwargs = op.normal({**arguments(node), "bias": read})
    if isinstance(given, fx.Node) and given.op == "get_attr":
        _drop(captured, given)
    return captured.module.get_parameter(str(read.target))


def _held(captured: Captured, name: str) -> object:
    owner, _, leaf = name.rpartition(".")
    return getattr(captured.module.get_submodule(owner), leaf)


def _is_own(captured: Captured, node: fx.Node, name: str) -> bool:
    """Whether `node` alone reads the parameter."""
    tensor = _held(captured, name)
    readers = [user for other in captured.graph.nodes if other.op == "get_attr" and _held(captured, str(other.target))
               is tensor for user in other.users]
    return readers == [node]
