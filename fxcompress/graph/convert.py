"""Calls whose canonical form can't be read off their argument names: one small function per operator.

Each takes the recorder, the source and the bound arguments, and gives either the arguments to emit the operator
with, or the finished result wrapped in `Done`. A call that has no canonical form raises `NoCanonicalFormError` and is
recorded as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dynamic import DynInt
from .sources import Source
from .values import flat

if TYPE_CHECKING:
    from .recorder import Recorder

Values = dict[str, Any]


class NoCanonicalFormError(Exception):
    """The call stays as it is."""


@dataclass(frozen=True)
class Done:
    """The call is already recorded, or was no operation at all."""

    result: Any


Converter = Callable[["Recorder", Source, Values], "Values | Done"]


def _last(source: Source) -> str:
    """`view` for `.view_`, `aten.view.default` and `torch.view`."""
    parts = source.name.split(".")
    return (parts[1] if parts[0] == "aten" else parts[-1]).rstrip("_") or parts[-1]


def _sum(rec: Recorder, source: Source, values: Values) -> Values:
    alpha = values.pop("alpha", 1)
    if _last(source) in ("rsub", "__rsub", "__radd"):
        values["input"], values["other"] = values["other"], values["input"]
    if alpha != 1:
        values["other"] = rec.call("mul", values["other"], alpha)
    return values


def _div(rec: Recorder, source: Source, values: Values) -> Values | Done:
    mode = values.pop("rounding_mode", None)
    if _last(source).startswith("__r"):
        values["input"], values["other"] = values["other"], values["input"]
    whole = not any(isinstance(v, Tensor) and rec.dtype_of(v).is_floating_point for v in values.values())
    if mode == "floor" and whole:  # of floats, `floor_divide` has no gradient
        return Done(rec.call("floor_divide", values["input"], values["other"]))
    if mode is not None:
        return Done(rec.call("div_rounding", values["input"], values["other"], rounding_mode=mode))
    return values


def _hardtanh(rec: Recorder, source: Source, values: Values) -> Values | Done:
    """`nn.ReLU6` is a `hardtanh` from 0 to 6 inside."""
    if (values["min_val"], values["max_val"]) == (0, 6):
        return Done(rec.call("relu6", values["input"]))
    return values


def _swapped(rec: Recorder, source: Source, values: Values) -> Values:
    if _last(source).startswith("__r"):
        first, second = list(values)[:2]
        values[first], values[second] = values[second], values[first]
    if _last(source) == "float_power":
        raise NoCanonicalFormError
    return values


def _reshape(rec: Recorder, source: Source, values: Values) -> Values:
    """`view_as`, `reshape_as`: the shape of the other tensor. A view as another dtype isn't a reshape."""
    shape = values["shape"]
    if len(shape) == 1 and isinstance(shape[0], Tensor):
        values["shape"] = tuple(rec.shape_of(shape[0]))
    elif any(isinstance(item, torch.dtype) for item in shape):
        raise NoCanonicalFormError
    return values


def _expand(rec: Recorder, source: Source, values: Values) -> Values:
    if len(values["size"]) == 1 and isinstance(values["size"][0], Tensor):
        values["size"] = tuple(rec.shape_of(values["size"][0]))
    return values


_DTYPES = {"float": torch.float32, "half": torch.float16, "double": torch.float64, "bfloat16": torch.bfloat16,
           "int": torch.int32,
           "long": torch.int64, "bool": torch.bool, "short": torch.int16, "byte": torch.uint8}


def _to(rec: Recorder, source: Source, values: Values) -> Values | Done:
    """Every conversion of dtype or device. Tensors of one module live on one device, so that a move to the device of
    the example is dropped, and the graph works wherever the module goes."""
    name = _last(source)
    given = [values.get("dtype"), values.get("device"), values.get("other")]
    dtype, device = _DTYPES.get(name), None
    for item in given:
        if isinstance(item, torch.dtype):
            dtype = item
        elif isinstance(item, Tensor):
            dtype = rec.dtype_of(item)
        elif isinstance(item, str | torch.device | int) and not isinstance(item, bool) and name != "type":
            device = torch.device(item)
        elif isinstance(item, str):
            raise NoCanonicalFormError
    if name in ("cpu", "cuda"):
        device = torch.device(name)
    if device is not None and device.type != rec.device.type:
        rec.refuse(f"the model moves a tensor to {device} by name")
    if name == "type" and dtype is None:
        raise NoCanonicalFormError
    if dtype is None or dtype == rec.dtype_of(values["input"]):
        return Done(values["input"])
    return {"input": values["input"], "dtype": dtype}


