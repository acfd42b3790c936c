"""A graph as a table: every node with its kind, path, shape, parameters and MACs."""

from __future__ import annotations

from torch import fx

from ..graph.captured import Captured
from .layers import layers_of
from .text import Table, count, macs


def graph_table(model: Captured | fx.GraphModule) -> Table:
    """The table: a row for each operator, in graph order. It renders itself in a notebook by `.html()`."""
    rows = [(layer.label, layer.kind, layer.shape, count(layer.params) if layer.params else "",
             macs(layer.macs) if layer.macs else "", layer.source) for layer in layers_of(model)]
    return Table(("node", "kind", "shape", "params", "MACs", "source"), tuple(rows), frozenset({3, 4}))


def show_graph(model: Captured | fx.GraphModule) -> str:
    """`graph_table` as plain text."""
    return graph_table(model).text()
