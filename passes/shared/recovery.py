"""What wins accuracy back after rounding: the settings that stay with each layer, and what the steps see of it.

The steps work on calibration data, so they run whenever there are some (`calibrating.py` has their order). Each layer
remembers what was asked for it in `node.meta["recovery"]`, and what it was before in `node.meta["unrounded"]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxcompress.graph.captured import Captured
from fxcompress.graph.interpret import evaluated
from fxcompress.graph.ops import arguments, kind_of, module_of
from fxcompress.graph.select import label
from fxcompress.nn.quantizer import Quantizer
from fxcompress.passes.shared.integer import Region, regions_of
from fxcompress.passes.shared.masking import parameter_of

RECOVERY, UNROUNDED = "recovery", "unrounded"  # keys of `node.meta`


@dataclass(frozen=True)
class Recovery:
    """What was asked for a layer; see the parameters of `Quantize`."""

    equalize: bool = False
    relu6_to_relu: bool = False
    smooth: float = 0.0
    adaround: bool = False
    gptq: bool = False
    correct_bias: bool = False
    mixed: float | str = 0.0

    def __bool__(self) -> bool:
        return self != Recovery()


@dataclass
class Unrounded:
    """The weight and bias of a layer before steps wrote others into its parameters, and the bias that they wrote."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    written_bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """A quantized product: its node, the quantizer on its weight and the call of it, the settings for it."""

    node: fx.Node
    call: fx.Node
    quantizer: Quantizer
    asked: Recovery
    region: Region

    @property
    def name(self) -> str:
        """What to call it in a note."""
        return label(self.node)

    @property
    def data(self) -> fx.Node:
        """The node whose value it multiplies."""
        found = arguments(self.node)["input"]
        assert isinstance(found, fx.Node)
        return found

    def tensor(self, name: str) -> Tensor | None:
        """Its parameter that is argument `name`, None where that is computed."""
        if name == "weight":
            source = self.call.args[0]
            if isinstance(source, fx.Node) and kind_of(source) == "mask":
                source = source.args[0]
            path = str(source.target) if isinstance(source, fx.Node) and source.op == "get_attr" else None
        else:
            path = parameter_of(self.node, name)
        return None if path is None else _tensor(self.node, path)

    def weight(self) -> Tensor:
        """The weight before it is rounded, masked zeros in it."""
        root = self.node.graph.owning_module
        assert root is not None
        value: Tensor = evaluated(root, self.call.args[0])  # type: ignore[arg-type]
        return value.detach()

    def rounded(self) -> Tensor:
        """The weight as the product reads it."""
        return self.quantizer(self.weight()).detach()  # type: ignore[no-any-return]

    def write(self, weight: Tensor) -> None:
        """Put `weight`, which its quantizer rounds to itself, in the place of the parameter, which is kept."""
        parameter = self.tensor("weight")
        assert parameter is not None
        kept = self.node.meta.setdefault(UNROUNDED, Unrounded())
        if kept.weight is None:
            kept.weight = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(weight)

    def write_bias(self, bias: Tensor) -> None:
        """Put `bias` in the place of the parameter, which is kept."""
        parameter = self.tensor("bias")
        assert parameter is not None
        kept = self.node.meta.setdefault(UNROUNDED, Unrounded())
        kept.bias = parameter.detach().clone() if kept.bias is None else kept.bias
        with torch.no_grad():
            parameter.copy_(bias)
        kept.written_bias = parameter.detach().clone()

    def restore(self) -> None:
        """Bring weight and bias back to what they were before they were written, where they have stayed as written (no
        training came between)."""
        self.restore_bias()
        kept = self.node.meta.pop(UNROUNDED, None)
        weight = self.tensor("weight")
        if kept is not None and kept.weight is not None and weight is not None and (
                weight.shape == kept.weight.shape and torch.equal(self.weight(), self.rounded())):
            with torch.no_grad():
                weight.copy_(kept.weight)

    def restore_bias(self) -> None:
        """The same of the bias alone."""
        kept, bias = self.node.meta.get(UNROUNDED), self.tensor("bias")
        if kept is not None and kept.bias is not None and bias is not None and (
                bias.shape == kept.bias.shape and torch.equal(bias, kept.written_bias)):
            with torch.no_grad():
                bias.copy_(kept.bias)
            self.node.meta[UNROUNDED] = Unrounded(kept.weight)  # copies of the graph share what it was

    def grid(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point) of each number of the weight, in its shape."""
        weight = self.weight()
        places = torch.arange(1, weight.numel() + 1, device=weight.device).reshape(weight.shape)
        rows = self.quantizer.in_rows(places)  # zeros where a group is filled up
        row = torch.arange(len(rows), device=weight.device)[:, None].expand_as(rows)
        of = torch.zeros(weight.numel() + 1, dtype=torch.long, device=weight.device)
        of[rows.flatten()] = row.flatten()
        of = of[1:].reshape(weight.shape)
        return self.quantizer.scale[of], self.quantizer.zero_point[of].to(weight.dtype)


def _tensor(node: fx.Node, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    root = node.graph.owning_module
    assert root is not None
    found: Tensor = getattr(root.get_submodule(owner), leaf)
    return found


def layers_of(captured: Captured) -> list[Layer]:
    """Every quantized product, in graph order."""
    found = []
    for node in captured.graph.nodes:
        call = arguments(node).get("weight") if node.op == "call_function" else None
        if isinstance(call, fx.Node) and call.op == "call_module" and isinstance(module_of(call), Quantizer):
            found.append((node, call))
    regions = regions_of([node for node, _ in found])
    return [Layer(node, call, module_of(call), node.meta.get(RECOVERY, Recovery()), region)  # type: ignore[arg-type]
            for (node, call), region in zip(found, regions, strict=True)]


@dataclass
class Sharing:
    """Which parameters more than one node reads: what is written into them for one layer would change another."""

    captured: Captured
    readers: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for node in self.captured.graph.nodes:
            if node.op == "get_attr":
                self.readers[id(_tensor(node, str(node.target)))] += len(node.users)
            elif node.op == "call_module":
                self.readers.update(id(tensor) for tensor in module_of(node).parameters())

    def why_not(self, layer: Layer, names: Iterable[str] = ("weight",)) -> str | None:
        """Why the parameters of `layer` can't be written for it alone, or None. It needs no bias."""
        for name in names:
            tensor = layer.tensor(name)
            if tensor is None and (name == "weight" or arguments(layer.node).get(name) is not None):
                return f"its {name} is computed in the model"
            if tensor is not None and self.readers[id(tensor)] > 1:
                return f"its {name} is shared with other layers"
        return None


def spread(x: Tensor, dim: int, like: Tensor) -> Tensor:
    """The vector `x` so that it broadcasts along dimension `dim` of `like`."""
    return x.reshape([-1 if at == dim % like.dim() else 1 for at in range(like.dim())])
