"""Calibration data: batches of inputs on which a captured model is run, and what collectors make of its values.

    data = Calibration.of(batches, captured)
    moments = data.moments(captured, [(node, 1)])     # mean, mean |x| and mean x² of each channel of a node
    data.feed(captured, {node: [collector]})          # the same run for collectors of any kind

The model is run as it is at that time: in evaluation mode, without gradients, batch by batch, and only as far as the
nodes that are watched. Nothing of it changes: not its mode, not its running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from ..diagnostics import Diagnostic, PlanError
from .captured import Captured
from .distilled import is_control
from .facts import shapes
from .interpret import evaluating, values_of
from .propagate import device_of
from .trace_errors import RAISED_BY_MODELS

CHUNK = 64  # samples of a batch of its own that a tensor of many is cut into
_HELP = ("give an iterable of batches, each like the example inputs (a tensor, a tuple of inputs, or a dict by "
         "keyword), without labels: `[images for images, _ in loader]`")


class Collector(Protocol):
    """Watches the value of one node."""

    def see(self, value: Any) -> None:
        """Take in the node's value for one more batch; it may be changed or freed afterwards."""


@dataclass
class Moments:
    """Running moments of each channel of a tensor, over all its other dimensions and all batches, in float64.

    `dim` is the dimension of the channels; `mean` is that of x, `magnitude` of |x|, `square` of x², each one number a
    channel; `count` is how many numbers of each channel were seen.
    """

    dim: int
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    magnitude: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    square: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def see(self, value: Tensor) -> None:
        """Take in a tensor of one batch. Batches weigh by their size."""
        value = value.detach()
        if value.dtype != torch.float64:
            value = value.float()  # squares of half floats overflow
        others = [dim for dim in range(value.dim()) if dim != self.dim % value.dim()]
        count = value.numel() // max(1, value.shape[self.dim])
        if not count:
            return
        self.count += count
        for name, part in (("mean", value), ("magnitude", value.abs()), ("square", value.square())):
            total = part.sum(others, dtype=torch.float64) if others else part.double()
            old: Tensor = getattr(self, name)
            setattr(self, name, old + (total.cpu() / count - old) * (count / self.count))


Watch = Callable[[Iterable[object]], Iterable[object]]  # lets batches through, and tells someone
Place = tuple[fx.Node, int]  # a node whose value is a tensor, and the dimension of its channels


@dataclass(frozen=True)
class Calibration:
    """Batches that can be run through over and over, or the first `samples` inputs in them. Use `of`. What runs through
    them goes by `watch`."""

    batches: Iterable[object]
    watch: Watch | None = None
    samples: int | None = None

    @classmethod
    def of(cls, batches: object, captured: Captured) -> Calibration:
        """Batches for `captured`: an iterable of batches, each a tensor, a tuple of inputs, or a dict by keyword.

        A single tensor, or a single dict of them, is cut along its first dimension into batches of 64. An iterator (a
        generator) is exhausted here and its batches kept; any other iterable (a `DataLoader`) is iterated anew whenever
        data are needed, so that no more than one of its batches is held at a time.

        Raises PlanError (FXC0570) if it gives nothing or its batches don't fit the model; of an iterable that is
        neither list nor iterator only the first one is looked at now, and the others when they are run.
        """
        if isinstance(batches, Calibration):
            return batches
        if isinstance(batches, Tensor | Mapping):
            batches = _cut(batches, captured)
        if not isinstance(batches, Iterable):
            raise _unfit(f"the calibration data are of the type {type(batches).__name__}, no iterable of batches")
        if isinstance(batches, Iterator):
            batches = list(batches)
        first = 0
        for number, batch in enumerate(batches, 1):
            first = number
            inputs_of(captured, batch, number)
            if not isinstance(batches, Sequence):
                break
        if not first:
            raise _unfit("the calibration data are empty: there is no batch in them", "a generator that was run "
                         "through before gives nothing a second time")
        return cls(batches)

    def feed(self, captured: Captured, collectors: Mapping[fx.Node, Sequence[Collector]]) -> None:
        """Run `captured` on every batch, and show its collectors each node's values. Takes one forward pass a batch, up
        to the last node that is watched, and the memory of one.

        Raises PlanError (FXC0570) for a batch that doesn't fit, or that the model fails on.
        """
        wanted = _upstream(collectors)
        device = device_of(captured.module, captured.example)
        run, left = fx.Interpreter(captured.module), self.samples
        with evaluating(captured.module):
            for number, batch in enumerate(self.batches if self.watch is None else self.watch(self.batches), 1):
                inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf,
                                  inputs_of(captured, batch, number))
                if left is not None:
                    inputs, count = _shortened(captured, inputs, left)
                    left -= count
                for node, value in _guarded(run, inputs, wanted, number):
                    for collector in collectors.get(node, ()):
                        collector.see(value)
                if left is not None and left <= 0:
                    break

    def moments(self, captured: Captured, places: Iterable[Place]) -> dict[Place, Moments]:
        """The moments of the channels at each of `places`, all from one run over the data.

        Raises PlanError (FXC0570) as `feed` does, and where a mean isn't finite.
        """
        found = {place: Moments(place[1]) for place in places}
        collectors: dict[fx.Node, list[Moments]] = {}
        for (node, _), moments in found.items():
            collectors.setdefault(node, []).append(moments)
        if found:
            self.feed(captured, collectors)
        for (node, _), moments in found.items():
            if not bool(moments.mean.isfinite().all()):
                raise _unfit(f"on the calibration data `{node.name}` gives infinite values, or none that are numbers",
                             "look for broken samples")
        return found


