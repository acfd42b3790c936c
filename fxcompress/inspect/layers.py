"""Layers as a person reads them: one row an operator, with its settings, sizes and provenance, apart from any graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..diagnostics import ArtifactError, Diagnostic
from ..graph.captured import Captured, Origin
from ..graph.modules import leaf_of
from ..graph.opbase import REQUIRED
from ..graph.ops import ON_WEIGHTS, arguments, kind_of, module_of, op_of, path_of
from ..graph.predicates import PROPERTIES
from ..graph.provenance import origins_of
from ..graph.select import label
from ..render import clean

# Part of what they feed, or of the signature.
HIDDEN = frozenset({"input", "output", "parameter", "by_mode", *ON_WEIGHTS})
SETTINGS = ("in_channels", "out_channels", "in_features", "out_features", "channels", "embeddings", "embedding_dim",
            "hidden_size", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
SIZES = frozenset({"kernel_size", "stride", "padding", "dilation", "output_size", "size", "normalized_shape",
                   "output_padding"})  # shown as 3x3
_UNFIT = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
Held = tuple[Tensor, Tensor]  # a tensor as it is, and as it takes effect (masked)


@dataclass(frozen=True)
class Layer:
    """One operator. `label` is what it is called: its module's path for a layer, its node's name for another function
    or a second call. `settings` are texts by name; `shape` is that of its value as a text, N for the batch.

    `params` and `bytes` are those of the parameters and buffers it reads; `weights` counts the elements of its
    parameters of two dimensions or more (biases and norms have fewer), `zeros` those of them that are zero, None where
    values are not known; `macs` are the multiply-accumulates of one sample.
    """

    label: str
    name: str
    path: str
    kind: str
    settings: Mapping[str, str]
    shape: str
    params: int
    weights: int
    zeros: int | None
    macs: int
    bytes: int
    source: str
    origins: tuple[Origin, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """Totals of a model, as those of a `Layer`. Weights that are used twice count once."""

    params: int
    weights: int
    zeros: int | None
    macs: int
    bytes: int

    def to_json(self) -> dict[str, int | None]:
        """The totals as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Snapshot:
    """A model as rows and totals."""

    layers: tuple[Layer, ...]
    sizes: Sizes

    @staticmethod
    def of(model: Captured | fx.GraphModule) -> Snapshot:
        """The snapshot of a captured or loaded model."""
        return Snapshot(layers_of(model), sizes_of(model))


def module_of_model(model: Captured | fx.GraphModule) -> fx.GraphModule:
    """The GraphModule of either."""
    return model.module if isinstance(model, Captured) else model


def batch_of(graph: fx.Graph) -> int:
    """The batch size that the facts are at: the first dimension of the first input that has one, else 1."""
    for node in graph.nodes:
        shape = getattr(node.meta.get("fxc"), "shape", None)
        if node.op == "placeholder" and shape and isinstance(shape[0], int):
            return max(1, shape[0])
    return 1


def layers_of(model: Captured | fx.GraphModule) -> tuple[Layer, ...]:
    """A row for each operator of `model`, in graph order. Weights on the meta device have no zeros to count.
    Raises ArtifactError (FXC0604) for a call that can't be read."""
    module = module_of_model(model)
    batch = batch_of(module.graph)
    taken: set[str] = set()
    rows = []
    for node in module.graph.nodes:
        if kind_of(node) not in HIDDEN:
            name = label(node) if label(node) not in taken else node.name
            taken.add(name)
            rows.append(_checked_layer(node, name, batch))
    return tuple(rows)


def _checked_layer(node: fx.Node, name: str, batch: int) -> Layer:
    """The row of `node`. In a stranger's artifact the arguments of a call may be anything."""
    try:
        return _layer(node, name, batch)
    except _UNFIT as error:
        raise ArtifactError([Diagnostic(
            "FXC0604", f"the arguments of the node {clean(node.name)} don't fit its operator {kind_of(node)}",
            notes=(clean(str(error)),), help="take the artifact from its source again, or compile it anew")]) from error


def sizes_of(model: Captured | fx.GraphModule) -> Sizes:
    """The totals of `model` over what its graph reads."""
    module = module_of_model(model)
    held: dict[int, Held] = {}
    for node in module.graph.nodes:
        held.update((id(tensor), (tensor, effective)) for tensor, effective in _held(node, inside=False))
    params, weights = _kinds(list(held.values()))
    macs = sum(getattr(node.meta.get("fxc"), "macs", 0) for node in module.graph.nodes) // batch_of(module.graph)
    return Sizes(_elements(params), _elements(weights), _zeros(weights), macs,
                 sum(tensor.numel() * tensor.element_size() for tensor, _ in held.values()))


