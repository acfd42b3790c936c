"""The classes of modules that an artifact may hold, each with the arguments that its constructor gets.

A module is rebuilt by its own constructor on the `meta` device (nothing is allocated, however large the numbers), from
arguments that are read off a live module by name, checked by type and range, and then given its stored tensors. No
other class is ever built: the name in the file is only a key of `CLASSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from ..graph.modules import keeps_forward, leaf_of
from ..nn import (
    ByMode,
    DynamicLinear,
    DynamicQuantizer,
    FreezingBatchNorm1d,
    FreezingBatchNorm2d,
    IntAdaptiveMean,
    IntConv2d,
    Interleave,
    IntLinear,
    IntMaxPool2d,
    IntMean,
    Mask,
    PackedConv2d,
    Quantizer,
    Reorder,
    RoundedAttention,
    ToFloat,
    ToInteger,
    TrainedQuantizer,
    WeightOnlyConv2d,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    WeightQuantizer,
)
from ..nn.cuda import CudaInt8Linear, Sparse24Linear, ToInt8
from ..nn.cuda_weights import CudaInt4Linear, CudaInt8WeightLinear
from ..nn.integer import After, Grid
from ..nn.scheme import Scheme
from .artifact_json import Cursor, fail, printable, reason
from .artifact_values import UnsaveableError

_BAD_ARGUMENTS = (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError, LookupError, AttributeError)


@dataclass(frozen=True)
class Argument:
    """One constructor argument: how it is read from the document, and off a module (by its name if `get` is None)."""

    read: Callable[[Cursor], Any]
    get: Callable[[nn.Module], Any] | None = None


@dataclass(frozen=True)
class SavedClass:
    """A class, its constructor's arguments by name, and attributes that must have one value for it to be saved."""

    cls: type[nn.Module]
    arguments: Mapping[str, Argument]
    only: Mapping[str, object] = field(default_factory=dict)


def _numbers(cursor: Cursor) -> int | tuple[int, ...]:
    if isinstance(cursor.value, list):
        return tuple(item.integer() for item in cursor.items(16))
    return cursor.integer()


def _places(cursor: Cursor) -> tuple[int, ...]:
    return tuple(item.integer() for item in cursor.items(2**20))


def _numbers_or_text(cursor: Cursor) -> int | tuple[int, ...] | str:
    return cursor.text(32) if isinstance(cursor.value, str) else _numbers(cursor)


def _or_none(read: Callable[[Cursor], Any]) -> Callable[[Cursor], Any]:
    return lambda cursor: None if cursor.value is None else read(cursor)


