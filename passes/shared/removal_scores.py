"""Scores of the components of a model for `remove`: what its criterion sees, and what it says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.graph.coupling import Coupling, Mask
from fxcompress.graph.coupling_flow import Consumed, Labels, TensorLabels
from fxcompress.graph.interpret import evaluated
from fxcompress.graph.ops import arguments, kind_of, path_of
from fxcompress.passes.shared.criteria import Part, Scoring, criterion_of
from fxcompress.passes.shared.layers import Ints, Layer
from fxcompress.passes.shared.ranking import Scores
from fxcompress.passes.shared.responses import Measured, live_nodes, responses_of

if TYPE_CHECKING:
    from fxcompress.passes.remove import Remove

NORMS = frozenset((*(f"batchnorm{n}d" for n in (1, 2, 3)), "batchnorm"))
_SCALED = ("batchnorm", "instancenorm", "layernorm", "groupnorm", "rmsnorm")  # what their kinds begin with


def scores_of(settings: Remove, coupling: Coupling, layers: list[Layer], candidates: Mask,
              measured: Measured | None = None) -> Scores:
    """One number a component; `measured` is what calibration data say of the candidates. On a skeleton the first ones
    leave."""
    if not coupling.captured.concrete:
        return np.arange(coupling.count, dtype=np.float64)
    numbers = np.full(coupling.count, -1, dtype=np.int64)
    chosen = np.flatnonzero(candidates)
    numbers[chosen] = np.arange(len(chosen))
    generator = torch.Generator().manual_seed(settings.seed)
    coupled = settings.slices == "coupled"
    slices = _made(coupling, layers, followers=coupled)
    weights = tuple(_parts(coupling, (*slices, *_scaling(coupling), *_reading(coupling)) if coupled else slices,
                           numbers))
    criterion = criterion_of(settings.by)
    scales = tuple(_scales(coupling, numbers)) if criterion.needs == "scales" else ()
    responses = responses_of(coupling, measured or {}, numbers)
    scoring = Scoring(len(chosen), weights, scales, generator, settings.reduce, responses, coupled)
    result = np.full(coupling.count, np.inf)
    result[chosen] = criterion.score(scoring, settings.by).double().cpu().numpy()
    return result


@dataclass(frozen=True)
class _Slice:
    """Dimension `dim` of `tensor`, called `name`, which `node` reads; `value` is the node that gives what it really
    reads, where that isn't an argument called `weight`."""

    node: fx.Node
    layer: str
    name: str
    tensor: Tensor
    dim: int
    labels: Labels
    value: fx.Node | None = None

    def seen(self, root: nn.Module) -> Tensor:
        """What the layer computes with."""
        if self.value is None:
            return _effective(root, self.node, self.tensor, self.name)
        with torch.no_grad():
            value = evaluated(root, self.value)
        return value if isinstance(value, Tensor) else self.tensor


def _parts(coupling: Coupling, slices: Iterable[_Slice], numbers: Ints) -> Iterator[Part]:
    """The slices that candidates are in, each dimension of a tensor once."""
    numbered = np.append(numbers, -1)  # the last entry is that of the component -1
    seen: set[tuple[int, int]] = set()
    for one in slices:
        key = (id(one.tensor), one.dim)
        if key not in seen:
            seen.add(key)
            where = numbered[coupling.of(one.labels)]
            if (where >= 0).any():
                yield part_of(one.layer, one.tensor, one.dim, where, one.seen(coupling.captured.module))


def _tracked(coupling: Coupling) -> dict[str, TensorLabels]:
    """The parameters by all their names, with their labels."""
    return {name: entry for entry in coupling.flow.tensors.values() if isinstance(entry.tensor, nn.Parameter)
            for name in entry.names}


def _made(coupling: Coupling, layers: list[Layer], followers: bool) -> Iterator[_Slice]:
    """The weights that make channels; with `followers` those too that only carry them on, as of depthwise ones."""
    tracked = _tracked(coupling)
    for layer in layers:
        for name, dim in () if layer.follows and not followers else layer.made.weights:
            entry = tracked.get(name)
            labels = entry.dims[dim] if entry is not None else None
            if entry is not None and labels is not None:
                yield _Slice(layer.node, layer.path, name, entry.tensor, dim, labels)


