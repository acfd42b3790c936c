"""Provenance: what `explain` reads. Each node that a pass makes or changes carries an `Origin` of that pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import fx

from .captured import Left, Origin
from .ops import kind_of
from .site import Site

if TYPE_CHECKING:
    from ..passbase import Pass

PYTHON = "python"


def place_of(site: Site) -> str:
    """Where the policy asks for what happens at `site`: `edge.fxc:14:9`, or `python` for a pass applied from Python."""
    return str(site.span) if site.span is not None else PYTHON


class Marker:
    """What `pass_` leaves at `site` on each node that it makes or changes. What the entries share is written once."""

    def __init__(self, pass_: Pass, site: Site) -> None:
        line = site.span.source.line(site.span.line).strip() if site.span is not None else repr(pass_)
        self._asked = pass_.verb, place_of(site), line, site.phase

    def touch(self, node: fx.Node, detail: str, was: Iterable[str] = (), left: Left | None = None) -> None:
        """Append to `node`'s provenance that the pass did `detail` to it ("out_channels 64 -> 44"). `was` names the
        nodes that a new node came from, `left` says which of its indices left."""
        node.meta["origins"] = (*origins_of(node), Origin(*self._asked, detail, tuple(was), left))


def origins_of(node: fx.Node) -> tuple[Origin, ...]:
    """The provenance of `node`, oldest first; empty for a node that is as it was captured."""
    origins: tuple[Origin, ...] = node.meta.get("origins", ())
    return origins


def touch(node: fx.Node, pass_: Pass, site: Site, detail: str, was: Iterable[str] = (),
          left: Left | None = None) -> None:
    """Append one entry to `node`'s provenance; see `Marker`."""
    Marker(pass_, site).touch(node, detail, was, left)


def removed(node: fx.Node, what: str) -> tuple[Left, ...]:
    """What every removal took of the dimension `what` ("out_channels") of `node`, oldest first."""
    return tuple(entry.left for entry in origins_of(node) if entry.left is not None and entry.left.what == what)


def survivors(node: fx.Node, what: str, size: int) -> npt.NDArray[np.int64]:
    """The numbers that the `size` indices of the dimension `what` of `node` had when it was captured."""
    gone = [index for left in removed(node, what) for index in left.indices]
    return np.delete(np.arange(size + len(gone)), gone)


def recall(graph: fx.Graph, captured_before: fx.Graph) -> None:
    """Give the nodes of `graph`, captured anew from the GraphModule of `captured_before`, what those they come from
    remember: their provenance, the module they stand in, their line in the model's source. These are the nodes in the
    same places, or, where capture has changed something, of the same name and target (or module)."""
    def key(node: fx.Node) -> tuple[str, str]:
        return node.op, str(node.target if node.op == "call_module" else node.name)

    known: dict[tuple[str, str], fx.Node] = {}
    for node in captured_before.nodes:
        known.setdefault(key(node), node)
    places = list(zip(graph.nodes, captured_before.nodes, strict=False))
    same = len(graph.nodes) == len(captured_before.nodes) and all(kind_of(a) == kind_of(b) for a, b in places)
    before = dict(places) if same else {node: known[key(node)] for node in graph.nodes if key(node) in known}
    for node in graph.nodes:
        old = before.get(node)
        if old is None or kind_of(old) != kind_of(node):
            continue
        if old.meta.get("origins"):
            node.meta["origins"] = origins_of(old)
        if old.op == "call_function" and old.meta.get("path") and "fxc" in node.meta:
            node.meta["path"] = old.meta["path"]
            node.meta["fxc"] = replace(node.meta["fxc"], path=old.meta["path"])
        source = getattr(old.meta.get("fxc"), "source", "")
        if source and "fxc" in node.meta:
            node.meta["source"] = source
            node.meta["fxc"] = replace(node.meta["fxc"], source=source)


def inherit(new: fx.Node, old: fx.Node) -> None:
    """Give `new`, which takes the place of `old`, the provenance of `old`; call `touch` after it."""
    new.meta["origins"] = (*origins_of(old), *(entry for entry in origins_of(new) if entry not in origins_of(old)))
