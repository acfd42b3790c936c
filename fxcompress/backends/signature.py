"""What a GraphModule takes and gives, in the flat form of files: tensors by name, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..diagnostics import Diagnostic, PlanError
from ..graph.facts import NodeFact


@dataclass(frozen=True)
class Input:
    """One tensor that a model takes. `dynamic` says of each dimension whether it grows with the batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dynamic: tuple[bool, ...]

    def example(self, generator: torch.Generator) -> Tensor:
        """A tensor like it, of two samples or more where the batch is dynamic: noise, or zeros for integers."""
        shape = [size if size > 1 or not moves else 2 for size, moves in zip(self.shape, self.dynamic, strict=True)]
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(self.dtype)
        return torch.zeros(shape, dtype=self.dtype)


@dataclass(frozen=True)
class Signature:
    """`inputs` by the names that the module's `forward` has for them, in order; `outputs` are the names of the tensors
    given, each once. `result` is the nest that the model gives: a tuple, list or dict of such, of places in `outputs`,
    written as `{"at": 0}`, and of constants, `{"is": None}`."""

    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    result: Any

    @staticmethod
    def of(module: fx.GraphModule) -> Signature:
        """Read off `module`, whose nodes have their facts. Raises PlanError (FXC0641) for an input that is no tensor
        and has no default, and for a result that holds something else than tensors and constants."""
        inputs = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                fact: NodeFact | None = node.meta.get("fxc")
                if fact is not None and isinstance(fact.dtype, torch.dtype):
                    inputs[str(node.target)] = Input(fact.shape, fact.dtype, fact.dynamic)
                elif not node.args:
                    raise _unfit(f"the input `{node.name}` is no tensor")
        tensors: list[fx.Node] = []
        result = _nest(next(node for node in module.graph.nodes if node.op == "output").args[0], tensors)
        if not inputs or not tensors:
            raise _unfit("it takes or gives no tensor")
        names = [node.name if node.name not in inputs else f"{node.name}_given" for node in tensors]
        return Signature(inputs, tuple(names) if len(names) > 1 else ("output",), result)

    def examples(self, seed: int = 0) -> list[Tensor]:
        """A tensor for each input."""
        generator = torch.Generator().manual_seed(seed)
        return [entry.example(generator) for entry in self.inputs.values()]

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """What `torch.export` is told of each input. Which dimensions are equal it finds out by itself."""
        return tuple({place: torch.export.Dim.DYNAMIC for place, moves in enumerate(entry.dynamic) if moves}
                     for entry in self.inputs.values())

    def restore(self, tensors: Sequence[Tensor]) -> Any:
        """The nest that the model gives, of its tensors in the order of `outputs`."""
        return _restored(self.result, tensors)

    def ordered(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in the order of `inputs`. Raises TypeError as a call with wrong arguments does."""
        if not kwargs and len(args) == len(self.inputs):
            return list(args)
        names = list(self.inputs)
        unknown = [name for name in kwargs if name not in names or name in names[: len(args)]]
        missing = [name for name in names[len(args):] if name not in kwargs]
        if len(args) > len(names) or unknown or missing:
            raise TypeError(f"the model takes {', '.join(names)}; {len(args)} given by place"
                            + (f", not taken: {', '.join(unknown)}" if unknown else "")
                            + (f", missing: {', '.join(missing)}" if missing else ""))
        return [*args, *(kwargs[name] for name in names[len(args):])]


def flatten_inputs(module: fx.GraphModule) -> None:
    """Let `module` take the tensors of its signature alone, in place: other inputs get their defaults."""
    for node in module.graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta["fxc"].dtype, torch.dtype):
            for user in list(node.users):
                user.args, user.kwargs = _with(user.args, node), _with(user.kwargs, node)
            module.graph.erase_node(node)
        node.args = ()
    module.recompile()


def _with(arguments: Any, placeholder: fx.Node) -> Any:
    """`arguments` with the default of `placeholder` in its place."""
    default: Any = placeholder.args[0]
    return fx.map_arg(arguments, lambda node: default if node is placeholder else node)


def flatten(module: fx.GraphModule) -> None:
    """The same, and let it give a tuple of the tensors of its signature."""
    flatten_inputs(module)
    output, = module.graph.find_nodes(op="output")
    tensors: list[fx.Node] = []
    _nest(output.args[0], tensors)
    output.args = (tuple(tensors),)
    module.recompile()


def _nest(value: Any, tensors: list[fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        if value not in tensors:
            tensors.append(value)
        return {"at": tensors.index(value)}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_nest(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": {str(name): _nest(item, tensors) for name, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"is": value}
    raise _unfit(f"it gives a {type(value).__name__}")


def _restored(nest: Any, tensors: Sequence[Tensor]) -> Any:
    (kind, content), = nest.items()
    if kind == "at":
        return tensors[content]
    if kind == "is":
        return content
    if kind == "dict":
        return {name: _restored(item, tensors) for name, item in content.items()}
    items = [_restored(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _unfit(why: str) -> PlanError:
    return PlanError([Diagnostic("FXC0641", "this model can't be exported", notes=(why,),
                                 help="files take and give tensors: wrap the model in one that does")])