def _has(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: getattr(module, name, None) is not None  # what nothing reads any more may be gone


WHOLE = Argument(lambda cursor: cursor.integer())
LAYERS = Argument(lambda cursor: cursor.integer(0, 1024))  # each one takes time to build
NUMBERS = Argument(_numbers)
PADDING = Argument(_numbers_or_text)
REAL = Argument(lambda cursor: cursor.number())
FLAG = Argument(lambda cursor: cursor.boolean())
WORD = Argument(lambda cursor: cursor.text(32))
WHOLE_OR_NONE = Argument(_or_none(lambda cursor: cursor.integer()))
REAL_OR_NONE = Argument(_or_none(lambda cursor: cursor.number()))
EVIDENCE = ("none", "gradient", "movement")
BIAS = Argument(lambda cursor: cursor.boolean(), _has("bias"))



def _record(cls: type[Any], later: tuple[str, ...] = (), **fields: Callable[[Cursor], Any]) -> Callable[[Cursor], Any]:
    """Reads a small dataclass, each of its fields by name; those of `later` came after the first artifacts, which lack
    them."""
    def read(cursor: Cursor) -> Any:
        found = cursor.fields(tuple(name for name in fields if name not in later), later)
        return cls(**{name: fields[name](value) for name, value in found.items()})

    return read


def _plainly(name: str) -> Argument:
    """Writes the dataclass that is the attribute `name` as an object."""
    return Argument(_RECORDS[name], lambda module: asdict(getattr(module, name)))


_grid = _record(Grid, scale=lambda c: c.number(), zero_point=lambda c: c.integer(), low=lambda c: c.integer(),
                high=lambda c: c.integer())
_RECORDS: Mapping[str, Callable[[Cursor], Any]] = {
    **dict.fromkeys(("gives", "reads", "query", "key", "value", "weights"), _grid),
    "scheme": _record(Scheme, ("pairs",), bits=lambda c: c.integer(1, 32), signed=lambda c: c.boolean(),
                      symmetric=lambda c: c.boolean(), narrow=lambda c: c.boolean(), pairs=lambda c: c.boolean()),
    "after": _record(After, gives=_or_none(_grid), adds=_or_none(_grid), copies=lambda c: c.boolean(),
                     activation=lambda c: c.text(32), numbers=lambda c: tuple(item.number() for item in c.items(8))),
}
SCHEME, GRID, READS, AFTER = _plainly("scheme"), _plainly("gives"), _plainly("reads"), _plainly("after")
_PRODUCT = {"shape": NUMBERS, "has_bias": FLAG, "reads": READS, "after": AFTER}
_QUANTIZER = {"scheme": SCHEME, "rows": WHOLE, "axis": WHOLE_OR_NONE, "observer": WORD, "on": FLAG,
              "arguments": Argument(lambda c: tuple(item.number() for item in c.items(8)))}
_WEIGHT_ONLY = {"shape": NUMBERS, "has_bias": FLAG, "bits": WHOLE, "group": WHOLE, "symmetric": FLAG}
_CONV = {"in_channels": WHOLE, "out_channels": WHOLE, "kernel_size": NUMBERS, "stride": NUMBERS, "padding": PADDING,
         "dilation": NUMBERS, "groups": WHOLE, "bias": BIAS, "padding_mode": WORD}
_CONV_T = _CONV | {"padding": NUMBERS, "output_padding": NUMBERS}
_BATCH = {"num_features": WHOLE, "eps": REAL, "momentum": REAL_OR_NONE, "affine": FLAG, "track_running_stats": FLAG}
_DROP = {"p": REAL}
_CELL = {"input_size": WHOLE, "hidden_size": WHOLE, "bias": FLAG}
_RECURRENT = _CELL | {"num_layers": LAYERS, "batch_first": FLAG, "dropout": REAL, "bidirectional": FLAG}
_EMBED = {"num_embeddings": WHOLE, "embedding_dim": WHOLE, "padding_idx": WHOLE_OR_NONE, "max_norm": REAL_OR_NONE,
          "norm_type": REAL, "scale_grad_by_freq": FLAG, "sparse": FLAG}
_NORMALIZED = {"normalized_shape": NUMBERS, "eps": REAL_OR_NONE, "elementwise_affine": FLAG}
_ATTENTION = {
    "embed_dim": WHOLE, "num_heads": WHOLE, "dropout": REAL, "kdim": WHOLE_OR_NONE, "vdim": WHOLE_OR_NONE,
    "batch_first": FLAG, "add_zero_attn": FLAG,
    "bias": Argument(lambda cursor: cursor.boolean(), _has("in_proj_bias")),
    "add_bias_kv": Argument(lambda cursor: cursor.boolean(), _has("bias_k")),
}


def _constant(cursor: Cursor) -> bool | int | float | str | None:
    if isinstance(cursor.value, list | dict):
        cursor.wrong("a constant")
    constant: bool | int | float | str | None = cursor.value
    return constant


def _rows() -> Iterable[SavedClass]:
    for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        yield SavedClass(conv, _CONV)
    for transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        yield SavedClass(transposed, _CONV_T)
    for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
                 nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
        yield SavedClass(norm, _BATCH)
    for drop in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout):
        yield SavedClass(drop, _DROP)
    yield SavedClass(nn.SyncBatchNorm, _BATCH, {"process_group": None})
    yield SavedClass(nn.LSTM, _RECURRENT | {"proj_size": WHOLE})
    yield SavedClass(nn.GRU, _RECURRENT)
    yield SavedClass(nn.RNN, _RECURRENT | {"nonlinearity": WORD})
    yield SavedClass(nn.LSTMCell, _CELL)
    yield SavedClass(nn.GRUCell, _CELL)
    yield SavedClass(nn.RNNCell, _CELL | {"nonlinearity": WORD})
    yield SavedClass(nn.Linear, {"in_features": WHOLE, "out_features": WHOLE, "bias": BIAS})
    yield SavedClass(nn.Bilinear, {"in1_features": WHOLE, "in2_features": WHOLE, "out_features": WHOLE, "bias": BIAS})
    yield SavedClass(nn.LayerNorm, _NORMALIZED | {"bias": BIAS, "eps": REAL})
    yield SavedClass(nn.RMSNorm, _NORMALIZED)
    yield SavedClass(nn.GroupNorm, {"num_groups": WHOLE, "num_channels": WHOLE, "eps": REAL, "affine": FLAG})
    yield SavedClass(nn.PReLU, {"num_parameters": WHOLE})
    yield SavedClass(nn.RReLU, {"lower": REAL, "upper": REAL})
    yield SavedClass(nn.Embedding, _EMBED)
    yield SavedClass(nn.EmbeddingBag, _EMBED | {"mode": WORD, "include_last_offset": FLAG})
    yield SavedClass(nn.MultiheadAttention, _ATTENTION)
    yield SavedClass(StochasticDepth, {"p": REAL, "mode": WORD})
    yield SavedClass(Mask, {"shape": Argument(_numbers, lambda m: tuple(cast(Mask, m).mask.shape)),
                            "evidence": Argument(lambda c: c.choice(EVIDENCE), lambda m: m.collects)})
    yield SavedClass(Reorder, {"dim": WHOLE, "order": Argument(_places)})
    yield SavedClass(Quantizer, _QUANTIZER)
    yield SavedClass(WeightQuantizer, _QUANTIZER | {"group": WHOLE})
    yield SavedClass(TrainedQuantizer, _QUANTIZER | {"averages": FLAG, "eps": REAL})
    yield SavedClass(FreezingBatchNorm1d, _BATCH)
    yield SavedClass(FreezingBatchNorm2d, _BATCH)
    yield SavedClass(DynamicQuantizer, {"scheme": SCHEME, "per_token": FLAG, "on": FLAG})
    yield SavedClass(DynamicLinear, {"shape": NUMBERS, "has_bias": FLAG, "scheme": SCHEME, "per_token": FLAG,
                                     "group": WHOLE})
    yield SavedClass(WeightOnlyLinear, _WEIGHT_ONLY)
    yield SavedClass(WeightOnlyEmbedding, _WEIGHT_ONLY)
    yield SavedClass(WeightOnlyConv2d, _WEIGHT_ONLY | {"stride": NUMBERS, "padding": PADDING, "dilation": NUMBERS,
                                                       "groups": WHOLE})
    yield SavedClass(ToInteger, {"gives": GRID})
    yield SavedClass(ToFloat, {"reads": READS})
    yield SavedClass(IntMaxPool2d, {"kernel_size": NUMBERS, "stride": NUMBERS, "padding": NUMBERS, "dilation": NUMBERS,
                                    "ceil_mode": FLAG})
    yield SavedClass(PackedConv2d, {"shape": NUMBERS, "has_bias": FLAG, "stride": NUMBERS, "padding": NUMBERS,
                                    "dilation": NUMBERS, "groups": WHOLE, "adds": FLAG, "activation": WORD,
                                    "numbers": Argument(lambda c: tuple(item.number() for item in c.items(8)))})
    yield SavedClass(IntMean, {"reads": READS, "keepdim": FLAG})
    yield SavedClass(IntAdaptiveMean, {"output_size": NUMBERS})
    yield SavedClass(Interleave, {})
    yield SavedClass(IntLinear, _PRODUCT)
    yield SavedClass(IntConv2d, _PRODUCT | {"stride": NUMBERS, "padding": NUMBERS, "dilation": NUMBERS,
                                            "groups": WHOLE})
    yield SavedClass(RoundedAttention, {**{part: _plainly(part) for part in ("query", "key", "value", "weights")},
                                        "scale": REAL, "causal": FLAG})
    yield SavedClass(ToInt8, {"gives": GRID})
    yield SavedClass(CudaInt8Linear, {"shape": NUMBERS, "reads": READS})
    for held in (Sparse24Linear, CudaInt8WeightLinear):
        yield SavedClass(held, {"shape": NUMBERS, "has_bias": FLAG})
    yield SavedClass(CudaInt4Linear, {"shape": NUMBERS, "has_bias": FLAG, "group": WHOLE})
    yield SavedClass(ByMode, {"train_value": Argument(_constant), "eval_value": Argument(_constant)})


