"""The tree of modules of an artifact and the tensors in it, to plain data and back.

Modules are listed parents first, each as a class with arguments, as a container that only holds others, or as another
path of a module listed before. Tensors are listed by name (`layer1.0.conv1.weight`), each with its shape, dtype and
role, or as another name of a tensor listed before, so that tied weights come back tied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .artifact_json import Cursor, fail, printable
from .artifact_modules import CONTAINER, build, describe
from .artifact_values import DTYPES, UnsaveableError

MAX_DIMS = 16
MAX_PATHS = 200_000
_FORMATS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
_RANKS = {"channels_last": 4, "channels_last_3d": 5}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class TreeEncoder:
    """Walks a module tree. `called` are the paths that the graph calls; any other module may be a container. With
    `copies`, `stored` gets a copy of each tensor."""

    called: frozenset[str]
    copies: bool = True
    modules: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, Tensor] = field(default_factory=dict)
    evaluation: list[str] = field(default_factory=list)
    _module_paths: dict[nn.Module, str] = field(default_factory=dict)
    _tensor_names: dict[Tensor, str] = field(default_factory=dict)

    def root(self, module: nn.Module) -> None:
        """Encode everything in `module`. Raises UnsaveableError with the path of what can't be saved."""
        self._tensors(module, "", None)
        self._children(module, "", None)

    def _children(self, module: nn.Module, path: str, built: nn.Module | None) -> None:
        made = dict(built.named_children()) if built is not None else {}
        for name, child in module._modules.items():
            if child is not None:
                self._module(child, f"{path}.{name}" if path else name, made.pop(name, None))
        if made:
            raise UnsaveableError(f"{path}, which has no {sorted(made)[0]},")

    def _module(self, module: nn.Module, path: str, made: nn.Module | None) -> None:
        if module in self._module_paths:
            self.modules.append({"path": path, "same": self._module_paths[module]})
            return
        self._module_paths[module] = path
        _refuse_hooks(module, path)
        if made is None:
            made = self._entry(module, path)
        self._tensors(module, path, made)
        self._children(module, path, made)

    def _entry(self, module: nn.Module, path: str) -> nn.Module | None:
        """List `module`; give back what its description builds, None for a container."""
        try:
            name, arguments = describe(module)
            made = build(Cursor(name, path), Cursor(arguments, path))
            _check_parameters(module, made, path)
        except UnsaveableError as error:
            if path in self.called:
                raise UnsaveableError(f"{path}, {error},") from error
            self.modules.append({"path": path, "class": CONTAINER})
            return None
        self.modules.append({"path": path, "class": name, "arguments": arguments})
        return made

    def _tensors(self, module: nn.Module, path: str, made: nn.Module | None) -> None:
        if not module.training:
            self.evaluation.append(path)
        for role, name, tensor in _own_tensors(module):
            full = f"{path}.{name}" if path else name
            if tensor in self._tensor_names:
                self.tensors.append({"name": full, "role": role, "same": self._tensor_names[tensor]})
                continue
            self._tensor_names[tensor] = full
            persistent = role == "buffer" and name not in module._non_persistent_buffers_set
            self.tensors.append(_tensor_entry(full, role, persistent, tensor))
            if self.copies:
                self.stored[full] = _plain_copy(tensor)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for role, table in (("parameter", module._parameters), ("buffer", module._buffers)):
        for name, tensor in table.items():
            if tensor is not None:
                yield role, name, tensor
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield "attribute", name, value


def _check_parameters(module: nn.Module, made: nn.Module, path: str) -> None:
    """Every tensor that the constructor makes is there, of the same role and shape, and the other way round."""
    for role, name, tensor in _own_tensors(made):
        table = module._parameters if role == "parameter" else module._buffers
        own = table.get(name)
        if own is None:
            raise UnsaveableError(f"{path}.{name}, which is no {role} any more,")
        if own.shape != tensor.shape:
            raise UnsaveableError(f"{path}.{name} of shape {list(own.shape)} where the settings of its "
                                  f"{type(made).__name__} say {list(tensor.shape)}")
    for name in module._parameters.keys() & made._parameters.keys():
        if module._parameters[name] is not None and made._parameters[name] is None:
            raise UnsaveableError(f"{path}.{name}, which its {type(made).__name__} was made without,")