def _layer(node: fx.Node, name: str, batch: int) -> Layer:
    fact = node.meta.get("fxc")
    held = _held(node)
    params, weights = _kinds(held)
    return Layer(
        label=name, name=node.name, path=path_of(node), kind=kind_of(node), settings=_settings(node),
        shape=_shape_text(getattr(fact, "shape", None), getattr(fact, "dynamic", ()), batch),
        params=_elements(params), weights=_elements(weights), zeros=_zeros(weights),
        macs=getattr(fact, "macs", 0) // batch,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor, _ in held),
        source=str(node.meta.get("source", "")), origins=_origins(node))


def _weights_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that feed weights to `node`: parameters, masks and quantizers on them. A quantizer reads the factors of
    a norm too, which belong to that."""
    inputs = node.all_input_nodes[:1] if kind_of(node) == "quantizer" else node.all_input_nodes
    return [source for source in inputs if kind_of(source) in ("parameter", *ON_WEIGHTS)]


def _held(node: fx.Node, inside: bool = True) -> list[Held]:
    """The tensors that `node` reads, each as it is and as it takes effect (masked). With `inside`, also those that
    `get_attr` and mask nodes feed it."""
    kind = kind_of(node)
    root = node.graph.owning_module
    if node.op == "get_attr" and root is not None:
        path, _, name = str(node.target).rpartition(".")
        value = getattr(root.get_submodule(path), name)
        return [(value, value)] if isinstance(value, Tensor) else []
    if kind == "mask":
        kept = cast(Tensor, module_of(node).mask)
        return [(tensor, effective * kept) for source in _weights_of(node) for tensor, effective in _held(source)]
    own = [(tensor, tensor) for tensor in _own(node)] if kind != "quantizer" else []
    return own + ([pair for source in _weights_of(node) for pair in _held(source)] if inside else [])


def _own(node: fx.Node) -> list[Tensor]:
    if node.op != "call_module":
        return []
    module = module_of(node)
    return [*module.parameters(), *module.buffers()]


def _origins(node: fx.Node) -> tuple[Origin, ...]:
    """The provenance of `node`, and that of what feeds it weights for rules that left none on `node` itself."""
    entries = list(origins_of(node))
    for source in _weights_of(node):
        known = {(entry.verb, entry.place, entry.line, entry.phase) for entry in entries}
        entries += [entry for entry in _origins(source)
                    if (entry.verb, entry.place, entry.line, entry.phase) not in known]
    return tuple(entries)


def _kinds(held: Sequence[Held]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters among `held`, and of these those of two dimensions or more, both as they take effect."""
    params = [effective for tensor, effective in held if isinstance(tensor, torch.nn.Parameter)]
    return params, [tensor for tensor in params if tensor.dim() > 1]


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _zeros(tensors: Sequence[Tensor]) -> int | None:
    if any(tensor.is_meta for tensor in tensors):
        return None
    return sum(tensor.numel() - int(torch.count_nonzero(tensor)) for tensor in tensors)


def _settings(node: fx.Node) -> dict[str, str]:
    """What `node` is set to: the properties that selectors ask for, then its other constant arguments, without
    defaults."""
    found = {name: PROPERTIES[name].get(node) for name in SETTINGS}
    texts = {name: text_of(value, name in SIZES) for name, value in found.items() if value is not None}
    for name, value in _constants(node).items():
        texts.setdefault(name, text_of(value, name in SIZES))
    return texts


def _constants(node: fx.Node) -> dict[str, Any]:
    op = op_of(node)
    defaults = {param.name: param.default for param in op.params} if op is not None else {}
    tensors = leaf_of(type(module_of(node))) if node.op == "call_module" else None
    hidden = {*tensors[1].tensors, *tensors[1].inputs} if tensors is not None else {"input"}
    return {name: value for name, value in arguments(node).items()
            if name not in hidden and not _holds_node(value) and not isinstance(value, Tensor)
            and not (name == "padding_mode" and value == "zeros")  # what a function does that has none
            and (defaults.get(name, REQUIRED) is REQUIRED or value != defaults[name])}


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)


def text_of(value: Any, sizes: bool = False) -> str:
    """A setting as a text: `64`, `true`, `(0, 2, 1)`, with `sizes` `3x3`; empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        items = [text_of(item) for item in value]
        return "x".join(items) if sizes else f"({', '.join(items)})"
    return str(value)


def _shape_text(shape: Any, dynamic: Any, batch: int) -> str:
    """`Nx64x56x56`, `(Nx8, Nx4)`; `2N` for twice the batch, `number` for a value that is no tensor."""
    if shape is None:
        return "number"
    if shape and not all(isinstance(size, int) for size in shape):
        inner = zip(shape, dynamic or ((),) * len(shape), strict=False)
        return f"({', '.join(_shape_text(one, moves, batch) for one, moves in inner)})"
    moves = dynamic if len(dynamic) == len(shape) else (False,) * len(shape)
    return "x".join(_size_text(size, batch) if moving is True else str(size)
                    for size, moving in zip(shape, moves, strict=True)) or "scalar"


def _size_text(size: int, batch: int) -> str:
    times = "" if size == batch else str(size // batch)
    return f"{times}N" if size % batch == 0 else f"{size}?"
