"""The recorder: turns torch calls into nodes of the normal form, and knows the shape of every value while it does.

Both ways of capture feed it calls: `trace.py` those of the running model, `export_.py` those of an exported graph.
Each call is computed on fake tensors at two batch sizes. What comes out equal in both is static: sizes become Python
numbers and size arithmetic leaves no node. What differs depends on the batch and stays a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from . import frames
from .convert import CONVERTERS, Done, NoCanonicalFormError
from .dynamic import DynFloat, DynInt, UntraceableError, holds_for_every_batch
from .opbase import Op
from .ops import OPS
from .probe import Fakes
from .shapes import META
from .sources import Source, sources
from .tidy import tidy
from .trace_errors import RAISED_BY_MODELS
from .values import BatchFixedError, Held, Value, all_equal, flat, map_leaves
from .writes import WRITES, overwrite

_RANDOM = frozenset(
    "rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like normal_ "
    "uniform_ bernoulli_ exponential_ random_ log_normal_ cauchy_ geometric_".split())
_NO_GRAPH = frozenset(
    "__bool__ item tolist __float__ __int__ __index__ __complex__ __array__ __contains__ numpy "
    "_local_scalar_dense".split())


@dataclass
class Recorder:
    """Records into `graph`. `names` maps parameters and buffers (by id) to their path in the module."""

    graph: fx.Graph
    fakes: Fakes
    names: Mapping[int, str]
    device: torch.device
    path: str = ""
    values: dict[int, Value] = field(default_factory=dict)
    results: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)  # node -> its value in each probe
    constants: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    twin: Callable[[Op, dict[str, Any]], str | None] | None = None  # see `twins.py`
    locate: Callable[[], str] = frames.user_line
    _constant_ids: dict[int, tuple[Tensor, int, str]] = field(default_factory=dict)
    _sizes: dict[tuple[fx.Node, int], DynInt] = field(default_factory=dict)
    _sharers: dict[int, list[int]] = field(default_factory=dict)  # memory -> ids of the tensors on it
    _memories: dict[int, int] = field(default_factory=dict)  # storage of a fake -> memory, where they differ
    _alive: list[Value] = field(default_factory=list)  # ids of tensors and storages stay taken
    _device: Held | None = None

    # -- what is known of values ----------------------------------------------------------------------------------

    def source(self) -> str:
        """The line of the model that runs now: "resnet.py:102 `out += identity`"."""
        return self.locate()

    def refuse(self, reason: str) -> NoReturn:
        """Raise UntraceableError at the model's current line."""
        raise UntraceableError(reason, self.source())

    def tracked(self, tensor: Tensor) -> bool:
        """Whether `tensor` comes from an input, parameter or buffer, not from constants alone."""
        return id(tensor) in self.values or id(tensor) in self.names

    def value(self, tensor: Tensor) -> Value:
        """What is known of `tensor`; a parameter, buffer or constant met for the first time gets its `get_attr`
        node."""
        found = self.values.get(id(tensor))
        if found is not None:
            if found.stale:
                self.refuse(found.stale)
            return found
        name = self.names.get(id(tensor)) or self._constant(tensor)
        fake = self.fakes.of(tensor)
        node = self.graph.get_attr(name)
        return self._keep(node, tensor, (fake,) * len(self.fakes.batches))

    def fake(self, tensor: Tensor) -> Tensor:
        """The fake of `tensor` at the example's batch size."""
        found = self.values.get(id(tensor))
        return found.fakes[0] if found is not None else self.fakes.of(tensor)

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The dtype of `tensor`."""
        return self.fake(tensor).dtype

    def dynamic_dims(self, tensor: Tensor) -> set[int]:
        """The dimensions of `tensor` whose size depends on the batch."""
        shapes = [fake.shape for fake in self.values[id(tensor)].fakes] if id(tensor) in self.values else [tensor.shape]
        return {dim for dim, size in enumerate(shapes[0]) if any(shape[dim] != size for shape in shapes)}

    def shape_of(self, tensor: Tensor) -> torch.Size:
        """The shape of `tensor`; dynamic sizes are `DynInt`s with a `size` node, one a (value, dimension)."""
        dynamic = self.dynamic_dims(tensor)
        if not dynamic:
            return self.fake(tensor).shape
        shape: list[Any] = list(self.fake(tensor).shape)
        for dim in dynamic:
            shape[dim] = self._size(tensor, dim)
        return torch.Size(shape)

    def _size(self, tensor: Tensor, dim: int) -> DynInt:
        value = self.value(tensor)
        if (value.node, dim) not in self._sizes:
            self._sizes[value.node, dim] = self.emit(OPS["size"], {"input": tensor, "dim": dim})
        return self._sizes[value.node, dim]

    def decide(self, function: Callable[[Any, Any], bool], left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
        """The outcome of a comparison with a dynamic size, if it is the same for every batch size."""
        outcome = holds_for_every_batch(function, left, right, self.fakes.batches)
        if outcome is None:
            self.refuse("a condition depends on the batch size")
        return outcome

    # -- recording ------------------------------------------------------------------------------------------------

    def call(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        """Record a call of the canonical operator `kind`."""
        op = OPS[kind]
        return self._convert(Source(kind, op, op.params, False), op.bind(args, kwargs))

    def record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Record the call `function(*args, **kwargs)` and give back its value: fake tensors, numbers, or real tensors
        where everything it depends on is constant."""
        name = getattr(function, "__name__", "").partition(".")[0]  # ATen's `add.Tensor` is `add`
        if not self._depends(args, kwargs) and name not in _RANDOM:
            return function(*args, **kwargs)
        if name in WRITES:
            return WRITES[name](self, *args, **kwargs)
        if name in _NO_GRAPH:
            self.refuse(f"the model reads the value of a tensor (`{name}`)")
        source = sources().get(function)
        if source is not None:
            try:
                return self._convert(source, source.bind(args, kwargs))
            except (TypeError, NoCanonicalFormError):
                pass  # written in a way the table doesn't know: it stays as it is
        if kwargs.get("out") is not None:
            self.refuse(f"`{name}` writes into its argument `out`")
        return self._raw(function, name, args, kwargs)

    def _depends(self, args: object, kwargs: object) -> bool:
        return any(isinstance(item, DynInt | DynFloat) or (isinstance(item, Tensor) and self.tracked(item))
                   for item in flat((args, kwargs)))

    def _convert(self, source: Source, values: dict[str, Any]) -> Any:
        in_place = values.pop("__in_place__", False)
        base = next(iter(values.values()))
        converter = CONVERTERS.get(source.op.name)
        converted = converter(self, source, values) if converter is not None else values
        if isinstance(converted, Done):
            result = converted.result
        else:
            result = self.emit(source.op, tidy(source.op, converted, self))
            if source.op.name == "getitem":
                self._is_part(result, converted)
        return overwrite(self, base, result) if in_place and result is not base else result

    def alias(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`tensor` in other memory (`clone`, `contiguous`): another tensor for the model, the same node for the
        graph."""
        if not self.tracked(tensor):
            return function(tensor)
        value = self.value(tensor)
        fakes = self._compute(partial(self.fakes.call, function), (tensor,), {}, "clone")
        if fakes[0] is value.fakes[0]:
            return tensor
        return self._keep(value.node, fakes[0], fakes).tensor

    def create(self, op: Op, values: dict[str, Any]) -> dict[str, Any] | Done:
        """Make a new tensor: a real constant where all is known, else a node on the device of the inputs."""
        like = op.name.endswith("_like")
        base = op.name.removeprefix("new_").removesuffix("_like")
        plain = {key: value for key, value in values.items() if key not in ("input", "device")}
        if like:
            plain["size"] = tuple(self.shape_of(values["input"]))
        if op.name not in _RANDOM and not self._depends(plain, ()):
            made = OPS[base]
            args, kwargs = made.normal(plain)
            return Done(made.target(*args, **kwargs, device=self.device))
        given = values.get("dtype")
        if "input" in values and given == self.dtype_of(values["input"]):
            values["dtype"] = None
        values["device"] = None if "input" in values else self.device_of_inputs()
        return values

    def device_of_inputs(self) -> Held:
        """The device of the first input, read in the graph."""
        if self._device is None:
            first = next(node for node in self.graph.nodes if isinstance(self.results[node][0], Tensor))
            with self.graph.inserting_after(first):
                node = self.graph.call_function(getattr, (first, "device"))
            self._device = Held(node, self.fakes.device)
            self._describe(node, (self.fakes.device,) * len(self.fakes.batches))
        return self._device

    def _constant(self, tensor: Tensor) -> str:
        """The name of the buffer that keeps `tensor`, a constant, as it is now. Equal constants share one."""
        known = self._constant_ids.get(id(tensor))
        if known is not None and known[1] == tensor._version:
            return known[2]
        same = (name for name, other in self.constants.items()
                if other.dtype == tensor.dtype and other.shape == tensor.shape and torch.equal(other, tensor))
        name = next(same, f"_constant{len(self.constants)}")
        if isinstance(tensor, nn.Parameter):
            shape = " x ".join(map(str, tensor.shape)) or "one number"
            at = f" at {self.source()}" if self.source() else ""
            self.notes.append(f"a parameter of {shape} read{at} is in none of the model's modules: the graph holds it "
                              "as a constant")
        if name not in self.constants:
            self.constants[name] = tensor.detach().clone().to(self.device)
        self._constant_ids[id(tensor)] = (tensor, tensor._version, name)
        return name

    def _is_part(self, part: Any, values: Mapping[str, Any]) -> None:
        """Remember what `part` was indexed out of, if it shares its memory."""
        whole = self.values.get(id(values["input"]))
        mine = self.values.get(id(part))
        if whole is not None and mine is not None and mine.memory == whole.memory:
            index = values["index"]
            mine.whole = (whole.tensor, index if isinstance(index, tuple) else (index,))

    def _raw(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Record an operator outside the table. One that works in place gets a copy to work on."""
        in_place = name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor)
        if not in_place:
            return self._call_as_is(function, args, {
            key: self.device_of_inputs() if key == "device" and value is not None else value
            for key, value in kwargs.items()
        }, name or "call")
        copy = self._call_as_is(torch.clone, (args[0],), {}, "clone")
        return overwrite(self, args[0], self._call_as_is(function, (copy, *args[1:]), dict(kwargs), name))

    def emit(self, op: Op, values: dict[str, Any]) -> Any:
        """Append the canonical node of `op`, or a call of the module whose twin computes it, and give back its
        value."""
        args, kwargs = op.normal(values)
        results = self._compute(partial(self.fakes.call, op.target), args, kwargs, op.name)
        path = self.twin(op, values) if self.twin is not None else None
        if path is not None:
            return self._append("call_module", path, (values["input"],), {}, path.replace(".", "_"), results)
        return self._append("call_function", op.target, args, kwargs, op.name, results)

    def emit_module(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module) -> Any:
        """Append a call of the leaf module at `path`."""
        name = path.replace(".", "_")
        results = self._compute(partial(self.fakes.run_module, module), args, kwargs, name)
        return self._append("call_module", path, args, kwargs, name, results)

    def _append(self, kind: str, target: Any, args: Any, kwargs: Any, name: str, results: tuple[Any, ...]) -> Any:
        """Append a node with the value `results`, unless that is a constant, and give back what the model gets."""
        if not any(isinstance(item, Tensor) for item in flat(results[0])) and all_equal(results):
            return results[0]
        return self._wrap(self.graph.create_node(kind, target, self.argument(args), self.argument(kwargs), name),
                          results)

    def _call_as_is(self, function: Callable[..., Any], args: Any, kwargs: Any, name: str) -> Any:
        results = self._compute(partial(self.fakes.call, function), args, kwargs, name)
        return self._append("call_function", function, args, kwargs, name, results)

    def _compute(self, run: Callable[..., Any], args: Any, kwargs: Any, name: str) -> tuple[Any, ...]:
        """The fake result in every probe."""
        results: list[Any] = []
        with torch.no_grad():
            for probe in range(len(self.fakes.batches)):
                try:
                    results.append(run(self.probe(args, probe), self.probe(kwargs, probe)))
                except (DynamicOutputShapeException, DataDependentOutputException) as error:
                    reason = f"the shape of what `{name}` gives depends on the value of a tensor"
                    raise UntraceableError(reason, self.source()) from error
                except RAISED_BY_MODELS as error:
                    reason = f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                    if probe:
                        raise BatchFixedError(reason, self.source()) from error
                    raise UntraceableError(reason, self.source(), computing=True) from error
        return tuple(results)

    def _wrap(self, node: fx.Node, results: tuple[Any, ...]) -> Any:
        """What the model gets for `node`: fake tensors and dynamic numbers it can go on with. Models that look at what
        is in a mask ask first if it is a `FakeTensor`, so those of whole numbers are."""
        first = results[0]
        if node not in self.results:
            self._describe(node, results)
        if isinstance(first, Tensor):
            shared = self.values.get(id(first))
            if not (first.is_floating_point() or first.is_complex()):
                first, shared = self.fakes.on_device(first), None
            return self._keep(node, first if shared is None else first.view_as(first), results).tensor
        if isinstance(first, tuple | list):
            if any(len(result) != len(first) for result in results):
                self.refuse("the number of results depends on the batch size")
            items = [self._item(node, place, tuple(result[place] for result in results)) for place in range(len(first))]
            if isinstance(first, list):
                return items
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if isinstance(first, bool) or not isinstance(first, int | float):
            self.refuse(f"a value of type {type(first).__name__} depends on the batch size")
        return (DynInt if isinstance(first, int) else DynFloat)(self, node, results)

    def _item(self, node: fx.Node, place: int, results: tuple[Any, ...]) -> Any:
        if not any(isinstance(item, Tensor) for item in flat(results[0])) and all_equal(results):
            return results[0]
        return self._wrap(self.graph.create_node("call_function", OPS["getitem"].target, (node, place), {}, "getitem"),
                          results)

    def _describe(self, node: fx.Node, results: tuple[Any, ...]) -> None:
        self.results[node] = results
        node.meta["path"] = self.path
        node.meta["source"] = self.source()
        if not torch.is_grad_enabled():
            node.meta["no_grad"] = True

    def _keep(self, node: fx.Node, tensor: Tensor, fakes: tuple[Tensor, ...]) -> Value:
        if node not in self.results:
            self._describe(node, fakes)
        storage = fakes[0].untyped_storage()._cdata
        value = self.values[id(tensor)] = Value(tensor, node, fakes, self._memories.get(storage, storage))
        self._sharers.setdefault(value.memory, []).append(id(tensor))
        self._alive.append(value)
        return value

    def rebind(self, tensors: list[Tensor], news: list[Value], reason: str) -> None:
        """Let `tensors`, parts of one memory, stand for the values `news`; nothing else on that memory can be read
        any more, for `reason`."""
        memory = self.values[id(tensors[0])].memory
        for other in self._sharers[memory]:
            self.values[other].stale = reason
        for tensor, new in zip(tensors, news, strict=True):
            old = self.values[id(tensor)]
            self.values[id(tensor)] = Value(tensor, new.node, new.fakes, memory, old.whole)
            self._memories[new.fakes[0].untyped_storage()._cdata] = memory

    def input(self, name: str, example: Any) -> Any:
        """Append the placeholder `name` and give what the model gets for it. Numbers and the like are constants: the
        graph takes them and ignores them."""
        node = self.graph.placeholder(name)
        probes = range(len(self.fakes.batches))
        results = tuple(self.fakes.inputs(example, probe) for probe in probes)
        if not any(isinstance(item, Tensor) for item in flat(results[0])):
            self._describe(node, results)
            return example
        return self._wrap(node, results)

    # -- arguments ------------------------------------------------------------------------------------------------

    def argument(self, value: Any) -> Any:
        """`value` as the argument of a node."""
        def leaf(item: Any) -> Any:
            if isinstance(item, Tensor):
                return self.value(item).node
            return item.node if isinstance(item, DynInt | DynFloat | Held) else item

        return map_leaves(value, leaf)

    def probe(self, value: Any, probe: int) -> Any:
        """`value` in `probe`: fakes and plain numbers."""
        def leaf(item: Any) -> Any:
            if isinstance(item, Tensor):
                found = self.values.get(id(item))
                return found.fakes[probe] if found is not None else self.fakes.of(item)
            if isinstance(item, DynInt | DynFloat):
                return item.values[probe]
            return META if isinstance(item, Held) else item

        return map_leaves(value, leaf)

