"""`smooth`: outliers of what linear layers read behind a norm go over into their weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023, equation
4: channel j of what is read is divided by s_j = max|X_j|^α / max|W_j|^(1−α), and column j of the weights multiplied by
it. Where these layers alone read the norm, the division goes into its weight and bias; where others read it too (the
residual of a post-norm transformer), it is a product of its own in front of the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.graph.calibration import Calibration
from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, call, kind_of, module_of, path_of
from fxcompress.passes.shared.inference import vanishes
from fxcompress.passes.shared.masking import parameter_of
from fxcompress.passes.shared.normalizing import few
from fxcompress.passes.shared.recovery import RECOVERY, Layer, Sharing
from fxcompress.passes.shared.recovery_equalize import Largest
from fxcompress.passes.shared.switching import without_rounding

NORMS = ("layernorm", "rmsnorm")
SMOOTHING = "smoothing"  # key of `node.meta`: a product that divides what layers read by s
_LEAST = 1e-5  # of a factor, as in the paper's code


def make_room(captured: Captured, products: Iterable[fx.Node]) -> None:
    """Put a product with ones between each norm and the linear layers of `products` that read it, where they aren't its
    only readers. The caller refreshes."""
    wanted = [node for node in products if kind_of(node) == "linear" and node.meta[RECOVERY].smooth]
    reading: dict[fx.Node, list[fx.Node]] = {}  # what they read: a norm, or what vanishes behind one
    for node in wanted:
        if _norm(node) is not None:
            reading.setdefault(arguments(node)["input"], []).append(node)
    for source, readers in reading.items():
        norm = _norm(readers[0])
        assert norm is not None
        if set(_readers(norm)) <= set(wanted) and _affine(norm) is not None:
            continue
        name = f"{path_of(source).replace('.', '_') or source.name}_smoothing"
        width = norm.meta["fxc"].shape[-1]
        device = next((tensor.device for tensor in captured.module.parameters()), None)
        captured.module.register_buffer(name, torch.ones(width, device=device))
        with captured.graph.inserting_after(source):
            ones = captured.graph.get_attr(name)
        with captured.graph.inserting_after(ones):
            made = call(captured.graph, "mul", source, ones)
        for node in (ones, made):
            node.meta["path"] = path_of(source)
        made.meta[SMOOTHING] = name
        for node in readers:
            node.replace_input_with(source, made)


def _norm(node: fx.Node) -> fx.Node | None:
    """The norm that a linear layer reads, behind quantizers and what vanishes."""
    source = arguments(node)["input"]
    while isinstance(source, fx.Node) and (kind_of(source) == "quantizer" or vanishes(source)):
        source = next(iter(source.all_input_nodes))
    return source if isinstance(source, fx.Node) and kind_of(source) in NORMS else None


def _affine(norm: fx.Node) -> list[Tensor] | None:
    """Weight and bias (where there is one) of a norm over the last dimension; None without a weight."""
    root = norm.graph.owning_module
    assert root is not None
    if norm.op == "call_module":
        module = module_of(norm)
        found = [getattr(module, name, None) for name in ("weight", "bias")]
    else:
        names = [parameter_of(norm, name) for name in ("weight", "bias")]
        found = [None if name is None else root.get_parameter(name) for name in names]
        if any(name is None and arguments(norm).get(which) is not None
               for name, which in zip(names, ("weight", "bias"), strict=True)):
            return None
    if found[0] is None or found[0].dim() != 1:
        return None
    return [tensor for tensor in found if tensor is not None]


@dataclass
class _Group:
    """Linear layers that read one value, and the tensors that are divided."""

    source: fx.Node
    layers: list[Layer]
    divided: list[Tensor]
    values: Largest

    def factors(self) -> Tensor:
        """s for each channel (equation 4)."""
        assert self.values.seen is not None
        alpha = self.layers[0].asked.smooth
        weights = torch.stack([layer.weight().abs().amax(0) for layer in self.layers]).amax(0)
        s = self.values.seen.pow(alpha) / weights.clamp(min=_LEAST).pow(1 - alpha)
        return torch.where((self.values.seen > 0) & (weights > 0), s.clamp(min=_LEAST), torch.ones_like(s))

    def scale(self, s: Tensor) -> None:
        with torch.no_grad():
            for tensor in self.divided:
                tensor.div_(s)
            for layer in self.layers:
                weight = layer.tensor("weight")
                assert weight is not None
                weight.mul_(s)


def smooth(captured: Captured, layers: Sequence[Layer], data: Calibration) -> tuple[list[Layer], list[str]]:
    """Smooth what the layers that ask for it read. Returns the layers whose weights have changed, and notes."""
    wanted = [layer for layer in layers if layer.asked.smooth]
    notes: list[str] = []
    groups = list(_groups(captured, wanted, notes))
    if groups:
        with without_rounding(captured):
            data.feed(captured, {group.source: [group.values] for group in groups})
    for group in groups:
        group.scale(group.factors())
    if wanted:
        count = sum(len(group.layers) for group in groups)
        notes.insert(0, f"smooth: {count} linear layers behind {len(groups)} norms")
    return [layer for group in groups for layer in group.layers], notes


def _groups(captured: Captured, layers: Sequence[Layer], notes: list[str]) -> Iterator[_Group]:
    sharing, by_source, skipped = Sharing(captured), dict[fx.Node, list[Layer]](), dict[str, list[str]]()
    for layer in layers:
        source = _source(layer)
        if kind_of(layer.node) != "linear":
            why: str | None = "it isn't a linear layer"
        else:
            why = "it reads no norm" if source is None else sharing.why_not(layer)
        if why is not None:
            skipped.setdefault(why, []).append(layer.name)
        elif source is not None:
            by_source.setdefault(source, []).append(layer)
    for source, readers in by_source.items():
        divided = [captured.module.get_buffer(source.meta[SMOOTHING])] if SMOOTHING in source.meta else _affine(source)
        all_read = {layer.node for layer in readers} >= set(_readers(source))
        if divided is None or not all_read:
            skipped.setdefault("others read the norm too" if divided is not None else "the norm has no weight",
                               []).extend(layer.name for layer in readers)
        else:
            yield _Group(source, readers, divided, Largest(-1))
    notes += [f"smooth: not {few(names)}: {why}" for why, names in skipped.items()]


def _source(layer: Layer) -> fx.Node | None:
    """The norm that `layer` reads, or the product behind it that divides."""
    source = layer.data
    while kind_of(source) == "quantizer" or vanishes(source):
        source = next(iter(source.all_input_nodes))
    return source if SMOOTHING in source.meta or kind_of(source) in NORMS else None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the numbers of `node`, behind quantizers and what vanishes."""
    for user in node.users:
        if kind_of(user) == "quantizer" or vanishes(user):
            yield from _readers(user)
        else:
            yield user