def _same_value(rec: Recorder, source: Source, values: Values) -> Done:
    """`clone`, `contiguous`: the same value in other memory. The graph has no use for it, since nothing is written."""
    return Done(rec.alias(values["input"], torch.clone))


def _contiguous(rec: Recorder, source: Source, values: Values) -> Done:
    return Done(rec.alias(values["input"], Tensor.contiguous))


def _variance(rec: Recorder, source: Source, values: Values) -> Values:
    if isinstance(values.get("dim"), bool):  # x.var(False): the old place of `unbiased`
        values["correction"], values["dim"] = values["dim"], None
    correction = values.get("correction", 1)
    values["correction"] = 1 if correction is None else int(correction)
    return values


def _extremum(rec: Recorder, source: Source, values: Values) -> Values | Done:
    other = values.get("other", values.get("dim"))
    if isinstance(other, Tensor):
        return Done(rec.call({"max": "maximum", "min": "minimum"}[source.op.name], values["input"], other))
    return values


def _transpose(rec: Recorder, source: Source, values: Values) -> Values | Done:
    """`t`, `numpy_T` (all dimensions the other way round), `mT` and `adjoint` (the last two; conjugated, if
    complex)."""
    if "dim0" in values:
        return values
    name, x = _last(source), values["input"]
    if name in ("adjoint", "mH", "matrix_H") and rec.dtype_of(x).is_complex:
        raise NoCanonicalFormError
    if x.dim() < 2:
        return Done(x)
    if x.dim() == 2:
        return {"input": x, "dim0": 0, "dim1": 1}
    if name == "numpy_T":
        return Done(rec.call("permute", x, tuple(reversed(range(x.dim())))))
    return {"input": x, "dim0": -2, "dim1": -1}


def _getitem(rec: Recorder, source: Source, values: Values) -> Values | Done:
    name = _last(source)
    if name == "slice":
        dim = values["dim"] % values["input"].dim()
        end = values.get("end")
        end = None if isinstance(end, int) and end >= 2**62 else end
        item: Any = slice(values.get("start") or None, end, None if values["step"] == 1 else values["step"])
        if item == slice(None):
            return Done(values["input"])
        return {"input": values["input"], "index": (*[slice(None)] * dim, item)}
    if name == "select":
        dim = values["dim"] % values["input"].dim()
        return {"input": values["input"], "index": (*[slice(None)] * dim, values["index"])}
    if name == "index":
        return {"input": values["input"], "index": tuple(slice(None) if i is None else i for i in values["indices"])}
    if isinstance(values["index"], list) and any(isinstance(i, Tensor | slice) or i is None for i in values["index"]):
        values["index"] = tuple(values["index"])
    return values


def _split(rec: Recorder, source: Source, values: Values) -> Values:
    if _last(source) == "tensor_split":
        dim = values.get("dim", 0)
        parts = torch.tensor_split(rec.fake(values["tensor"]), values["split_size_or_sections"], dim)
        if dim in rec.dynamic_dims(values["tensor"]):
            raise NoCanonicalFormError
        values["split_size_or_sections"] = tuple(part.shape[dim] for part in parts)
    return values


def _created(rec: Recorder, source: Source, values: Values) -> Values | Done:
    """New tensors of known size are computed now and become constants; random ones and those of a dynamic size are
    calls, on the device of the first input."""
    values = {**values}
    like = values.get("input") if source.op.name.startswith("new_") or source.op.name.endswith("_like") else None
    if like is not None:
        values["dtype"] = values.get("dtype") or rec.dtype_of(like)
    if "size" in values and isinstance(values["size"], list | torch.Size):
        values["size"] = tuple(values["size"])
    return rec.create(source.op, values)


