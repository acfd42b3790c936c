"""Half precision: weights in float16, and casts where what stays in float32 meets them.

The graph is walked once on fake tensors of the device, which need neither the device nor its memory. What an operator
reads decides where casts stand, as in `torch.autocast`: products read float16, what would overflow or lose its meaning
there reads float32, and the rest computes in what it is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..diagnostics import Diagnostic, PlanError
from ..graph.captured import Captured
from ..graph.comparing import inputs_of
from ..graph.modules import leaf_of
from ..graph.ops import OPS, kind_of, module_of, op_of, path_of, submodule
from ..graph.probe import FakesOnDevice, _run_module, map_tensors, quiet
from ..graph.provenance import inherit
from ..graph.trace_errors import RAISED_BY_MODELS

HALF = torch.float16
LARGEST = torch.finfo(HALF).max

# Operators that multiply tensors, or hold weights: on the GPU they want all their operands in one dtype.
PRODUCTS = frozenset((
    *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), "linear", "bilinear", "matmul",
    "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "einsum", "tensordot", "outer", "scaled_dot_product_attention",
    "layernorm", "groupnorm", "rmsnorm", "prelu", "index_put", "index_add", "index_copy", "scatter_add",
    "masked_scatter", "slice_scatter", "select_scatter"))
# Operators whose results leave the range of float16 (65504) where their arguments don't, or that want more than its 11
# bits; and those that torch has for float32 alone.
WIDE = frozenset((
    "exp", "exp2", "expm1", "log", "log10", "log1p", "log2", "pow", "square", "reciprocal", "rsqrt", "norm",
    "vector_norm", "normalize", "sum", "nansum", "prod", "cumsum", "cumprod", "std", "var", "std_mean", "var_mean",
    "cdist", "cosine_similarity", "logsumexp", "digamma", "lgamma", "erfinv", "grid_sample", "affine_grid", "complex",
    "polar", "angle", "view_as_complex", "local_response_norm"))
_NORMS = ("batchnorm", "instancenorm")  # modules that read float16 with statistics and weights in float32
_CLAMPED = "attn_mask"  # of scaled_dot_product_attention: float32's lowest number must not become -inf


class FakesOn(FakesOnDevice):
    """Fakes on `device` of tensors that are anywhere."""

    def _fake(self, tensor: Tensor) -> Tensor:
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    def value(self, node: fx.Node, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `node` gives for fakes. Raises PlanError (FXC0580) where torch can't compute it on the device."""
        try:
            with torch.no_grad(), quiet(), self.mode:
                return self._value(node, root, args, kwargs)
        except RAISED_BY_MODELS as error:
            words = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            source = node.meta.get("source")
            raise PlanError([Diagnostic(
                "FXC0580", f"`{node.name}` can't be computed on the target `{self.device.type}`: {words}",
                notes=(f"the model's line is {source}",) if source else (),
                help='rewrite that line of the model, or `finalize(target="cpu")`')]) from error

    def _value(self, node: fx.Node, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(submodule(root, owner), name)
            return self.of(value) if isinstance(value, Tensor) else value
        if node.op == "call_module":
            return _run_module(self.of, module_of(node), args, kwargs)
        function: Any = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
        return function(*args, **kwargs)


def to_half(captured: Captured, device: torch.device) -> list[str]:
    """Make `captured`, whose masks and quantizers are gone, compute in float16 on `device`, in place: its inputs and
    outputs keep their dtypes. Tensors stay where they are. Returns what to note; the caller refreshes.

    Raises PlanError: FXC0580 where an operator can't be computed there, FXC0581 for weights out of float16's range.
    """
    notes = _convert(captured)
    return notes + _Halving(captured, device).run()


def _convert(captured: Captured) -> list[str]:
    """Weights and buffers to float16, save those of modules that compute in float32."""
    root = captured.module
    done: set[object] = set()
    too_large: list[str] = []
    saturated: list[str] = []
    for node in captured.graph.nodes:
        if node.op not in ("get_attr", "call_module") or node.target in done:
            continue
        done.add(node.target)
        for name, tensor in _own(node, root):
            if tensor.dtype == torch.float32 and captured.concrete and _beyond(tensor):
                (too_large if isinstance(tensor, nn.Parameter) else saturated).append(name)
        if too_large:
            continue
        if node.op == "call_module" and _goes_half(node):
            module_of(node).half()
        elif node.op == "get_attr":
            _convert_one(root, str(node.target))
    if too_large:
        raise PlanError([Diagnostic(
            "FXC0581", f"weights are out of the range of half precision: {', '.join(too_large[:8])}",
            notes=(f"float16 ends at {LARGEST:.0f}",), help='`finalize(target="cpu")` computes in float32')])
    return [f"{name} holds numbers beyond {LARGEST:.0f}, which became that" for name in saturated]


def _own(node: fx.Node, root: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors that `node` reads by itself and that are to be converted; buffers out of range are saturated."""
    if node.op == "call_module":
        if not _goes_half(node):
            return []
        module = module_of(node)
        return [(f"{node.target}.{name}", tensor)
                for name, tensor in (*module.named_parameters(), *module.named_buffers())]
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(submodule(root, owner), name)
    return [(str(node.target), value)] if isinstance(value, Tensor) else []


def _beyond(tensor: Tensor) -> bool:
    """Whether finite numbers would become infinite; those of a buffer are brought back."""
    far = tensor.isfinite() & (tensor.abs() > LARGEST)
    if not bool(far.any()):
        return False
    if not isinstance(tensor, nn.Parameter):
        tensor.copy_(torch.where(far, tensor.clamp(-LARGEST, LARGEST), tensor))
    return True


def _goes_half(node: fx.Node) -> bool:
    """Whether the module that `node` calls computes in float16: torch's own, save batch norms."""
    return leaf_of(type(module_of(node))) is not None and not kind_of(node).startswith(_NORMS)


def _convert_one(root: nn.Module, target: str) -> None:
    owner, _, name = target.rpartition(".")
    module = submodule(root, owner)
    value = getattr(module, name)
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return
    if isinstance(value, nn.Parameter):
        value.data = value.data.to(HALF)
    else:
        setattr(module, name, value.to(HALF))


@dataclass
class _Halving:
    """Walks the graph: `values` has the fake value of each node, `casts` those that were put in."""

    captured: Captured
    device: torch.device
    values: dict[fx.Node, Any] = field(default_factory=dict)
    casts: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict)
    clamped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fakes = FakesOn(self.device)

    def run(self) -> list[str]:
        graph = self.captured.graph
        promised = _promised(graph)
        given = iter(inputs_of(self.captured))
        nodes = list(graph.nodes)
        body = next(node for node in nodes if node.op != "placeholder")
        for node in nodes:
            if node.op == "placeholder":
                self.values[node] = map_tensors(next(given), self.fakes.of)
                users = [user for user in node.users if kind_of(user) != "to_int8"]  # which reads any floats
                if _is(self.values[node], torch.float32) and users:
                    self._read_as(users, node, self._cast(node, HALF, body))
                continue
            if node.op == "output":
                self._keep(node, promised)
            else:
                self._place(node)
                self._feed(node)
            self.values[node] = self._fitting(node)
        return [f"{name} holds numbers beyond {LARGEST:.0f}, which became that" for name in self.clamped]

    def _fitting(self, node: fx.Node) -> Any:
        """The value of `node`; where an operator doesn't take tensors of several dtypes it reads float32."""
        try:
            return self._compute(node)
        except PlanError:
            if node.op not in ("call_function", "call_method") or kind_of(node) in PRODUCTS:
                raise
            self._want(node, torch.float32)
            return self._compute(node)

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda other: self.values[other])
        return self.fakes.value(node, self.captured.module, args, kwargs)

    def _feed(self, node: fx.Node) -> None:
        """Casts between `node` and what it reads."""
        if node.op == "call_module":
            wanted = self._dtype_of(node)
            if wanted is not None:
                self._want(node, wanted)
        elif node.op in ("call_function", "call_method"):
            kind = kind_of(node)
            if kind in PRODUCTS:
                self._want(node, HALF)
            elif kind in WIDE or op_of(node) is None:
                self._want(node, torch.float32)
            elif any(_is(self.values[source], HALF) for source in node.all_input_nodes):
                self._bring_back(node)

    def _dtype_of(self, node: fx.Node) -> torch.dtype | None:
        """What the module that `node` calls reads; None where it takes both."""
        module = module_of(node)
        if kind_of(node).startswith(_NORMS) or (leaf_of(type(module)) is None and hasattr(module, "fxc_kind")):
            return HALF if kind_of(node) == "sparse24_linear" else None
        found = next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), None)
        return found if found is not None or leaf_of(type(module)) is not None else torch.float32

    def _want(self, node: fx.Node, dtype: torch.dtype) -> None:
        other = torch.float32 if dtype == HALF else HALF
        for source in node.all_input_nodes:
            if _is(self.values[source], other):
                clamps = node.kwargs.get(_CLAMPED) is source
                self._read_as([node], source, self._cast(source, dtype, node, clamps))

    def _cast(self, source: fx.Node, dtype: torch.dtype, before: fx.Node, clamps: bool = False) -> fx.Node:
        """`source` in `dtype`, made in front of `before` unless it is there already."""
        key = (source, f"{dtype} {clamps}")
        if key not in self.casts:
            given = source
            with self.captured.graph.inserting_before(before):
                if clamps:
                    given = self._new("clamp", source, {"input": source, "min": -LARGEST})
                self.casts[key] = self._new("to", source, {"input": given, "dtype": dtype})
        return self.casts[key]

    def _new(self, kind: str, old: fx.Node, values: dict[str, Any]) -> fx.Node:
        args, kwargs = OPS[kind].normal(values)
        made = self.captured.graph.call_function(OPS[kind].target, args, kwargs)
        if old.op != "placeholder":
            made.meta["path"] = path_of(old)
            inherit(made, old)
        self.values[made] = self._compute(made)
        return made

    @staticmethod
    def _read_as(users: Iterable[fx.Node], source: fx.Node, cast: fx.Node) -> None:
        for user in users:
            if user is not cast:
                user.replace_input_with(source, cast)

    def _place(self, node: fx.Node) -> None:
        """Tensors that `node` makes are made on the device."""
        op = op_of(node)
        if op is None:
            return
        if not any(param.name == "device" for param in op.params):
            return
        if "device" in node.kwargs or not any(isinstance(self.values[source], Tensor)
                                              for source in node.all_input_nodes):
            node.kwargs = {**node.kwargs, "device": self.device}

    def _bring_back(self, node: fx.Node) -> None:
        """Numbers in the call beyond the range of float16, such as those that mask attention, are brought back."""
        def near(arg: Any) -> Any:
            far = type(arg) is float and LARGEST < abs(arg) < float("inf")
            return max(-LARGEST, min(LARGEST, arg)) if far else arg

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), near)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs = args, kwargs
            self.clamped.append(path_of(node) or node.name)

    def _keep(self, node: fx.Node, promised: list[Any]) -> None:
        """The model gives what it gave, each tensor in its dtype."""
        dtypes = iter(promised)
        node.args = fx.map_arg(node.args, lambda source: self._as(source, next(dtypes), node))

    def _as(self, source: fx.Node, dtype: Any, before: fx.Node) -> Any:
        value = self.values[source]
        if isinstance(value, Tensor):
            return source if value.dtype == dtype else self._cast(source, dtype, before)
        if not isinstance(value, tuple | list) or not any(isinstance(item, Tensor) for item in value):
            return source
        parts = []
        for place, each in enumerate(dtype):
            with self.captured.graph.inserting_before(before):
                part = self._new("getitem", source, {"input": source, "index": place})
            parts.append(self._as(part, each, before))
        return type(value)(parts) if type(value) in (tuple, list) else tuple(parts)