_HOMES = ("torch.nn", "torchvision.ops", "fxcompress.nn")  # packages that offer the classes under these short names
CLASSES: Mapping[str, SavedClass] = {
    f"{home}.{row.cls.__name__}": row
    for row in _rows() for home in _HOMES if row.cls.__module__.startswith(f"{home}.")
}
_NAMES: Mapping[type[nn.Module], str] = {row.cls: name for name, row in CLASSES.items()}
CONTAINER = "container"  # a module that only holds others and tensors, and is never called


def describe(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The key in `CLASSES` and the constructor's arguments of `module`; a subclass that computes just what a class of
    the table computes is saved as that class. Raises UnsaveableError for any other."""
    cls: type[nn.Module] = type(module)
    if cls not in _NAMES:
        found = leaf_of(cls)
        if found is None or found[0] not in _NAMES or not keeps_forward(module):
            raise UnsaveableError(f"a module of class {cls.__module__}.{cls.__qualname__}")
        cls = found[0]
    row = CLASSES[_NAMES[cls]]
    for name, value in row.only.items():
        if getattr(module, name) != value:
            raise UnsaveableError(f"a {cls.__name__} whose {name} is not {value}")
    return _NAMES[cls], {name: _plain(argument.get(module) if argument.get else getattr(module, name))
                         for name, argument in row.arguments.items()}


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsaveableError(f"a module with a setting of type {type(value).__name__}")


def build(class_name: Cursor, arguments: Cursor) -> nn.Module:
    """The module on the meta device, its tensors without content. Raises ArtifactError (FXC0605 for a class outside
    the table, FXC0604 for arguments that aren't what the class takes)."""
    name = class_name.text()
    if name not in CLASSES:
        fail("FXC0605", f"{class_name.place}: the class {printable(name)} is not one that an artifact may hold",
             "only the classes of fxcompress.backends.artifact_modules.CLASSES are built")
    row = CLASSES[name]
    fields = arguments.fields(tuple(row.arguments))
    values = {key: argument.read(fields[key]) for key, argument in row.arguments.items()}
    try:
        return on_meta(partial(row.cls, **values))
    except _BAD_ARGUMENTS as error:
        fail("FXC0604", f"{arguments.place}: {name} can't be made from these arguments", reason(error))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` makes, its tensors on the meta device."""
    with torch.device("meta"):
        return make()
