"""What runs in integers: the table of operators, the regions that fuse, and the grids that values share.

A *product* (convolution, linear layer) multiplies integers. What follows it and is computed in the same kernel belongs
to its region: an activation, or an addition with an activation behind it. Operators that only move numbers pass
integers through on one grid (one scale and zero point), so that nothing is quantized twice between two products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from fxcompress.graph.ops import arguments, kind_of
from fxcompress.passes.shared.inference import vanishes

Role = Literal["product", "activation", "add", "passes", "joins"]

# Operator -> what it does to integers. Of the activations those that the kernels apply to their own result.
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
                     "linear"), "product"),
    **dict.fromkeys(("relu", "relu6", "hardtanh", "hardswish", "silu", "gelu"), "activation"),
    "add": "add",
    **dict.fromkeys(("max_pool2d", "reshape", "view", "flatten", "unflatten", "permute", "transpose", "squeeze",
                     "unsqueeze", "contiguous", "getitem", "chunk", "split", "reorder", "dropout", "dropout1d",
                     "dropout2d", "dropout3d", "stochastic_depth"),
                    "passes"),
    **dict.fromkeys(("cat", "stack"), "joins"),
}
MEANS = ("mean", "adaptive_avg_pool2d")  # operators that may sum the integers of an image
AFTER_ADD = ("relu",)  # activations that a kernel applies behind an addition
AFTER_LINEAR = ("gelu",)  # those that only kernels of linear layers apply


@dataclass(frozen=True)
class Region:
    """A product and what its kernel computes with it: in order, `add` with the node it adds, and the activation."""

    product: fx.Node
    add: fx.Node | None = None
    other: fx.Node | None = None
    activation: fx.Node | None = None
    norm: fx.Node | None = None  # that stands between the product and the rest while it trains

    @property
    def end(self) -> fx.Node:
        """The node whose value the kernel gives."""
        return self.activation or self.add or self.norm or self.product


def role_of(node: fx.Node) -> Role | None:
    """What `node` does to integers, None where it wants floats."""
    return "passes" if keeps_places(node) else ROLES.get(kind_of(node))


def keeps_places(node: fx.Node) -> bool:
    """Whether `node` averages over as many windows as the images have places, which leaves them as they are."""
    if kind_of(node) != "adaptive_avg_pool2d":
        return False
    values = arguments(node)
    size, fact = values["output_size"], getattr(values["input"], "meta", {}).get("fxc")
    shape = getattr(fact, "shape", ())
    return len(shape) == 4 and tuple(shape[2:]) == (tuple(size) if isinstance(size, tuple | list) else (size, size))


def regions_of(products: Iterable[fx.Node], norms: Mapping[fx.Node, fx.Node] | None = None) -> list[Region]:
    """The region of each product, in their order. An addition belongs to the last product that feeds it. `norms` has
    the batch norms behind products that aren't folded yet."""
    taken: dict[fx.Node, Region] = {}
    order = {node: place for place, node in enumerate(next(iter(products)).graph.nodes)} if products else {}
    for product in sorted(products, key=lambda node: -order[node]):
        taken[product] = _region(product, (norms or {}).get(product), {region.add for region in taken.values()})
    return [taken[product] for product in products]


def _region(product: fx.Node, norm: fx.Node | None, added: set[fx.Node | None]) -> Region:
    user, read = _only_user(norm or product)
    if user is None:
        return Region(product, norm=norm)
    if role_of(user) == "activation" and (kind_of(product) == "linear" or kind_of(user) not in AFTER_LINEAR):
        return Region(product, activation=user, norm=norm)
    if role_of(user) == "add" and user not in added:
        other = _other(user, norm or product, read)
        if other is not None:
            then, _ = _only_user(user)
            fused = then if then is not None and kind_of(then) in AFTER_ADD else None
            return Region(product, user, other, fused, norm)
    return Region(product, norm=norm)