def _promised(graph: fx.Graph) -> list[Any]:
    """The dtypes of what the model gives, as they stand in the facts of its output."""
    output = next(iter(reversed(graph.nodes)))
    shape = output.args[0]
    found: list[Any] = []

    def walk(arg: Any, dtype: Any) -> None:
        if isinstance(arg, fx.Node):
            found.append(dtype)
        elif isinstance(arg, tuple | list):
            for item, each in zip(arg, dtype, strict=True):
                walk(item, each)
        elif isinstance(arg, dict):
            for item, each in zip(arg.values(), dtype, strict=True):
                walk(item, each)

    walk(shape, output.meta["fxc"].dtype)
    return found


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype


def check_on(captured: Captured, device: torch.device) -> Any:
    """What `captured` gives for its example inputs, as fake tensors on `device`: all its nodes are computed on fakes,
    without the device. Raises PlanError (FXC0580) at the first that can't be, or that gives a tensor elsewhere."""
    fakes, values = FakesOn(device), {}
    given = iter(inputs_of(captured))
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            values[node] = map_tensors(next(given), fakes.of)
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda other: values[other])
        values[node] = fakes.value(node, captured.module, args, kwargs)
        map_tensors(values[node], lambda tensor: _require_there(node, tensor, device))  # noqa: B023
    return values[node]


def _require_there(node: fx.Node, tensor: Tensor, device: torch.device) -> None:
    if tensor.device.type != device.type:
        raise PlanError([Diagnostic(
            "FXC0580", f"`{node.name}` gives a tensor on {tensor.device}, and the target is `{device.type}`",
            help='make it on the device of an input, or `finalize(target="cpu")`')])
