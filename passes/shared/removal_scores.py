"""Scores of the components of a model for `remove`: what its criterion sees, and what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.graph.coupling import Coupling, Mask
from fxcompress.graph.ops import arguments, kind_of
from fxcompress.passes.shared.criteria import Part, Scoring, criterion_of
from fxcompress.passes.shared.layers import Ints, Layer
from fxcompress.passes.shared.ranking import Scores
from fxcompress.passes.shared.responses import Measured, responses_of

if TYPE_CHECKING:
    from fxcompress.passes.remove import Remove

NORMS = frozenset((*(f"batchnorm{n}d" for n in (1, 2, 3)), "batchnorm"))


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
    weights = tuple(_parts(coupling, layers, numbers))
    criterion = criterion_of(settings.by)
    scales = tuple(_scales(coupling, numbers)) if criterion.needs == "scales" else ()
    responses = responses_of(coupling, measured or {}, numbers)
    scoring = Scoring(len(chosen), weights, scales, generator, settings.reduce, responses)
    result = np.full(coupling.count, np.inf)
    result[chosen] = criterion.score(scoring, settings.by).double().cpu().numpy()
    return result


def _parts(coupling: Coupling, layers: list[Layer], numbers: Ints) -> list[Part]:
    """The weights that make candidate channels, each tensor once."""
    tracked = {name: entry for entry in coupling.flow.tensors.values() for name in entry.names}
    numbered = np.append(numbers, -1)  # the last entry is that of the component -1
    seen: set[tuple[int, int]] = set()
    parts = []
    for layer in layers:
        for name, dim in () if layer.follows else layer.made.weights:
            entry = tracked.get(name)
            labels = entry.dims[dim] if entry is not None and isinstance(entry.tensor, nn.Parameter) else None
            if entry is None or labels is None or (id(entry.tensor), dim) in seen:
                continue
            seen.add((id(entry.tensor), dim))
            where = numbered[coupling.of(labels)]
            if (where >= 0).any():
                value = _effective(coupling.captured.module, layer, entry.tensor, name)
                parts.append(part_of(layer.path, entry.tensor, dim, where, value))
    return parts


def _effective(root: nn.Module, layer: Layer, tensor: Tensor, name: str) -> Tensor:
    """What the layer really computes with: its weight after a mask or a norm on it; `tensor`, called `name`, where that
    isn't known."""
    if layer.node.op == "call_module" and ".parametrizations." not in name:
        return tensor
    weight = arguments(layer.node).get("weight")
    if isinstance(weight, fx.Node):
        with torch.no_grad():
            weight = evaluated(root, weight)
    return weight if isinstance(weight, Tensor) and weight.shape == tensor.shape else tensor


def evaluated(root: nn.Module, node: fx.Node) -> Any:
    """The value of a node that only parameters and buffers go into; None for any other."""
    if node.op == "placeholder":
        return None
    if node.op == "get_attr":
        prefix, _, name = str(node.target).rpartition(".")
        return getattr(root.get_submodule(prefix), name)
    values = {source: evaluated(root, source) for source in node.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: values[source])
    function: Any = root.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return function(*args, **kwargs)


def part_of(path: str, tensor: Tensor, dim: int, where: Ints, value: Tensor | None = None) -> Part:
    """Dimension `dim` of `tensor` for a scoring, whose components `where` numbers, -1 for none; `value` is what the
    layer computes with, where that is another tensor."""
    def rows(value: Tensor) -> Tensor:
        precise = torch.promote_types(value.dtype, torch.float32)  # squares of half floats overflow
        return value.detach().to(precise).movedim(dim, 0).reshape(value.shape[dim], -1)

    value = tensor if value is None else value
    grad = rows(tensor.grad) if tensor.grad is not None and _same_where_kept(value, tensor) else None
    return Part(path, rows(value), torch.from_numpy(where), grad)


def _same_where_kept(value: Tensor, tensor: Tensor) -> bool:
    """Whether `value` is `tensor`, perhaps with some weights zeroed: then the gradient of one is that of the other."""
    return value is tensor or bool(((value == tensor) | (value == 0)).all())


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
