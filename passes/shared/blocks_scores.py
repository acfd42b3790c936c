"""How important whole residual blocks are: what a criterion says of their weights, or how much they change what they
add to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.diagnostics import PlanError
from fxcompress.graph.calibration import missing
from fxcompress.graph.captured import Captured
from fxcompress.graph.interpret import evaluated
from fxcompress.graph.ops import kind_of, path_of
from fxcompress.graph.residual_blocks import Block
from fxcompress.graph.select import operators
from fxcompress.graph.site import Site
from fxcompress.passes.shared.criteria import Part, Scoring, criterion_of
from fxcompress.passes.shared.ranking import Scores
from fxcompress.passes.shared.removal_scores import NORMS, part_of

if TYPE_CHECKING:
    from fxcompress.passes.remove import Remove


def block_scores(settings: Remove, captured: Captured, site: Site, blocks: list[Block]) -> Scores:
    """One number a block, higher for what should stay.

    A block is one component of the scoring: a criterion sees each of its weights whole, and `reduce` says what becomes
    of several weights. `by = activation` is the block influence (see `Influence`). Raises PlanError: FXC0343, FXC0344
    as `Criterion.score` does, FXC0346 for `activation` without calibration data.
    """
    if settings.by == "activation":
        return _influences(captured, site, blocks)
    generator = torch.Generator().manual_seed(settings.seed)
    values = frozenset(operators(captured.graph))
    weights, scales = [], []
    for number, block in enumerate(blocks):
        layers = {layer for one in block.residuals for layer in one.layers}
        for node in (node for one in block.residuals for node in one.region):
            if node in layers:
                weights += _parts(captured, values, node, number)
            elif kind_of(node) in NORMS and node.op == "call_module":
                weight = getattr(captured.module_of(node), "weight", None)
                scales += [_part(str(node.target), weight, number)] if weight is not None else []
    scoring = Scoring(len(blocks), tuple(weights), tuple(scales), generator, settings.reduce)
    return np.asarray(criterion_of(settings.by).score(scoring, settings.by).double().cpu().numpy())


def _part(layer: str, tensor: Tensor, number: int, value: Tensor | None = None) -> Part:
    """All of a tensor as part of block `number`."""
    return part_of(layer, tensor, 0, np.full(tensor.shape[0], number), value)


def weights_of(captured: Captured, values: frozenset[fx.Node], node: fx.Node) -> list[tuple[str, Tensor]]:
    """The matrices and kernels that a layer multiplies by, by name. `values` are the nodes that depend on inputs."""
    if node.op == "call_module":
        named = captured.module_of(node).named_parameters()
        return [(f"{node.target}.{name}", tensor) for name, tensor in named if tensor.dim() > 1]
    found = {}
    ahead = _given(values, node)
    while ahead:
        source = ahead.pop()
        ahead += source.all_input_nodes
        if source.op == "get_attr":
            owner, _, name = str(source.target).rpartition(".")
            tensor: Any = getattr(captured.module.get_submodule(owner), name)
            if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
                found[str(source.target)] = tensor
    return sorted(found.items())


def _given(values: frozenset[fx.Node], node: fx.Node) -> list[fx.Node]:
    """What a function is given that doesn't depend on inputs."""
    return [given for given in node.all_input_nodes if given not in values and given.op != "placeholder"]


def _parts(captured: Captured, values: frozenset[fx.Node], node: fx.Node, number: int) -> list[Part]:
    """The weights of a layer as parts of block `number`; masked ones as they are under their masks."""
    given = _given(values, node) if node.op == "call_function" else []
    with torch.no_grad():
        computed = [value for one in given if isinstance(value := evaluated(captured.module, one), Tensor)]
    parts = []
    for _, tensor in weights_of(captured, values, node):
        masked = [value for value in computed if value.shape == tensor.shape]
        parts.append(_part(path_of(node), tensor, number, masked[0] if len(masked) == 1 else None))
    return parts


class Influence:
    """The block influence 1 - cos(x, y), y what a block makes of x, along their channels and the mean over all
    positions and samples: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    2024. It is 0 for a block that changes nothing."""

    def __init__(self, dim: int) -> None:
        self.dim, self.total, self.count = dim, 0.0, 0
        self._inputs: list[Tensor] = []

    def enter(self, value: Tensor) -> None:
        """See x of one batch."""
        self._inputs.append(value.detach())

    def leave(self, value: Tensor) -> None:
        """See y of the same batch."""
        x, y = self._inputs.pop().double(), value.detach().double()
        apart = 1 - torch.nn.functional.cosine_similarity(x, y, dim=self.dim)
        self.total, self.count = self.total + float(apart.sum()), self.count + apart.numel()

    @property
    def mean(self) -> float:
        """Over all that was seen."""
        return self.total / max(1, self.count)


class _See:
    """Hands the value of a node to one side of an `Influence`."""

    def __init__(self, side: Any) -> None:
        self.see = side


def _influences(captured: Captured, site: Site, blocks: list[Block]) -> Scores:
    if site.calibration is None:
        raise PlanError([missing("by = activation")])
    collectors: dict[fx.Node, list[_See]] = {}
    found = []
    for block in blocks:
        influence = Influence(_channels(block))
        collectors.setdefault(block.residuals[0].identity, []).append(_See(influence.enter))
        collectors.setdefault(block.residuals[-1].add, []).insert(0, _See(influence.leave))
        found.append(influence)
    site.calibration.feed(captured, collectors)
    return np.array([influence.mean for influence in found])


def _channels(block: Block) -> int:
    """The dimension of the channels that a block adds to: the second one where a convolution makes values of as many
    dimensions, else the last."""
    rank = len(block.residuals[0].add.meta["fxc"].shape)
    return 1 if any(kind_of(node).startswith("conv") and len(node.meta["fxc"].shape) == rank
                    for one in block.residuals for node in one.layers) else -1