def _refuse_hooks(module: nn.Module, path: str) -> None:
    for kind in _HOOKS:
        if getattr(module, kind):
            raise UnsaveableError(f"{path}, whose {kind.strip('_').replace('_', ' ')} would be lost,")


def _tensor_entry(name: str, role: str, persistent: bool, tensor: Tensor) -> dict[str, Any]:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in _DTYPE_NAMES:
        raise UnsaveableError(f"{name}, a {tensor.device.type} tensor of {tensor.layout} {tensor.dtype},")
    entry: dict[str, Any] = {"name": name, "role": role, "dtype": _DTYPE_NAMES[tensor.dtype],
                             "shape": list(tensor.shape)}
    if role == "buffer":
        entry["persistent"] = persistent
    if tensor.requires_grad:
        entry["requires_grad"] = True
    for text, memory_format in _FORMATS.items():
        if tensor.dim() != _RANKS[text]:
            continue
        plain = torch.empty(tensor.shape, device="meta")  # strides tell, where a size of 1 makes both layouts true
        if tensor.stride() == plain.to(memory_format=memory_format).stride() != plain.stride():
            entry["memory_format"] = text
    return entry


def _plain_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def read_modules(root: nn.Module, entries: Cursor) -> frozenset[str]:
    """Put the modules into `root`, their tensors on the meta device. Gives back the paths that a graph may call. Raises
    ArtifactError."""
    made: dict[str, nn.Module] = {"": root}
    callable_: set[str] = set()
    for entry in entries.items():
        fields = entry.fields(("path",), ("class", "arguments", "same"))
        path = fields["path"].path()
        if "same" in fields:
            first = fields["same"].path()
            if first not in made:
                fail("FXC0609", f"{fields['same'].place}: no module {printable(first)} can stand here too")
            module = made[first]
        elif "class" not in fields:
            fail("FXC0604", f"{entry.place}: the field `class` is missing")
        elif fields["class"].value == CONTAINER:
            module = nn.Module()
        else:
            module = build(fields["class"], fields["arguments"] if "arguments" in fields else Cursor({}, entry.place))
        if type(module) is not nn.Module:
            callable_.add(path)
        _attach(made, path, module, fields["path"].place, "same" in fields)
    _refuse_cycles(root)
    return frozenset(callable_)


def _attach(made: dict[str, nn.Module], path: str, module: nn.Module, place: str, shared: bool) -> None:
    holder, _, name = path.rpartition(".")
    if holder not in made:
        fail("FXC0609", f"{place}: the module {printable(path)} stands before its holder")
    if name in made[holder]._modules or hasattr(made[holder], name):
        fail("FXC0606", f"{place}: the name {printable(path)} is taken")
    made[holder].add_module(name, module)
    made[path] = module
    if not shared:
        made.update((f"{path}.{inner}", child) for inner, child in module.named_modules() if inner)


def _refuse_cycles(root: nn.Module) -> None:
    """Raise if a module holds itself, however far down, or if shared modules hold shared modules so often that there
    would be more than `MAX_PATHS` paths."""
    paths: dict[nn.Module, int] = {}
    above: set[nn.Module] = set()
    stack: list[tuple[nn.Module, bool]] = [(root, False)]
    while stack:
        module, leaving = stack.pop()
        children = [child for child in module._modules.values() if child is not None]
        if leaving:
            above.discard(module)
            paths[module] = 1 + sum(paths[child] for child in children)
            if paths[module] > MAX_PATHS:
                fail("FXC0608", f"graph.json: modules: more than {MAX_PATHS} module paths")
        elif module in above:
            fail("FXC0609", "graph.json: modules: a module holds itself")
        elif module not in paths:
            above.add(module)
            stack.append((module, True))
            stack.extend((child, False) for child in children)


def read_modes(root: nn.Module, entries: Cursor) -> None:
    """Put every module into training mode, and those listed into evaluation mode."""
    root.train()
    known = dict(root.named_modules(remove_duplicate=False))
    for entry in entries.items():
        path = entry.path() if entry.value else ""
        if path not in known:
            fail("FXC0609", f"{entry.place}: no module {printable(path)} is there")
        known[path].training = False


