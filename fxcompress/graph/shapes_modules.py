"""Shapes of leaf modules by arithmetic (see `shapes.py`). A rule reads the shapes of the module's own tensors, so that
a module whose tensors don't fit each other or its input gets no shape here, and torch says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..nn.distillation import Distillation
from . import shapes
from .modules import keeps_forward, leaf_of
from .shapes import like, new

ModuleRule = Callable[..., Any]


def rule_of(module: nn.Module) -> ModuleRule | None:
    """The rule for `module`; None for one whose class has none, and for one that computes its tensors or has hooks."""
    rule = MODULE_RULES.get(type(module))
    if rule is None:
        found = leaf_of(type(module))
        rule = MODULE_RULES.get(found[0]) if found is not None and keeps_forward(module) else None
    if rule is None or module._forward_hooks or module._forward_pre_hooks or "parametrizations" in module._modules:
        return None
    return rule


def _conv(axes: int) -> ModuleRule:
    def rule(module: Any, input: Tensor) -> Any:
        held = module._parameters
        if module.padding_mode != "zeros" or "weight" not in held:
            return None
        return shapes.conv(axes, input, held["weight"], held["bias"], module.stride, module.padding, module.dilation,
                           module.groups)

    return rule


def _conv_transpose(axes: int) -> ModuleRule:
    def rule(module: Any, input: Tensor, output_size: Any = None) -> Any:
        held = module._parameters
        if module.padding_mode != "zeros" or "weight" not in held or output_size is not None:
            return None
        return shapes.conv_transpose(axes, input, held["weight"], held["bias"], module.stride, module.padding,
                                     module.output_padding, module.groups, module.dilation)

    return rule


def _linear(module: Any, input: Tensor) -> Any:
    held = module._parameters
    return shapes.linear(input, held["weight"], held["bias"]) if "weight" in held else None


def _batchnorm(ranks: tuple[int, ...]) -> ModuleRule:
    def rule(module: Any, input: Tensor) -> Any:
        held, kept = module._parameters, module._buffers
        if input.dim() not in ranks:
            return None
        return shapes.per_channel(input, held.get("weight"), held.get("bias"), kept.get("running_mean"),
                                  kept.get("running_var"))

    return rule


def _instancenorm(axes: int) -> ModuleRule:
    def rule(module: Any, input: Tensor) -> Any:
        held = (module._parameters.get("weight"), module._parameters.get("bias"))
        fits = input.dim() == axes + 2 and module.num_features == input.shape[1]
        return shapes.per_channel(input, *held) if fits else None

    return rule


def _prelu(module: Any, input: Tensor) -> Any:
    weight = module._parameters.get("weight")
    fits = weight is not None and (weight.numel() == 1 or (input.dim() > 1 and weight.shape[0] == input.shape[1]))
    return like(input) if fits else None


def _layernorm(module: Any, input: Tensor) -> Any:
    return shapes.layernorm(input, module.normalized_shape, module._parameters.get("weight"),
                            module._parameters.get("bias"))


def _rmsnorm(module: Any, input: Tensor) -> Any:
    return shapes.rmsnorm(input, module.normalized_shape, module._parameters.get("weight"))


def _groupnorm(module: Any, input: Tensor) -> Any:
    return shapes.groupnorm(input, module.num_groups, module._parameters.get("weight"), module._parameters.get("bias"))


def _random(module: Any, input: Tensor) -> Any:
    """Dropout and its like: in evaluation the input itself, which the model may go on to write into."""
    return like(input) if module.training else input.view_as(input)


def _distillation(module: Any, output: Any, targets: Any, losses: Any, *values: Any) -> Any:
    return output  # as long as no losses are asked for


def _alike(module: Any, input: Tensor) -> Any:
    return like(input)


def _embedding(module: Any, input: Tensor) -> Any:
    weight = module._parameters.get("weight")
    if weight is None or module.max_norm is not None or input.is_floating_point() or not input.is_contiguous():
        return None
    return new((*input.shape, weight.shape[1]), weight.dtype)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None, need_weights: Any = True,
    attn_mask: Any = None, average_attn_weights: Any = True, is_causal: Any = False,
) -> Any:
    """The projections are checked, and masks left to torch."""
    held, width = module._parameters, module.embed_dim
    masks = key_padding_mask is not None or attn_mask is not None
    if masks or query.dim() != 3 or query.shape[-1] != width or width % module.num_heads or not module.head_dim:
        return None
    if module.head_dim * module.num_heads != width or held.get("in_proj_weight") is None or module.bias_k is not None:
        return None
    if query.shape != key.shape or key.shape != value.shape or module.add_zero_attn:
        return None
    out, bias = module.out_proj, held.get("in_proj_bias")
    if tuple(held["in_proj_weight"].shape) != (3 * width, width) or tuple(out.weight.shape) != (width, width):
        return None
    if (bias is not None and bias.shape[0] != 3 * width) or (out.bias is not None and out.bias.shape[0] != width):
        return None
    batch, length = query.shape[:2] if module.batch_first else (query.shape[1], query.shape[0])
    result = new((length, batch, width), query.dtype)
    heads = () if average_attn_weights else (module.num_heads,)
    weights = new((batch, *heads, length, length), query.dtype) if need_weights else None
    return (result.transpose(0, 1) if module.batch_first else result), weights


_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


def _recurrent(module: Any, input: Any, hx: Any = None) -> Any:
    """Output and last state, without a step being taken. A state that is given is left to torch."""
    if not isinstance(input, Tensor) or input.dim() != 3 or hx is not None or not _gates_fit(module, input):
        return None
    batch, length = input.shape[:2] if module.batch_first else (input.shape[1], input.shape[0])
    ways = 2 if module.bidirectional else 1
    width, hidden = module.proj_size or module.hidden_size, module.hidden_size
    result = new((length, batch, ways * width), input.dtype)
    if module.batch_first:
        result = result.transpose(0, 1)
    last = new((ways * module.num_layers, batch, width), input.dtype)
    if not isinstance(module, nn.LSTM):
        return result, last
    return result, (last, new((ways * module.num_layers, batch, hidden), input.dtype))


def _gates_fit(module: Any, input: Tensor) -> bool:
    """Whether all weights have the shapes of the documentation of `torch.nn.LSTM`."""
    gates = next(count for cls, count in _GATES.items() if isinstance(module, cls)) * module.hidden_size
    width, ways = module.proj_size or module.hidden_size, 2 if module.bidirectional else 1
    if input.shape[-1] != module.input_size or len(module._flat_weights) != len(module._flat_weights_names):
        return False
    for name, weight in zip(module._flat_weights_names, module._flat_weights, strict=True):
        first = name.removesuffix("_reverse").endswith("_l0")
        wanted: tuple[int, ...] = (gates,)
        if name.startswith("weight_ih"):
            wanted = (gates, module.input_size if first else ways * width)
        elif name.startswith("weight_hh"):
            wanted = (gates, width)
        elif name.startswith("weight_hr"):
            wanted = (width, module.hidden_size)
        if tuple(weight.shape) != wanted or weight.dtype != input.dtype:
            return False
    return True


MODULE_RULES: Mapping[type[nn.Module], ModuleRule] = {
    nn.Conv1d: _conv(1), nn.Conv2d: _conv(2), nn.Conv3d: _conv(3),
    nn.ConvTranspose1d: _conv_transpose(1), nn.ConvTranspose2d: _conv_transpose(2),
    nn.ConvTranspose3d: _conv_transpose(3), nn.Linear: _linear, nn.BatchNorm1d: _batchnorm((2, 3)),
    nn.SyncBatchNorm: _batchnorm((2, 3, 4, 5)), nn.InstanceNorm1d: _instancenorm(1),
    nn.InstanceNorm2d: _instancenorm(2), nn.InstanceNorm3d: _instancenorm(3), nn.PReLU: _prelu,
    nn.BatchNorm2d: _batchnorm((4,)), nn.BatchNorm3d: _batchnorm((5,)), nn.LayerNorm: _layernorm,
    nn.RMSNorm: _rmsnorm, nn.GroupNorm: _groupnorm, nn.Embedding: _embedding, nn.MultiheadAttention: _attention,
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), _recurrent), StochasticDepth: _alike, nn.RReLU: _alike,
    Distillation: _distillation,
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
                    _random),
}
