"""What the recorder keeps of the values it sees, and walks over nested arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx


class BatchFixedError(Exception):
    """An operator works at the example's batch size but not at twice that."""

    def __init__(self, reason: str, source: str) -> None:
        super().__init__(reason)
        self.reason, self.source = reason, source


@dataclass(frozen=True)
class Held:
    """A plain value that is the same in every probe and yet is read from a node: the device of the inputs."""

    node: fx.Node
    value: Any


@dataclass
class Value:
    """What the recorder knows of a tensor that the model holds: the node that computes it and its fakes, one a probe.

    Tensors with the same `memory` share storage in the model. A part that was indexed out of another knows its `whole`.
    """

    tensor: Tensor
    node: fx.Node
    fakes: tuple[Tensor, ...]
    memory: int
    whole: tuple[Tensor, Any] | None = None  # the tensor it is a part of, and the index
    stale: str = ""  # why it may not be read any more


_CONTAINERS = (tuple, list, dict, slice)


def flat(value: object) -> Iterator[Any]:
    """The leaves of nested tuples, lists, dicts and slices."""
    if isinstance(value, _CONTAINERS):
        items = value if isinstance(value, tuple | list) else value.values() if isinstance(value, dict) else (
            value.start, value.stop, value.step)
        for item in items:
            if isinstance(item, _CONTAINERS):
                yield from flat(item)
            else:
                yield item
    else:
        yield value


def map_leaves(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`value` with every leaf of its tuples, lists, dicts and slices replaced; named tuples become tuples."""
    if not isinstance(value, _CONTAINERS):
        return leaf(value)
    if isinstance(value, list | tuple):
        items = [map_leaves(item, leaf) if isinstance(item, _CONTAINERS) else leaf(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_leaves(item, leaf) for key, item in value.items()}
    return slice(*(map_leaves(item, leaf) for item in (value.start, value.stop, value.step)))


def all_equal(results: tuple[Any, ...]) -> bool:
    """Whether a value is the same in every probe."""
    return all(type(result) is type(results[0]) and result == results[0] for result in results)