def _arange(rec: Recorder, source: Source, values: Values) -> Values | Done:
    return rec.create(source.op, values)


def _tensor(rec: Recorder, source: Source, values: Values) -> Values | Done:
    data = values.get("data")
    if isinstance(data, Tensor):
        wanted = values.get("dtype") or rec.dtype_of(data)
        return Done(rec.call("to", data, dtype=wanted))
    if any(isinstance(item, Tensor | DynInt) for item in flat(data)):
        raise NoCanonicalFormError
    return rec.create(source.op, values)


def _interpolate(rec: Recorder, source: Source, values: Values) -> Values:
    """The ATen operators carry the mode in their name."""
    if "output_size" not in values:
        return values
    name = _last(source).removeprefix("upsample").strip("_")
    antialias = name.endswith("aa")
    mode = name.removesuffix("_aa").lstrip("_")
    mode = {"nearest1d": "nearest", "nearest2d": "nearest", "nearest3d": "nearest", "linear1d": "linear",
            "bilinear2d": "bilinear",
            "trilinear3d": "trilinear", "bicubic2d": "bicubic"}[mode]
    size, factors = values.get("output_size"), values.get("scale_factors")
    return {"input": values["input"], "size": None if size is None else tuple(size),
            "scale_factor": None if factors is None else tuple(factors), "mode": mode,
            "align_corners": values.get("align_corners") if mode != "nearest" else None, "antialias": antialias}


def _bernoulli(rec: Recorder, source: Source, values: Values) -> Values | Done:
    if source.in_place:  # `x.bernoulli_(p)` doesn't look at `x`, but for a tensor of probabilities
        p = values.get("p")
        if isinstance(p, Tensor):
            return {"input": rec.call("expand", p, tuple(rec.shape_of(values["input"])))}
        values["p"] = 0.5 if p is None else p
    return values


def _einsum(rec: Recorder, source: Source, values: Values) -> Values:
    operands = values["operands"]
    values["operands"] = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0],
                                                                                 list | tuple) else tuple(operands)
    return values


def _pad(rec: Recorder, source: Source, values: Values) -> Values | Done:
    values["pad"] = tuple(values["pad"])
    if values.get("mode", "constant") == "constant" and values.get("value") in (0, 0.0):
        values["value"] = None
    if all(isinstance(width, int) and width == 0 for width in values["pad"]):
        return Done(values["input"])
    return values


def _embedding(rec: Recorder, source: Source, values: Values) -> Values:
    if values.get("padding_idx") == -1 and source.name.startswith("aten"):
        values["padding_idx"] = None
    return values


def _softmax(rec: Recorder, source: Source, values: Values) -> Values:
    if values.get("dtype") == rec.dtype_of(values["input"]):
        values["dtype"] = None
    return values


def _attention(rec: Recorder, source: Source, values: Values) -> Values:
    scale = values.get("scale")
    if scale is not None and math.isclose(scale, values["query"].shape[-1] ** -0.5, rel_tol=1e-12):
        values["scale"] = None
    return values


_SWAPPED = ("mul", "pow", "floor_divide", "remainder", "matmul", "and", "or", "xor")
_CREATED = ("zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_empty", "full", "new_full",
            "linspace", "eye", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
CONVERTERS: Mapping[str, Converter] = {
    "add": _sum, "sub": _sum, "div": _div, "hardtanh": _hardtanh, "reshape": _reshape, "expand": _expand, "to": _to,
    "clone": _same_value, "contiguous": _contiguous, "var": _variance, "std": _variance,
    "var_mean": _variance, "std_mean": _variance,
    "max": _extremum, "min": _extremum, "transpose": _transpose, "getitem": _getitem, "split": _split,
    "interpolate": _interpolate, "bernoulli": _bernoulli, "einsum": _einsum, "pad": _pad, "embedding": _embedding,
    "softmax": _softmax, "log_softmax": _softmax, "scaled_dot_product_attention": _attention, "arange": _arange,
    "tensor": _tensor, "new_tensor": _tensor, **dict.fromkeys(_SWAPPED, _swapped), **dict.fromkeys(_CREATED, _created),
}