def _scaling(coupling: Coupling) -> Iterator[_Slice]:
    """The scales of norms on channels."""
    tracked = _tracked(coupling)
    for node in coupling.flow.nodes:
        if kind_of(node).startswith(_SCALED):
            weight = None if node.op == "call_module" else arguments(node).get("weight")
            name = str(weight.target) if isinstance(weight, fx.Node) else f"{node.target}.weight"
            entry = tracked.get(name)
            for dim, labels in enumerate(entry.dims) if entry is not None else ():
                if entry is not None and labels is not None:
                    yield _Slice(node, path_of(node) or node.name, name, entry.tensor, dim, labels)


def _reading(coupling: Coupling) -> Iterator[_Slice]:
    """The weights that sum over channels, along these: of a layer, or the other operand of a product."""
    tracked, live = _tracked(coupling), live_nodes(coupling)
    for entry in coupling.flow.consumed:
        if entry.node not in live:  # it computes a weight
            continue
        path = path_of(entry.node) or entry.node.name
        if isinstance(entry.target, str):
            owner = tracked.get(entry.target)
            if owner is not None and "bias" not in entry.target.rpartition(".")[2]:
                yield _Slice(entry.node, path, entry.target, owner.tensor, entry.dim, entry.labels)
            continue
        for node, dim in _operands(coupling, entry, live):
            name = _origin(node)
            owner = tracked.get(name)
            if owner is not None:
                yield _Slice(entry.node, path, name, owner.tensor, dim, entry.labels, node)


def _operands(coupling: Coupling, entry: Consumed, live: set[fx.Node]) -> Iterator[tuple[fx.Node, int]]:
    """The operands of a product that don't depend on the model's inputs, and the dimension it sums over."""
    if isinstance(entry.target, fx.Node) and entry.target not in live:
        yield entry.target, entry.dim
        return
    wanted = coupling.of(entry.labels)
    for source in entry.node.all_input_nodes:
        dims = coupling.flow.values[source] if source not in live else None
        for dim, labels in enumerate(dims) if isinstance(dims, tuple) and len(dims) > 1 else ():
            if labels is not None and np.array_equal(coupling.of(labels), wanted):
                yield source, dim


def _origin(node: fx.Node) -> str:
    """The tensor at the beginning of a chain of nodes; empty where there is none."""
    while node.op != "get_attr":
        inputs = [source for source in node.all_input_nodes if source.op != "placeholder"]
        if not inputs:
            return ""
        node = inputs[0]
    return str(node.target)


def _effective(root: nn.Module, node: fx.Node, tensor: Tensor, name: str) -> Tensor:
    """What a layer really computes with: its weight after a mask or a norm on it; `tensor`, called `name`, where that
    isn't known."""
    if node.op == "call_module" and ".parametrizations." not in name:
        return tensor
    weight = arguments(node).get("weight")
    if isinstance(weight, fx.Node):
        with torch.no_grad():
            weight = evaluated(root, weight)
    return weight if isinstance(weight, Tensor) and weight.shape == tensor.shape else tensor


def part_of(path: str, tensor: Tensor, dim: int, where: Ints, value: Tensor | None = None) -> Part:
    """Dimension `dim` of `tensor` for a scoring, whose components `where` numbers, -1 for none; `value` is what the
    layer computes with, where that is another tensor."""
    value = tensor if value is None else value
    grad = tensor.grad if tensor.grad is not None and _same_where_kept(value, tensor) else None
    return Part(path, value, dim, torch.from_numpy(where), grad)


def _same_where_kept(value: Tensor, tensor: Tensor) -> bool:
    """Whether `value` is `tensor`, perhaps with some weights zeroed: then the gradient of one is that of the other."""
    return value is tensor or (value.shape == tensor.shape and bool(((value == tensor) | (value == 0)).all()))


def _scales(coupling: Coupling, numbers: Ints) -> list[Part]:
    """The scales of batch norms on candidate channels."""
    parts = []
    for node in coupling.flow.nodes:
        if node.op != "call_module" or kind_of(node) not in NORMS:
            continue
        name = f"{node.target}.weight"
        if coupling.flow.has(name):
            dim = coupling.flow.tensor(name)[0]
            if dim is not None:
                inside = coupling.of(dim)
                where = np.where(inside >= 0, numbers[inside], -1)
                parts.append(part_of(str(node.target), coupling.captured.module.get_parameter(name), 0, where))
    return parts
