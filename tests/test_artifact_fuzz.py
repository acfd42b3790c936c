"""Any change to an artifact gives a diagnostic or a plain graph: property tests behind right hashes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hostile import DOCUMENT, FILES, exercise
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

POOL = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["__class__", "..", "conv", "x", "a.b", "float32", "relu", "getattr", "cat", "torch.nn.Linear",
                    "container", "output"]),
    st.recursive(st.integers(0, 3), lambda inner: st.lists(inner, max_size=3)
                 | st.dictionaries(st.sampled_from(["tuple", "node", "slice", "dict", "dtype"]), inner, max_size=2),
                                   max_leaves=6),
)


def places(value: object, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*way, key))


PLACES = [way for way in places(DOCUMENT) if way]


def put(document: Any, way: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    document = copy.deepcopy(document)
    holder = document
    for part in way[:-1]:
        holder = holder[part]
    change(holder, way[-1])
    return document


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(way=st.sampled_from(PLACES), value=POOL)
def test_any_value_in_any_place_of_the_graph(way: tuple[Any, ...], value: object) -> None:
    document = put(DOCUMENT, way, lambda holder, key: holder.__setitem__(key, value))
    exercise({**FILES, "graph.json": json.dumps(document).encode()})


@settings(max_examples=100, deadline=None)
@given(way=st.sampled_from(PLACES))
def test_anything_left_out_of_the_graph(way: tuple[Any, ...]) -> None:
    document = put(DOCUMENT, way, lambda holder, key: holder.pop(key))
    exercise({**FILES, "graph.json": json.dumps(document).encode()})


@settings(max_examples=150, deadline=None)
@given(one=st.sampled_from(PLACES), other=st.sampled_from(PLACES))
@example(one=("nodes", 0, "meta", "fact", "shape"), other=("tensors", 10, "shape", 0))
def test_any_part_of_the_graph_in_the_place_of_another(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    value = DOCUMENT
    for part in other:
        value = value[part]
    document = put(DOCUMENT, one, lambda holder, key: holder.__setitem__(key, value))
    exercise({**FILES, "graph.json": json.dumps(document).encode()})


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_any_byte_of_any_file_changed_behind_right_hashes(name: str, data: st.DataObject) -> None:
    whole = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    exercise({**FILES, name: bytes(whole)})