def _only_user(node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """The node that alone reads `node`, if there is one, and what it reads: that of a dropout is that of its input."""
    users = list(node.users)
    while len(users) == 1 and vanishes(users[0]):
        node, users = users[0], list(users[0].users)
    return (users[0] if len(users) == 1 else None), node


def _other(add: fx.Node, product: fx.Node, read: fx.Node) -> fx.Node | None:
    """What is added to the product, which is read as `read`: a node of the same shape and type, added once and
    unscaled; None otherwise."""
    values = arguments(add)
    sides = [values["input"], values["other"]]
    others = [side for side in sides if side is not read]
    if values.get("alpha", 1) != 1 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    one, two = (side.meta.get("fxc") for side in (product, others[0]))
    same = one is not None and two is not None and (
        (one.shape, one.dtype, one.dynamic) == (two.shape, two.dtype, two.dynamic))
    return others[0] if same else None


def data_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose numbers `node` moves or multiplies: all of a concatenation, else its input."""
    if role_of(node) == "joins":
        return [value for value in arguments(node)["tensors"] if isinstance(value, fx.Node)]
    found = next(iter(arguments(node).values()))
    return [found] if isinstance(found, fx.Node) else []


def averages(node: fx.Node) -> bool:
    """Whether `node` is the mean over all places of images, which reads integers and gives floats."""
    if kind_of(node) not in MEANS:
        return False
    values, (data, *_) = arguments(node), data_of(node)
    shape = getattr(data.meta.get("fxc"), "shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4:
        return False
    if kind_of(node) == "adaptive_avg_pool2d":
        return values["output_size"] in (1, (1, 1), [1, 1])
    dims = values.get("dim")
    return values.get("dtype") is None and isinstance(dims, tuple | list) and sorted(dim % 4 for dim in dims) == [2, 3]


def _moves(node: fx.Node) -> bool:
    """Whether `node` moves the numbers of others: tensors, or the parts that another one which moves them makes."""
    data = data_of(node) if role_of(node) in ("passes", "joins") else []
    return bool(data) and all(isinstance(getattr(source.meta.get("fxc"), "dtype", None), torch.dtype)
                              or role_of(source) == "passes" for source in data)


@dataclass
class Grids:
    """Which values lie on one grid. `sources` are the nodes whose values are rounded, each with its grid's number.

    A sum that nothing reads in integers is computed in float, by the kernel that adds: neither it nor what is added is
    rounded. A mean over places that a kernel reads sums integers, where a kernel gives them.
    """

    regions: list[Region]
    sources: dict[fx.Node, int] = field(default_factory=dict)
    _parent: list[int] = field(default_factory=list)
    _ends: set[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        """Walks back from everything that a kernel reads to where it is made."""
        self._ends = {region.end for region in self.regions}
        inside = {node for region in self.regions
                  for node in (region.product, region.norm, region.add, region.activation)
                  if node is not None and node is not region.end}
        for region in self.regions:
            for read in data_of(region.product)[:1]:
                if read not in inside:
                    self._reach(read, None)
        waiting = [region for region in self.regions if region.other is not None and region.other not in inside]
        while due := [region for region in waiting if region.end in self.sources]:
            for region in due:  # where the sum is wanted in integers, so is what is added
                assert region.other is not None
                self._reach(region.other, None)
            waiting = [region for region in waiting if region not in due]
        self.sources = {node: self._root(grid) for node, grid in self.sources.items()}

    def _reach(self, node: fx.Node, grid: int | None) -> None:
        stack: list[tuple[fx.Node, int | None]] = [(node, grid)]
        while stack:
            node, grid = stack.pop()
            if _moves(node):
                grid = self._new() if grid is None and role_of(node) == "joins" else grid
                stack.extend((source, grid) for source in data_of(node))
            elif node not in self.sources:
                self.sources[node] = self._new() if grid is None else grid
                if averages(node) and data_of(node)[0] in self._ends:
                    stack.append((data_of(node)[0], None))
            elif grid is not None:
                self._parent[self._root(grid)] = self._root(self.sources[node])

    def _new(self) -> int:
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def _root(self, grid: int) -> int:
        while self._parent[grid] != grid:
            grid = self._parent[grid]
        return grid
