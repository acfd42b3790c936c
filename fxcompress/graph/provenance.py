"""Provenance: what `explain` reads. Each node that a pass makes or changes carries an `Origin` of that pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import fx

from .captured import Origin
from .site import Site

if TYPE_CHECKING:
    from ..passbase import Pass

PYTHON = "python"


def place_of(site: Site) -> str:
    """Where the policy asks for what happens at `site`: `edge.fxc:14:9`, or `python` for a pass applied from Python."""
    return str(site.span) if site.span is not None else PYTHON


def origin(pass_: Pass, site: Site, detail: str, was: Iterable[str] = ()) -> Origin:
    """The entry that `pass_` leaves on a node of `site`. `was` names the nodes that a new node came from."""
    line = site.span.source.line(site.span.line).strip() if site.span is not None else repr(pass_)
    return Origin(pass_.verb, place_of(site), line, site.phase, detail, tuple(was))


def origins_of(node: fx.Node) -> tuple[Origin, ...]:
    """The provenance of `node`, oldest first; empty for a node that is as it was captured."""
    origins: tuple[Origin, ...] = node.meta.get("origins", ())
    return origins


def touch(node: fx.Node, pass_: Pass, site: Site, detail: str, was: Iterable[str] = ()) -> None:
    """Append to `node`'s provenance that `pass_` did `detail` to it ("out_channels 64 -> 44")."""
    node.meta["origins"] = (*origins_of(node), origin(pass_, site, detail, was))


def inherit(new: fx.Node, old: fx.Node) -> None:
    """Give `new`, which takes the place of `old`, the provenance of `old`; call `touch` after it."""
    new.meta["origins"] = (*origins_of(old), *(entry for entry in origins_of(new) if entry not in origins_of(old)))
