"""Modules that stay `call_module` nodes: those with parameters, and those that act otherwise in training.

Everything else is traced through, down to functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.ops import StochasticDepth


@dataclass(frozen=True)
class Leaf:
    """How a class of module is seen: its kind, its inputs in order, the parameters and settings that are arguments."""

    kind: str
    inputs: tuple[str, ...] = ("input",)
    tensors: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


_CONV = (("weight", "bias"), ("stride", "padding", "dilation", "groups", "padding_mode"))
_CONV_T = (("weight", "bias"), ("stride", "padding", "output_padding", "groups", "dilation"))
_BATCH = (("running_mean", "running_var", "weight", "bias"), ("momentum", "eps", "affine", "track_running_stats"))
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
_BAG = ("max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "include_last_offset", "padding_idx")


def _leaf(kind: str, tensors: tuple[str, ...], settings: tuple[str, ...], *inputs: str) -> Leaf:
    return Leaf(kind, inputs or ("input",), tensors, settings)


MODULES: Mapping[type[nn.Module], Leaf] = {
    **{cls: _leaf(f"conv{n}d", *_CONV) for n, cls in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)},
    **{cls: _leaf(f"conv_transpose{n}d", *_CONV_T, "input", "output_size")
       for n, cls in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1)},
    nn.Linear: _leaf("linear", ("weight", "bias"), ()),
    nn.Bilinear: _leaf("bilinear", ("weight", "bias"), (), "input1", "input2"),
    **{cls: _leaf(f"batchnorm{n}d", *_BATCH) for n,
       cls in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 1)},
    nn.SyncBatchNorm: _leaf("batchnorm2d", *_BATCH),
    **{cls: _leaf(f"instancenorm{n}d", *_BATCH)
       for n, cls in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1)},
    nn.LayerNorm: _leaf("layernorm", ("weight", "bias"), ("normalized_shape", "eps")),
    nn.GroupNorm: _leaf("groupnorm", ("weight", "bias"), ("num_groups", "eps")),
    nn.RMSNorm: _leaf("rmsnorm", ("weight",), ("normalized_shape", "eps")),
    nn.PReLU: _leaf("prelu", ("weight",), ()),
    nn.Embedding: _leaf("embedding", ("weight",), ("padding_idx", "max_norm", "norm_type")),
    nn.EmbeddingBag: _leaf("embedding_bag", ("weight",), _BAG, "input", "offsets", "per_sample_weights"),
    nn.Dropout: _leaf("dropout", (), ("p",)),
    nn.Dropout1d: _leaf("dropout1d", (), ("p",)),
    nn.Dropout2d: _leaf("dropout2d", (), ("p",)),
    nn.Dropout3d: _leaf("dropout3d", (), ("p",)),
    nn.AlphaDropout: _leaf("alpha_dropout", (), ("p",)),
    nn.FeatureAlphaDropout: _leaf("feature_alpha_dropout", (), ("p",)),
    nn.RReLU: _leaf("rrelu", (), ("lower", "upper")),
    StochasticDepth: _leaf("stochastic_depth", (), ("p", "mode")),
    nn.LSTM: _leaf("lstm", (), _RECURRENT, "input", "hx"),
    nn.GRU: _leaf("gru", (), _RECURRENT, "input", "hx"),
    nn.RNN: _leaf("rnn", (), (*_RECURRENT, "nonlinearity"), "input", "hx"),
    nn.LSTMCell: _leaf("lstm_cell", (), ("input_size", "hidden_size"), "input", "hx"),
    nn.GRUCell: _leaf("gru_cell", (), ("input_size", "hidden_size"), "input", "hx"),
    nn.RNNCell: _leaf("rnn_cell", (), ("input_size", "hidden_size", "nonlinearity"), "input", "hx"),
    nn.MultiheadAttention: _leaf(
        "multihead_attention", ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
        ("embed_dim", "num_heads", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn"),
        "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"),
}
_INPUT_DEFAULTS = {"need_weights": True, "average_attn_weights": True, "is_causal": False}


def leaf_of(cls: type[nn.Module]) -> tuple[type[nn.Module], Leaf] | None:
    """The class of `MODULES` that `cls` is or comes from, and its row; whether `forward` is overridden isn't asked."""
    for base in cls.__mro__:
        if base in MODULES:
            return base, MODULES[base]
    return None


def keeps_forward(module: nn.Module) -> bool:
    """Whether `module` computes exactly what its class in `MODULES` computes: only then it may stay a leaf."""
    found = leaf_of(type(module))
    if found is None:
        return False
    own = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    return own == [getattr(found[0], name, None) for name in ("forward", "_conv_forward")]


def module_kind(module: nn.Module) -> str:
    """`conv2d`, `lstm`, ...; the lower-case qualified class name outside the table."""
    found = leaf_of(type(module))
    if found is not None:
        return found[1].kind
    cls = type(module)
    return getattr(cls, "fxc_kind", None) or f"{cls.__module__}.{cls.__qualname__}"


def module_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of the call, then parameters (tensors or None) and settings of the module, by canonical name."""
    found = leaf_of(type(module))
    if found is None:
        return {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    leaf = found[1]
    inputs: dict[str, Any] = {name: _INPUT_DEFAULTS.get(name) for name in leaf.inputs}
    inputs.update(zip(leaf.inputs, args, strict=False))
    inputs.update(kwargs)
    chains, held = module._modules.get("parametrizations"), {**module._buffers, **module._parameters}
    for name in leaf.tensors:
        inputs[name] = held[name] if name in held else _tensor(module, name, chains or ())
    for name in leaf.settings:
        inputs[name] = getattr(module, name)
    return inputs


def _tensor(module: nn.Module, name: str, chains: Any) -> Any:
    """The attribute `name` of `module`; one with a parametrization among `chains` is computed as in evaluation, which
    changes no state (in training a spectral norm takes a step whenever its weight is read)."""
    if name not in chains:
        return getattr(module, name)
    modes = {part: part.training for part in chains[name].modules()}
    chains[name].eval()
    try:
        return getattr(module, name)
    finally:
        for part, mode in modes.items():
            part.training = mode