def read_tensors(root: nn.Module, entries: Cursor, stored: dict[str, Tensor], device: torch.device) -> frozenset[str]:
    """Put the tensors of `stored` into the tree; the names that a graph may read. Raises ArtifactError (FXC0607) where
    names, shapes, dtypes and roles don't fit, one to one."""
    holders = dict(root.named_modules(remove_duplicate=False))
    names: dict[str, tuple[str, Tensor]] = {}
    for entry in entries.items():
        fields = entry.fields(("name", "role"), ("dtype", "shape", "persistent", "requires_grad", "memory_format",
                                                 "same"))
        name, role = fields["name"].path(), fields["role"].choice(("parameter", "buffer", "attribute"))
        holder, _, own = name.rpartition(".")
        if name in names or holder not in holders:
            fail("FXC0609", f"{fields['name'].place}: no tensor {printable(name)} can stand there")
        if "same" in fields:
            tensor = _tied(fields["same"], role, names)
        else:
            tensor = _stored_tensor(fields, name, role, stored, device)
        persistent = fields["persistent"].boolean() if "persistent" in fields else True
        _place(holders[holder], own, role, tensor, persistent=persistent, place=fields["name"].place)
        names[name] = (role, tensor)
    _check_all_filled(root, {id(tensor) for _, tensor in names.values()}, stored)
    return frozenset(names)


def _tied(cursor: Cursor, role: str, names: dict[str, tuple[str, Tensor]]) -> Tensor:
    name = cursor.path()
    if name not in names or (names[name][0] == "parameter") != (role == "parameter"):
        fail("FXC0609", f"{cursor.place}: no {role} {printable(name)} stands before this one")
    return names[name][1]


def _stored_tensor(fields: Any, name: str, role: str, stored: dict[str, Tensor], device: torch.device) -> Tensor:
    place = fields["name"].place
    for needed in ("dtype", "shape"):
        if needed not in fields:
            fail("FXC0604", f"{place}: the field `{needed}` is missing")
    dtype = DTYPES[fields["dtype"].choice(tuple(DTYPES))]
    shape = tuple(size.integer(0) for size in fields["shape"].items(MAX_DIMS))
    if name not in stored:
        fail("FXC0607", f"weights.safetensors holds no tensor {printable(name)}")
    tensor = stored.pop(name)
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        fail("FXC0607", f"the tensor {printable(name)} is {tensor.dtype} {list(tensor.shape)} in weights.safetensors "
                        f"and {dtype} {list(shape)} in graph.json")
    requires_grad = "requires_grad" in fields and fields["requires_grad"].boolean()
    if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        fail("FXC0604", f"{place}: a tensor of {dtype} can't require a gradient")
    tensor = tensor.to(device)
    if "memory_format" in fields:
        text = fields["memory_format"].choice(tuple(_FORMATS))
        if len(shape) != _RANKS[text]:
            fail("FXC0604", f"{place}: {text} doesn't fit the shape {list(shape)}")
        tensor = torch.empty_like(tensor, memory_format=_FORMATS[text]).copy_(tensor)
    if role == "parameter":
        return nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def _place(holder: nn.Module, name: str, role: str, tensor: Tensor, *, persistent: bool,
           place: str) -> None:
    tables: dict[str, dict[str, Any]] = {"parameter": holder._parameters, "buffer": holder._buffers, "attribute": {}}
    made = tables[role]
    if name in made:
        old = made[name]
        if old is None or old.shape != tensor.shape:
            found = "nothing" if old is None else str(list(old.shape))
            fail("FXC0607", f"{place}: a tensor {list(tensor.shape)} can't stand where its module has {found}")
        setattr(holder, name, tensor)  # through the module, which may keep its own list of weights (nn.LSTM)
    elif hasattr(holder, name):
        fail("FXC0606", f"{place}: the name {printable(name)} is taken")
    elif role == "parameter":
        holder.register_parameter(name, tensor)  # type: ignore[arg-type]
    elif role == "buffer":
        holder.register_buffer(name, tensor, persistent=persistent)
    else:
        setattr(holder, name, tensor)


def _check_all_filled(root: nn.Module, filled: set[int], stored: dict[str, Tensor]) -> None:
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if id(tensor) not in filled:
            fail("FXC0607", f"graph.json lists no tensor {printable(name)}, which its module needs")
    if stored:
        fail("FXC0607", f"weights.safetensors holds {printable(sorted(stored)[0])}, which graph.json doesn't list")

