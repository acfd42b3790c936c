"""Which canonical operator a torch function is, and how its arguments are bound."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .opbase import REQUIRED, Op, Param, bind, parse_signature
from .ops_table import TABLE

# Options that change neither the values nor the gradients; `None`: whatever they are, else only when they equal this.
_ANY = ("inplace", "_stacklevel", "memory_format", "layout", "pin_memory", "non_blocking", "copy", "requires_grad",
        "cudnn_enabled", "cudnn_enable", "implicit", "stable")
_DROPPED: Mapping[str, tuple[object, ...] | None] = {
    **dict.fromkeys(_ANY), "half_to_float": (False,), "out": (None,), "generator": (None,), "return_indices": (False,),
    "scale": (1,), "input_scale": (1,), "path": (None,), "dtype": (None,),
}
_SYNONYMS = {"axis": "dim", "keepdims": "keepdim", "train": "training", "split_size": "split_size_or_sections",
             "split_sizes": "split_size_or_sections", "indices_or_sections": "split_size_or_sections",
             "sections": "split_size_or_sections", "indices": "split_size_or_sections", "unbiased": "correction",
             "ndim": "dim", "axis0": "dim0", "axis1": "dim1"}


@dataclass(frozen=True)
class Source:
    """One way to write the operator `op`: the arguments of `name` are bound by `params`."""

    name: str
    op: Op
    params: tuple[Param, ...]
    in_place: bool

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by canonical name, those that mean nothing here left out. Raises TypeError if they don't fit."""
        names = {p.name for p in self.params}
        named = {self._rename(key, names): value for key, value in kwargs.items()}
        canonical = {p.name for p in self.op.params} | EXTRAS.get(self.op.name, set())
        extra = {key: named.pop(key) for key in list(named) if key not in names}
        beyond = {key: extra.pop(key) for key in list(extra) if key in canonical}
        values = {**bind(self.params, args, named, self.name), **beyond}
        for key in [key for key in values if key not in canonical]:
            extra[key] = values.pop(key)
        for key, value in extra.items():
            allowed = _DROPPED.get(key, ())
            if allowed is not None and not any(value is choice or value == choice for choice in allowed):
                raise TypeError(f"{self.name}: {key} = {value!r} has no place in {self.op.name}")
        self_in_place = bool(extra.get("inplace"))
        return {**values, "__in_place__": True} if self_in_place or self.in_place else values

    def _rename(self, key: str, names: set[str]) -> str:
        if key in names:
            return key
        if key in ("self", "x"):
            return "input" if "input" in names else self.params[0].name
        return _SYNONYMS.get(key, key)


# Arguments of sources beyond the canonical ones, which `convert.py` resolves.
EXTRAS: Mapping[str, set[str]] = {
    "add": {"alpha"}, "sub": {"alpha"}, "div": {"rounding_mode"}, "getitem": {"dim", "start", "end", "step", "indices"},
    "interpolate": {"output_size", "scale_factors"}, "to": {"other", "copy"}, "max": {"other"}, "min": {"other"},
}


@cache
def sources() -> Mapping[Callable[..., Any], Source]:
    """Every known callable; where two rows claim one, the first wins."""
    found: dict[Callable[..., Any], Source] = {}
    for op in TABLE:
        found.setdefault(op.target, Source(op.name, op, op.params, False))
        # An ATen overload with a signature of its own comes before the `*name` that would claim it.
        for text in sorted(op.sources, key=lambda text: not (text.startswith("aten.") and "(" in text)):
            name, bracket, signature = text.partition("(")
            params = parse_signature(signature.removesuffix(")")) if bracket else None
            for short, target in _targets(name):
                found.setdefault(target, Source(short, op, params or _params(op, target), _in_place(short)))
    return found


def _in_place(name: str) -> bool:
    name = name.split(".")[1] if name.startswith("aten.") else name
    last = name.split(".")[-1]
    return (last.endswith("_") and not last.endswith("__")) or last in _IN_PLACE_OPERATORS


_IN_PLACE_OPERATORS = {form for name in "add sub mul truediv floordiv mod pow and or xor matmul".split()
                       for form in (f"i{name}", f"__i{name}__")}


def _params(op: Op, target: Callable[..., Any]) -> tuple[Param, ...]:
    """The parameters of a source without a signature: its schema's for ATen, else the row's."""
    if not isinstance(target, torch._ops.OpOverload):
        return op.params
    names = {p.name for p in op.params}
    first = "input" if "input" in names else op.params[0].name
    params = []
    for argument in target._schema.arguments:
        name = argument.name
        name = first if name == "self" else name if name in names else _SYNONYMS.get(name, name)
        params.append(Param(name, argument.default_value if argument.has_default_value() else REQUIRED))
    return tuple(params)


def _targets(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The callables a source name stands for, each with a short name of its own."""
    if name.startswith("*"):
        for form in (name[1:], f"{name[1:]}_"):
            for short, owner in ((f"torch.{form}", torch), (f".{form}", Tensor), (f"F.{form}", F),
                                 (f"linalg.{form}", torch.linalg)):
                if callable(getattr(owner, form, None)):
                    yield short, getattr(owner, form)
            packet = getattr(torch.ops.aten, form, None)
            for overload in packet.overloads() if packet is not None else ():
                if not any(a.is_out for a in getattr(packet, overload)._schema.arguments):
                    yield f"aten.{form}.{overload}", getattr(packet, overload)
        return
    prefix, _, rest = name.partition(".")
    owners: Mapping[str, Any] = {"": Tensor, "torch": torch, "F": F, "op": operator, "aten": torch.ops.aten}
    target = owners[prefix]
    for part in rest.split("."):
        target = getattr(target, part, None)
    if target is not None:
        yield name, target
