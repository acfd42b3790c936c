"""An equality check of removals that shares no code with the pass: the dense model, its weights zeroed by hand."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fxcompress.graph.capture import capture
from fxcompress.graph.captured import Captured
from fxcompress.graph.site import Outcome, Site
from fxcompress.passes.remove import Remove

MAKERS = ("conv", "linear", "bilinear", "multihead_attention", "lstm", "gru", "rnn", "matmul", "einsum", "embedding")


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a freshly made model weights that every channel matters with: no zero, no identity, no tiny scale."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if parameter.dim() == 1 or float(parameter.detach().std()) < 1e-3:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def makers(captured: Captured) -> tuple:
    return tuple(node for node in captured.graph.nodes if node.meta["fxc"].kind.startswith(MAKERS))


def remove(captured: Captured, what: str = "channels", nodes: tuple = (),
           **settings: object) -> tuple[Captured, Outcome]:
    """A copy of `captured` with channels removed (from every layer, by default), and what the pass said."""
    result = captured.copy()
    names = {node.name for node in nodes or makers(captured)}
    site = Site(tuple(node for node in result.graph.nodes if node.name in names), what)
    return result, Remove(**{"ratio": 0.5, **settings}).rewrite(result, site)


def kept_indices(result: Captured, outcome: Outcome) -> dict[str, dict[int, Tensor]]:
    """What stays of each resized tensor, by `state_dict` name and dimension."""
    module = result.module
    names = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    found = {id(tensor): dict(cuts) for tensor, cuts in outcome.resized.items()}
    return {name: found[id(tensor)] for name, tensor in names if id(tensor) in found}


def zeroed(model: nn.Module, kept: dict[str, dict[int, Tensor]], extra: dict[str, int] | None = None) -> nn.Module:
    """A copy of the dense model with everything that reads a removed channel zeroed: the columns (dimension 1) of
    convolutions, linear and recurrent layers, the rows of transposed convolutions; `extra` names further tensors and
    the dimension they are read along."""
    dense = copy.deepcopy(model)
    for path, module in dense.named_modules():
        along = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
        dims = {name: along for name, _ in module.named_parameters(recurse=False)
                if name.startswith("weight") or name.endswith("proj_weight")}
        for name, dim in dims.items():
            _zero(module.get_parameter(name), kept.get(f"{path}.{name}".lstrip("."), {}), dim)
    for name, dim in (extra or {}).items():
        _zero(dense.get_parameter(name), kept.get(name, {}), dim)
    return dense


def _zero(tensor: Tensor, kept: dict[int, Tensor], dim: int) -> None:
    if dim in kept:
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
        gone[kept[dim]] = False
        tensor.data.index_fill_(dim, gone.nonzero().flatten(), 0.0)


def apart(one: Tensor, two: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((one - two).abs().max() / one.abs().max())


def captured_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Captured:
    return capture(model, inputs)