def _shortened(captured: Captured, inputs: list[Any], samples: int) -> tuple[list[Any], int]:
    """What each placeholder gets of the first `samples` of a batch, and how many these are: all of it where the model
    takes batches of one size."""
    count = next((len(leaf) for leaf in inputs if isinstance(leaf, Tensor) and leaf.dim()), samples)
    if captured.fixed_batch or count <= samples:
        return inputs, count
    return tree_map(lambda leaf: leaf[:samples] if isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) else leaf,
                    inputs), samples


def inputs_of(captured: Captured, batch: object, number: int = 1) -> list[Any]:
    """What each placeholder of `captured` gets of a batch, in their order; floating-point numbers of another precision
    are converted. Raises PlanError (FXC0570), which calls it batch `number`."""
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder"]
    nodes = [node for node in inputs if not is_control(node)]
    if isinstance(batch, Mapping):
        unknown = [f"`{name}`" for name in batch if name not in {node.name for node in nodes}]
        missing = [f"`{node.name}`" for node in nodes if node.name not in batch and not node.args]
        if unknown or missing:
            lines = [f"not an input: {', '.join(unknown)}"] * bool(unknown)
            raise _unfit(f"batch {number} of the calibration data has other inputs than the model", *lines,
                         *[f"missing: {', '.join(missing)}"] * bool(missing))
        values = [batch.get(node.name, *node.args[:1]) for node in nodes]
    else:
        given = list(batch) if isinstance(batch, tuple | list) else [batch]
        least = sum(not node.args for node in nodes)
        if not least <= len(given) <= len(nodes):
            raise _unfit(f"batch {number} of the calibration data has {_count(len(given))}, and the model takes "
                         f"{_count(len(nodes))}", f"they are {', '.join(f'`{node.name}`' for node in nodes)}")
        values = [*given, *(node.args[0] for node in nodes[len(given):])]
    fitted = [_fitted(captured, node, value, number) for node, value in zip(nodes, values, strict=True)]
    return [*fitted, *(node.args[0] for node in inputs[len(nodes):])]


def missing(need: str) -> Diagnostic:
    """What to say where `need`, a setting such as `by = activation`, finds no calibration data; the caller adds the
    place."""
    return Diagnostic(
        "FXC0346", f"`{need}` needs calibration data, and there are none",
        help="give batches of inputs: `calibration=` of `compile` or `apply`, `--calibration` on the command line")


def _unfit(message: str, *notes: str) -> PlanError:
    return PlanError([Diagnostic("FXC0570", message, notes=notes, help=_HELP)])


def _count(inputs: int) -> str:
    return f"{inputs} input{'s' * (inputs != 1)}"


def _cut(data: Tensor | Mapping[Any, Any], captured: Captured) -> list[object]:
    """One large batch as several."""
    size = captured.example.batch if captured.fixed_batch else CHUNK
    if isinstance(data, Tensor):
        return list(torch.split(data, size)) if data.dim() and len(data) else []
    tensors = [value for value in data.values() if isinstance(value, Tensor)]
    if not tensors or len({tuple(tensor.shape[:1]) for tensor in tensors}) > 1 or not tensors[0].dim():
        return [data]
    count = len(tensors[0])
    return [{name: value[start : start + size] if isinstance(value, Tensor) else value for name, value in data.items()}
            for start in range(0, count, size)]


def _fitted(captured: Captured, node: fx.Node, value: Any, number: int) -> Any:
    fact = node.meta["fxc"]
    if isinstance(value, Tensor) and value.is_floating_point() and getattr(fact.dtype, "is_floating_point", False):
        value = value.to(fact.dtype)
    dtype = value.dtype if isinstance(value, Tensor) else None
    if (not isinstance(fact.shape, tuple) or _alike(shapes(value), fact.shape, fact.dynamic)) and (
            dtype == fact.dtype or not isinstance(fact.dtype, torch.dtype)):
        return value
    why = captured.fixed_batch and f"the batch is fixed: {captured.fixed_batch}"
    found = _shown(shapes(value), (), dtype) if isinstance(value, Tensor) else f"of the type {type(value).__name__}"
    raise _unfit(f"batch {number} of the calibration data doesn't fit the input `{node.name}`",
                 f"it is {found}; the model was captured with {_shown(fact.shape, fact.dynamic, fact.dtype)}",
                 *[why] * bool(why))


def _alike(found: Any, expected: Any, dynamic: Any) -> bool:
    """Whether sizes are those of the example, where they don't move with the batch; over nested tuples."""
    if not isinstance(expected, tuple):
        return True
    if not isinstance(found, tuple) or len(found) != len(expected):
        return False
    if all(isinstance(size, int) for size in expected):
        return all(a == b or moves for a, b, moves in zip(found, expected, dynamic, strict=True))
    return all(map(_alike, found, expected, dynamic))


def _shown(shape: Any, dynamic: Any, dtype: Any) -> str:
    sizes = [("N" if moves else str(size)) for size, moves in zip(shape, dynamic or [False] * len(shape), strict=True)]
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(sizes)}]"


def _upstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """`nodes` and everything that they are computed from."""
    found: set[fx.Node] = set()
    rest = list(nodes)
    while rest:
        node = rest.pop()
        if node not in found:
            found.add(node)
            rest.extend(node.all_input_nodes)
    return found


def _guarded(run: fx.Interpreter, inputs: list[Any], wanted: set[fx.Node],
             number: int) -> Iterator[tuple[fx.Node, Any]]:
    """The values of one run; what an operator raises on them becomes a PlanError. A collector's own errors don't pass
    through here."""
    values = values_of(run, inputs, wanted)
    while True:
        try:
            node, value = next(values)
        except StopIteration:
            return
        except RAISED_BY_MODELS as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise _unfit(f"the model fails on batch {number} of the calibration data: {words}") from error
        yield node, value
