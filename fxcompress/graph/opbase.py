"""What a canonical operator is: its signature, how a call is bound to it, how it is written again."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch


class _Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Param:
    """One parameter of a signature. `many` collects the remaining positional arguments (`*sizes`)."""

    name: str
    default: Any = REQUIRED
    keyword: bool = False
    many: bool = False


def parse_signature(text: str) -> tuple[Param, ...]:
    """Parameters of `input, weight, bias=None, /, stride=1`: what stands after `/` is passed by keyword; without `/`
    that is everything with a default."""
    items = [item.strip() for item in _split(text)]
    split = items.index("/") if "/" in items else None
    params = []
    for place, item in enumerate(items):
        if item == "/":
            continue
        name, equals, default = item.partition("=")
        keyword = place > split if split is not None else bool(equals)
        value = ast.literal_eval(default) if equals else REQUIRED
        params.append(Param(name.lstrip("*"), value, keyword, name.startswith("*")))
    return tuple(params)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    items, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and not depth:
            items.append(text[start:place])
            start = place + 1
    return [item for item in [*items, text[start:]] if item.strip()]


@dataclass(frozen=True)
class Op:
    """A canonical operator. `target(*positional, **keyword)` computes it; `family` groups operators that behave alike
    ("elementwise", "reduce", "shape", "norm", ...); `sources` are the other ways to write it, see `ops_table.py`."""

    name: str
    target: Callable[..., Any]
    signature: str
    family: str
    sources: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """The canonical parameters, in order."""
        return parse_signature(self.signature)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        """The default of each parameter by name, in order; empty where one collects the rest."""
        return {} if any(p.many for p in self.params) else {p.name: p.default for p in self.params}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument by its canonical name, defaults filled in. Raises TypeError if they don't fit."""
        if not self._defaults:
            return bind(self.params, args, kwargs, self.name)
        values = {**self._defaults, **dict(zip(self._defaults, args, strict=False)), **kwargs}
        if len(args) <= len(self._defaults) == len(values) and all(v is not REQUIRED for v in values.values()) and not (
                kwargs and kwargs.keys() & tuple(self._defaults)[: len(args)]):
            return values  # the common case; what is left is rare, or wrong
        return bind(self.params, args, kwargs, self.name)

    def normal(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The canonical `(args, kwargs)` of `values`: defaults are dropped, tensors and required ones positional."""
        args = [values.get(p.name, p.default) for p in self.params if not p.keyword]
        optional = sum(p.default is not REQUIRED for p in self.params if not p.keyword)
        defaults = [p.default for p in self.params if not p.keyword]
        while optional and _same(args[-1], defaults[len(args) - 1]):
            args.pop()
            optional -= 1
        kwargs = {p.name: values[p.name] for p in self.params
                  if p.keyword and p.name in values and not _same(values[p.name], p.default)}
        return tuple(args), kwargs


def _same(value: object, default: object) -> bool:
    """Whether a constant argument is the default; nodes and proxies never are."""
    if value is default:
        return True
    plain = (bool, int, float, str, tuple, list)
    return type(value) in plain and type(value) is type(default) and value == default


def bind(params: tuple[Param, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Bind a call to `params`. A `*many` parameter takes loose numbers or one sequence. Raises TypeError."""
    values: dict[str, Any] = {}
    rest = list(args)
    for p in params:
        if p.many and rest:
            whole = len(rest) == 1 and isinstance(rest[0], list | tuple | torch.Size)
            values[p.name] = tuple(rest[0]) if whole else tuple(rest)
            rest = []
        elif rest:
            values[p.name] = rest.pop(0)
        elif p.name in kwargs:
            values[p.name] = kwargs[p.name]
        elif p.default is REQUIRED:
            raise TypeError(f"{name}: no argument {p.name}")
        else:
            values[p.name] = p.default
    unknown = kwargs.keys() - values.keys()
    if rest or unknown:
        raise TypeError(f"{name}: too many arguments {rest or sorted(unknown)}")
    return values
