"""Masks in the graph: put on the edge of a parameter, found again, folded away, taken off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, kind_of, module_of
from fxcompress.nn.mask import Evidence, Mask
from fxcompress.passes.shared.units import Layout
from fxcompress.passes.shared.weights import EXPOSABLE, absorb, expose, unexposable


@dataclass(frozen=True)
class Masked:
    """A parameter with its mask: their names, the `get_attr` nodes that read the one, the nodes that call the other."""

    parameter: str  # "conv1.weight"
    mask: str  # "conv1.weight_mask"
    readers: tuple[fx.Node, ...]
    calls: tuple[fx.Node, ...]
    fresh: bool  # no earlier action had masked it


def parameter_of(node: fx.Node, name: str) -> str | None:
    """The name in the model of the parameter that is argument `name` of `node`, behind a mask or not; None where there
    is none, or where it is computed otherwise."""
    value = arguments(node).get(name)
    if node.op == "call_module":
        return None if value is None else f"{node.target}.{name}"
    if isinstance(value, fx.Node) and kind_of(value) == "mask":
        value = value.args[0]
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _tensor(module: nn.Module, name: str) -> object:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf, None)


class Masking:
    """Puts masks into one graph. It knows which nodes read each tensor, under whatever name."""

    def __init__(self, captured: Captured) -> None:
        """Looks at every node once."""
        self.captured = captured
        self.readers: dict[int, list[fx.Node]] = {}  # by the identity of the tensor: `get_attr` nodes, calls of modules
        for node in captured.graph.nodes:
            for tensor in self._read(node):
                self.readers.setdefault(id(tensor), []).append(node)

    def _read(self, node: fx.Node) -> list[object]:
        if node.op == "get_attr":
            return [_tensor(self.captured.module, str(node.target))]
        return list(module_of(node).parameters()) if node.op == "call_module" else []

    def of(self, name: str) -> list[fx.Node]:
        """The nodes that read the very tensor called `name`."""
        return self.readers.get(id(_tensor(self.captured.module, name)), [])

    def why_not(self, node: fx.Node, name: str) -> str | None:
        """Why the parameter that is argument `name` of `node` can't get a mask, or None."""
        parameter = parameter_of(node, name)
        if parameter is None:
            return f"its {name} is computed in the model, it isn't a parameter"
        if not isinstance(_tensor(self.captured.module, parameter), nn.Parameter):
            return f"its {name} is a buffer, not a parameter"
        for call in self.of(parameter):
            why = unexposable(call) if call.op == "call_module" else None
            if why is not None:
                return why if call is node else f"`{call.target}` uses the same tensor, and {why}"
        return None

    def insert(self, node: fx.Node, name: str, evidence: Evidence) -> Masked:
        """Put a mask on the parameter that is argument `name` of `node`, or find the one that is there.

        All readers of the tensor see the mask, through whatever name they read it: a tensor that is tied can't be
        masked for one of its uses only. Ask `why_not` first.
        """
        parameter = parameter_of(node, name)
        assert parameter is not None
        for call in [reader for reader in self.of(parameter) if reader.op == "call_module"]:
            self._expose(call)
        readers = self.of(parameter)
        old = [user for reader in readers for user in reader.users if kind_of(user) == "mask"]
        target = str(old[0].target) if old else f"{parameter}_mask"
        if not old or mask_module(self.captured, target).collects != evidence:
            _put_module(self.captured, target, parameter, evidence)
        calls = tuple(old) or tuple(_call(self.captured, reader, target) for reader in readers)
        return Masked(parameter, target, tuple(readers), calls, fresh=not old)

    def _expose(self, call: fx.Node) -> None:
        for tensor in self._read(call):
            self.readers[id(tensor)].remove(call)
        expose(self.captured, call)
        for reader in call.all_input_nodes:
            if reader.op == "get_attr":
                self.readers.setdefault(id(_tensor(self.captured.module, str(reader.target))), []).append(reader)


def _put_module(captured: Captured, target: str, parameter: str, evidence: Evidence) -> None:
    """Make the mask module, on the parameter's device; it takes over the bits of the one that it replaces."""
    tensor = captured.module.get_parameter(parameter)
    mask = Mask(tensor.shape, evidence, device=tensor.device, dtype=tensor.dtype)
    owner, _, leaf = target.rpartition(".")
    old = getattr(captured.module.get_submodule(owner), leaf, None)
    if isinstance(old, Mask):
        mask.put(old.mask)
    setattr(captured.module.get_submodule(owner), leaf, mask)
    if evidence != "none" and captured.concrete and tensor.grad is not None:
        mask.collect(tensor.detach(), tensor.grad)


def _call(captured: Captured, reader: fx.Node, target: str) -> fx.Node:
    users = list(reader.users)
    with captured.module.graph.inserting_after(reader):
        call = captured.module.graph.call_module(target, (reader,))
    call.meta["path"] = target
    for user in users:
        user.replace_input_with(reader, call)
    return call


def is_there(captured: Captured, path: str) -> bool:
    """Whether a module is at `path` still."""
    owner, _, name = path.rpartition(".")
    try:
        return name in captured.module.get_submodule(owner)._modules
    except AttributeError:
        return False


def mask_module(captured: Captured, name: str) -> Mask:
    """The mask called `name`."""
    found = captured.module.get_submodule(name)
    assert isinstance(found, Mask)
    return found


def layout_of(node: fx.Node, name: str = "weight") -> Layout:
    """How argument `name` of a convolution, a linear layer or an embedding lies in memory."""
    if name == "bias":
        return Layout()
    return Layout(kind_of(node).startswith("conv_transpose"), int(arguments(node).get("groups", 1)))


def mask_calls(captured: Captured) -> list[fx.Node]:
    """Every mask in the graph."""
    return [node for node in captured.module.graph.nodes if kind_of(node) == "mask"]


def remove_masks(captured: Captured, *, fold: bool) -> list[fx.Node]:
    """Take every mask off and make its layers modules again; returns the layers. With `fold`, masked weights become
    zero, else they keep the values they had."""
    module, graph = captured.module, captured.module.graph
    layers: dict[fx.Node, None] = {}
    for call in mask_calls(captured):
        reader, mask = call.args[0], module_of(call)
        assert isinstance(reader, fx.Node) and isinstance(mask, Mask)
        if fold:
            _fold(module.get_parameter(str(reader.target)), mask.mask)
        layers.update(dict.fromkeys(call.users))
        call.replace_all_uses_with(reader)
        graph.erase_node(call)
    for name in [name for name, child in module.named_modules() if isinstance(child, Mask)]:
        module.delete_submodule(name)
    for layer in layers:
        if kind_of(layer) in EXPOSABLE:
            absorb(captured, layer)
    return list(layers)


def _fold(parameter: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        parameter.mul_(mask)
