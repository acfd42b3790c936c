"""Residual blocks of a graph: `x + f(x)`, found by following values, whatever a model calls its modules.

A residual add has an operand x that it gets unchanged (of its own shape and dtype) and another that is computed from x
by a branch f with at least one layer in it. Adds of one module are one block, as the attention and the perceptron of an
encoder layer are; see `_module_of`. `residual_drop.py` takes blocks out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import fx

from .captured import Captured
from .ops import arguments, kind_of, path_of
from .select import SIZE_KINDS, operators

Side = Literal["input", "other"]
_SIDES: tuple[Side, Side] = ("input", "other")


@dataclass(frozen=True)
class Residual:
    """One residual add. `skip` says which of its operands is x; `region` are the nodes of its branch, in graph order:
    all that is computed from x for this add."""

    add: fx.Node
    skip: Side
    region: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]  # of the region: those that multiply by weights

    @property
    def identity(self) -> fx.Node:
        """The node whose value is x."""
        return operand(self.add, self.skip)

    @property
    def branch(self) -> fx.Node:
        """The node whose value is f(x)."""
        return operand(self.add, "other" if self.skip == "input" else "input")


@dataclass(frozen=True)
class Block:
    """Residual adds that leave together. `path` is the module that they make up, `call` which call of it this is."""

    path: str
    residuals: tuple[Residual, ...]
    call: int = 1

    @property
    def label(self) -> str:
        """How a person calls it."""
        return self.path if self.call == 1 else f"{self.path} (call {self.call})"

    @cached_property
    def nodes(self) -> frozenset[fx.Node]:
        """Its adds and all nodes of their branches."""
        return frozenset(node for one in self.residuals for node in (one.add, *one.region))

    @cached_property
    def stage(self) -> tuple[object, ...]:
        """What blocks of one stage have in common: the list of modules that they stand in, the shape of x, and how
        their layers are called (the attentions of T5's blocks stand beside perceptrons)."""
        layers = tuple(path_of(node).removeprefix(self.path) for one in self.residuals for node in one.layers)
        return re.sub(r"\d+", "*", self.path), self.residuals[0].add.meta["fxc"].shape, layers

    @cached_property
    def structure(self) -> object:
        """What blocks that are alike have in common: their operators and shapes."""
        return tuple((kind_of(node), str(node.meta["fxc"].shape), node.meta["fxc"].params)
                     for one in self.residuals for node in one.region)


@dataclass(frozen=True)
class Refusal:
    """An add of two branches that isn't a block that can leave: why, and what lies between it and where they part."""

    add: fx.Node
    path: str
    nodes: frozenset[fx.Node]
    reason: str


@dataclass(frozen=True)
class Blocks:
    """What is found in a graph, in its order."""

    blocks: tuple[Block, ...]
    refused: tuple[Refusal, ...]


def find_blocks(captured: Captured) -> Blocks:
    """Every residual block of `captured`, whose facts must be fresh, and the joins that are none. Looks, for each add,
    at the nodes between it and the value it adds to, so that a chain of blocks takes time linear in its nodes."""
    return _Finder(captured).find()


def operand(add: fx.Node, side: Side) -> fx.Node:
    """What `add` adds on one side."""
    found: fx.Node = arguments(add)[side]
    return found


def source_of(node: fx.Node) -> str:
    """`resnet.py:102`, where the source is known; else the node's name."""
    return str(getattr(node.meta.get("fxc"), "source", "") or node.name).split(" ")[0]


@dataclass
class _Finder:
    captured: Captured
    nodes: list[fx.Node] = field(init=False)
    index: dict[fx.Node, int] = field(init=False)
    values: frozenset[fx.Node] = field(init=False)  # what depends on inputs, not on parameters alone
    layers: frozenset[fx.Node] = field(init=False)
    refused: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes = list(self.captured.graph.nodes)
        self.index = {node: place for place, node in enumerate(self.nodes)}
        inputs = frozenset(node for node in self.nodes if node.op == "placeholder")
        self.values = inputs | frozenset(operators(self.captured.graph))
        self.layers = frozenset(node for node in self.values if node.op != "placeholder" and self._is_layer(node))

    def _is_layer(self, node: fx.Node) -> bool:
        """Whether it multiplies by weights, its own or those it is given."""
        fact = node.meta["fxc"]
        return bool(fact.macs) and (bool(fact.params) or any(
            source not in self.values for source in node.all_input_nodes))

    def find(self) -> Blocks:
        found = [residual for node in self.nodes if (residual := self._residual(node)) is not None]
        units = _innermost(found)
        inside = {node for one in units for node in one.region}
        refused = tuple(one for one in self.refused if one.add not in inside)
        return Blocks(tuple(_grouped(units)), refused)

    # One add

    def _residual(self, node: fx.Node) -> Residual | None:
        if kind_of(node) not in ("add", "sub"):
            return None
        given = arguments(node)
        if any(given[side] not in self.values for side in _SIDES) or given["input"] is given["other"]:
            return None
        first, last = sorted(_SIDES, key=lambda side: self.index[given[side]])
        skip, branch = given[first], given[last]
        reached = self._reached(skip, branch)
        if branch not in reached:
            self._joined(node, given["input"], given["other"])
            return None
        region = self._cone([branch], reached)
        layers = tuple(other for other in region if other in self.layers)
        if not layers:
            return None
        reason = self._unfit(node, first, region)
        if reason:
            self._refuse(node, region, reason)
            return None
        return Residual(node, first, region, layers)

    def _reached(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        """The nodes up to `end` whose values are computed from that of `start`; its size is no value."""
        reached = {start}
        for node in self.nodes[self.index[start] + 1 : self.index[end] + 1]:
            sources = node.all_input_nodes
            if any(source in reached for source in sources) and not (kind_of(node) in SIZE_KINDS and start in sources):
                reached.add(node)
        return reached - {start}

    def _cone(self, ends: Sequence[fx.Node], reached: set[fx.Node]) -> tuple[fx.Node, ...]:
        """Those of `reached` that `ends` are computed from, `ends` themselves too, in graph order."""
        needed = {end for end in ends if end in reached}
        ahead = list(needed)
        while ahead:
            fresh = [source for source in ahead.pop().all_input_nodes if source in reached and source not in needed]
            needed.update(fresh)
            ahead += fresh
        return tuple(sorted(needed, key=self.index.__getitem__))

    def _unfit(self, add: fx.Node, skip: Side, region: tuple[fx.Node, ...]) -> str:
        """Why the branch can't be dropped; empty if it can."""
        given, fact = arguments(add), add.meta["fxc"]
        identity = given[skip].meta["fxc"]
        if identity.shape != fact.shape or identity.dtype != fact.dtype:
            return "what it adds to changes its shape or dtype in the add"
        if skip == "other" and (kind_of(add) == "sub" or given.get("alpha", 1) != 1):
            return "it subtracts or scales what it should add to"
        inside = {*region, add}
        for node in region:
            for user in node.users:
                if user not in inside or (user is add and node is not region[-1]):
                    who = "the model's output" if user.op == "output" else f"{kind_of(user)} at {source_of(user)}"
                    return f"{path_of(node) or kind_of(node)} inside it is read by {who} too"
        return ""

    def _refuse(self, add: fx.Node, region: Iterable[fx.Node], reason: str) -> None:
        region = frozenset(region)
        layers = [path_of(node) for node in region if node in self.layers]
        path = _common(layers) or path_of(add) or add.name
        self.refused.append(Refusal(add, path, region | {add}, f"{reason} ({kind_of(add)} at {source_of(add)})"))

    def _joined(self, add: fx.Node, one: fx.Node, other: fx.Node) -> None:
        """An add of two values that part from one before: where layers lie between, it is refused, with the reason."""
        parting = self._parting(one, other)
        if parting is None:
            return
        reached = self._reached(parting, add)
        cones = sorted((self._cone([end], reached) for end in (one, other)),
                       key=lambda cone: (sum(node in self.layers for node in cone), len(cone)))
        layers = [node for node in cones[0] if node in self.layers]
        if not any(node in self.layers for node in cones[1]):
            return
        if layers:
            reason = f"its shortcut is a projection, {path_of(layers[0]) or kind_of(layers[0])}"
        else:
            kinds = ", ".join(dict.fromkeys(kind_of(node) for node in cones[0]))
            reason = f"its shortcut changes the value: {kinds}"
        self._refuse(add, (*cones[0], *cones[1]), reason)

    def _parting(self, one: fx.Node, other: fx.Node) -> fx.Node | None:
        """The last node that all ways from the inputs to both pass; None where there is none."""
        while one is not other:
            late = max(one, other, key=self.index.__getitem__)
            above = self._dominators.get(late)
            if above is None:
                return None
            one, other = (above, other) if late is one else (one, above)
        return one

    @cached_property
    def _dominators(self) -> dict[fx.Node, fx.Node | None]:
        """The immediate dominator of every value (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm",
        2001, which needs one round on a graph without cycles); None where several inputs meet."""
        found: dict[fx.Node, fx.Node | None] = {}
        self.__dict__["_dominators"] = found  # `_parting` reads it as it grows
        for node in self.nodes:
            sources = [source for source in node.all_input_nodes if source in self.values]
            above: fx.Node | None = sources[0] if sources else None
            for source in sources[1:]:
                above = self._parting(above, source) if above is not None else None
            found[node] = above
        return found


# From adds to blocks


def _innermost(found: Sequence[Residual]) -> list[Residual]:
    """Of adds in the branch of another the outer one, unless it goes around several, or around much of the model: that
    is a stage with a long shortcut, and the blocks are inside."""
    units: dict[fx.Node, Residual] = {}
    for one in sorted(found, key=lambda one: len(one.region)):
        inner = [node for node in one.region if node in units]
        if not inner or (len(inner) == 1 and _common(map(path_of, one.layers))):
            for node in inner:
                del units[node]
            units[one.add] = one
    return [one for one in found if one.add in units]


def _common(paths: Iterable[str]) -> str:
    """The innermost module around all `paths`."""
    parts = [path.split(".") for path in paths]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _numbered(path: str) -> bool:
    return path[-1:].isdigit()


def _module_of(found: Sequence[Residual]) -> list[str]:
    """For each add the module whose block it is part of.

    That is the smallest module around the add and its branch, if its name ends in a number: `layer3.2`, `h.7`,
    `encoder_layer_0`. Where the code of one module adds for a list of others (`for block in blocks: x = x + block(x)`),
    it is the member of the list. Else it is the branch alone, as for the attention of a layer that has no number; if
    that stands in a numbered module with blocks, as BERT's attention does in its layer, it is part of that.
    """
    around = [_common([path_of(one.add), *map(path_of, one.layers)]) for one in found]
    alone = [_common(map(path_of, one.layers)) for one in found]
    members: dict[tuple[str, str], set[str]] = {}
    cuts = []
    for outer, inner in zip(around, alone, strict=True):
        rest = inner[len(outer):].lstrip(".").split(".")
        place = next((place for place, name in enumerate(rest) if _numbered(name)), None)
        cut = ".".join(part for part in (outer, *rest[: place + 1]) if part) if place is not None else ""
        cuts.append(cut)
        if cut:
            members.setdefault((outer, re.sub(r"\d+$", "", cut)), set()).add(cut)
    paths = []
    for outer, inner, cut in zip(around, alone, cuts, strict=True):
        loops = cut and len(members[outer, re.sub(r"\d+$", "", cut)]) > 1
        paths.append(cut if loops else outer if _numbered(outer) else inner)
    numbered = {path for path in paths if _numbered(path)}
    return [path if _numbered(path) else _holder(path, numbered) or one.add.name
            for path, one in zip(paths, found, strict=True)]


def _holder(path: str, numbered: set[str]) -> str:
    """The innermost of the modules `numbered` that `path` stands in, or itself."""
    parts = path.split(".")
    holders = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((holder for holder in holders if holder in numbered), path)


def _grouped(found: Sequence[Residual]) -> list[Block]:
    """Adds of one module together, but those of its several calls apart, in the order of their first adds."""
    calls: dict[str, list[list[Residual]]] = {}
    order: list[tuple[str, int]] = []
    for one, path in zip(found, _module_of(found), strict=True):
        mine = calls.setdefault(path, [])
        targets = {node.target for node in one.layers if node.op == "call_module"}
        known = {node.target for other in mine[-1] for node in other.layers} if mine else set()
        if not mine or targets & known or (not _numbered(path)):
            mine.append([])
            order.append((path, len(mine)))
        mine[-1].append(one)
    return [Block(path, tuple(calls[path][call - 1]), call) for path, call in order]
