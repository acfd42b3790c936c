"""The operators that an artifact may hold: those of `graph/ops.py`, and plain ATen ones by name.

An ATen overload outside our table may be saved and loaded if calling it can do no more than arithmetic:

* it writes to none of its arguments and aliases none of them into an output that it writes (`is_mutable`)
* all of its arguments are tensors, numbers, truth values, dtypes, layouts, devices, or lists and options of these: a
  string could name a file (`aten::from_file`) or a backend, a storage or generator could reach other memory or state
* it is no internal one (`_name`, `name_backward`) nor bound to one library (`fbgemm_…` reads pointers out of tensors):
  those trust their callers to have checked sizes
* it reads only elements that its inputs have: `as_strided` and `empty` show what else is in memory

The built-in `getattr`, which is canonical for `x.shape`, may read only the attributes in `READABLE`, off a node.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import fx

from ..graph.opbase import Op
from ..graph.ops import BY_TARGET, OPS, qualified_name
from .artifact_json import fail, printable, reason
from .artifact_values import UnsaveableError

READABLE = frozenset({"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag", "is_cuda",
                      "requires_grad", "itemsize", "is_sparse", "layout"})
_ATEN = re.compile(r"aten\.([a-zA-Z0-9][a-zA-Z0-9_]{0,63})\.([a-zA-Z0-9][a-zA-Z0-9_]{0,63})")
_PLAIN_TYPES = frozenset({"Tensor", "int", "float", "bool", "number", "Scalar", "SymInt", "ScalarType", "Layout",
                          "Device", "MemoryFormat", "complex", "None"})
_INTERNAL = re.compile(r"_|.*_backward(_|$)|(cudnn|miopen|mkldnn|fbgemm|quantized|thnn|slow|sparse|to_mkldnn|to_sparse|"
                       r"choose_qparams)(_|$)")
_RAW_MEMORY = re.compile(r"(as_strided|empty|new_empty|set|resize|from_file|record_stream)(_|$)")


def save_operator(node: fx.Node) -> str:
    """The name that the operator of a `call_function` node is saved by. Raises UnsaveableError for one that no artifact
    may hold."""
    op = BY_TARGET.get(node.target)  # type: ignore[arg-type]
    if op is not None:
        return op.name
    name = qualified_name(node.target)
    if isinstance(node.target, torch._ops.OpOverload) and _ATEN.fullmatch(name):
        why = why_not(node.target)
        if why is None:
            return name
        raise UnsaveableError(f"a call of {name}, which {why},")
    raise UnsaveableError(f"a call of {name}, which has no canonical name,")


def load_operator(name: str, place: str) -> Callable[..., Any]:
    """The operator saved as `name`. Raises ArtifactError (FXC0605) for one that no artifact may hold."""
    if name in OPS:
        return OPS[name].target
    match = _ATEN.fullmatch(name)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    overload = getattr(packet, match[2], None) if match and isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(overload, torch._ops.OpOverload):
        fail("FXC0605", f"{place}: {printable(name)} is not an operator that an artifact may hold")
    why = why_not(overload)
    if why is not None:
        fail("FXC0605", f"{place}: {printable(name)} is not an operator that an artifact may hold", f"it {why}")
    return overload


def why_not(overload: torch._ops.OpOverload) -> str | None:
    """Why an ATen overload may not stand in an artifact, None if it may."""
    schema = overload._schema
    name = schema.name.removeprefix("aten::")
    if schema.is_mutable:
        return "changes its arguments"
    if _INTERNAL.match(name):
        return "is an internal operator"
    if _RAW_MEMORY.match(name):
        return "can show memory that no input holds"
    for argument in schema.arguments:
        words = set(re.findall(r"[A-Za-z]+", str(argument.type))) - {"Optional", "List"}
        if not words <= _PLAIN_TYPES:
            return f"takes a {' '.join(sorted(words - _PLAIN_TYPES))}"
    if overload.namespace != "aten" or not schema.returns:
        return "gives nothing back"
    return None


def check_call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], place: str) -> None:
    """Raise ArtifactError where a call doesn't fit its operator's signature, or reads an attribute out of bounds."""
    op: Op | None = BY_TARGET.get(target)
    if op is None:
        return
    try:
        values = op.bind(args, kwargs)
    except TypeError as error:
        fail("FXC0604", f"{place}: the arguments don't fit the operator {op.name}", reason(error))
    if op.target in (getattr, getitem) and not isinstance(values["input"], fx.Node):
        fail("FXC0604", f"{place}: {op.name} reads from a node, not from a constant")
    if op.target is getattr and values["name"] not in READABLE:
        fail("FXC0606", f"{place}: the attribute {printable(str(values['name']))} may not be read",
             f"readable are {', '.join(sorted(READABLE))}")
