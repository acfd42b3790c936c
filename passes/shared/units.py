"""Granularities: what is masked as one, and how the importance of its weights becomes that of the unit.

A weight is seen as a cube [outputs, inputs, kernel]: `[out, in, 1]` for linear layers (for embeddings: entries,
width), `[out, in / groups, kernel]` for convolutions, transposed ones turned so that outputs come first. Each
granularity splits the cube by reshaping alone and names the inner dimensions of a unit; all else follows from these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.policy.values import Call, NofM


@dataclass(frozen=True)
class Layout:
    """How a weight lies in memory: `[out, in / groups, *kernel]`, or `[in, out / groups, *kernel]` if `transposed`."""

    transposed: bool = False
    groups: int = 1

    def cube_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The (outputs, inputs of one group, kernel) of a weight of `shape`."""
        if self.transposed:
            return shape[1] * self.groups, shape[0] // self.groups, prod(shape[2:])
        return shape[0], prod(shape[1:2]), prod(shape[2:])

    def cube(self, weight: Tensor) -> Tensor:
        """`weight` as [outputs, inputs of one group, kernel]."""
        shape = self.cube_shape(weight.shape)
        if self.transposed:
            weight = weight.reshape(self.groups, shape[1], weight.shape[1], shape[2]).transpose(1, 2)
        return weight.reshape(shape)

    def uncube(self, cube: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `cube` for a weight of `shape`."""
        if self.transposed:
            cube = cube.reshape(self.groups, shape[1], cube.shape[1], cube.shape[2]).transpose(1, 2)
        return cube.reshape(tuple(shape))


@dataclass(frozen=True)
class Units:
    """Base of the granularities, and the finest one: each weight by itself."""

    inner: ClassVar[tuple[int, ...]] = ()  # dimensions of the split cube that lie inside one unit
    share: ClassVar[float] = 1.0  # the part of a unit's weights that is masked when the unit is

    def misfit(self, cube: tuple[int, int, int]) -> str | None:
        """Why a weight with this cube can't be split so, or None."""
        return None

    def split(self, cube: Sequence[int]) -> tuple[int, ...]:
        """The shape the cube is reshaped to."""
        return tuple(cube)

    def count(self, cube: Sequence[int]) -> int:
        """How many units a weight with this cube has."""
        return prod(size for dim, size in enumerate(self.split(cube)) if dim not in self.inner)

    def size(self, cube: Sequence[int]) -> int:
        """How many weights one unit has."""
        return prod(cube) // self.count(cube)

    def reduce(self, cube: Tensor, how: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
        """The score of each unit, flat, of the scores of weights in `cube`; `how` reduces dimensions and keeps them."""
        split = cube.reshape(self.split(cube.shape))
        return (how(split, self.inner) if self.inner else split).flatten()

    def hidden(self, cube: Tensor) -> Tensor:
        """Which units a mask (boolean, as a cube; True keeps) hides: boolean, flat."""
        split = cube.reshape(self.split(cube.shape))
        return ~(split.any(self.inner) if self.inner else split).flatten()

    def keep(self, drop: Tensor, cube: Tensor) -> Tensor:
        """Which weights of `cube` stay when the units `drop` (boolean, flat) are masked: boolean, the cube's shape."""
        split = self.split(cube.shape)
        outer = [1 if dim in self.inner else size for dim, size in enumerate(split)]
        return ~drop.reshape(outer).expand(split).reshape(cube.shape)


@dataclass(frozen=True)
class Rows(Units):
    """All weights of one output."""

    inner = (1, 2)


@dataclass(frozen=True)
class Columns(Units):
    """All weights of one input."""

    inner = (0, 2)


@dataclass(frozen=True)
class Blocks(Units):
    """`block(r, c)`: r outputs by c neighbours of the flattened inputs and kernel."""

    rows: int
    columns: int
    inner = (1, 3)

    def misfit(self, cube: tuple[int, int, int]) -> str | None:
        """Outputs must divide by r, inputs times kernel by c."""
        outputs, width = cube[0], cube[1] * cube[2]
        if outputs % self.rows or width % self.columns:
            return f"its {outputs} x {width} weights don't split into blocks of {self.rows} x {self.columns}"
        return None

    def split(self, cube: Sequence[int]) -> tuple[int, ...]:
        """[blocks down, r, blocks across, c]."""
        return cube[0] // self.rows, self.rows, cube[1] * cube[2] // self.columns, self.columns


@dataclass(frozen=True)
class Groups(Units):
    """`n:m`: of every m neighbours along the inputs, the n that score highest stay. A unit is one group of m."""

    n: int
    m: int
    inner = (2,)

    @property
    def share(self) -> float:  # type: ignore[override]
        """1 - n/m."""
        return 1.0 - self.n / self.m

    def misfit(self, cube: tuple[int, int, int]) -> str | None:
        """Inputs must divide by m."""
        if cube[1] % self.m:
            return f"its {cube[1]} inputs aren't a multiple of {self.m}"
        return None

    def split(self, cube: Sequence[int]) -> tuple[int, ...]:
        """[outputs, groups, m, kernel]."""
        return cube[0], cube[1] // self.m, self.m, cube[2]

    def _pattern(self, split: Tensor) -> Tensor:
        """True at the n highest of each group."""
        best = split.topk(self.n, dim=2, sorted=False).indices
        return torch.zeros_like(split, dtype=torch.bool).scatter_(2, best, True)

    def reduce(self, cube: Tensor, how: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
        """What a group would lose: the score of those that its pattern masks."""
        split = cube.reshape(self.split(cube.shape))
        return how(split.masked_fill(self._pattern(split), 0.0), self.inner).flatten()

    def hidden(self, cube: Tensor) -> Tensor:
        """Groups that keep n at most."""
        return (cube.reshape(self.split(cube.shape)).sum(self.inner) <= self.n).flatten()

    def keep(self, drop: Tensor, cube: Tensor) -> Tensor:
        """Groups in `drop` keep their n highest, the others everything."""
        split = cube.reshape(self.split(cube.shape))
        whole = super().keep(drop, cube).reshape(split.shape)
        return (whole | self._pattern(split)).reshape(cube.shape)


def units_of(granularity: str | NofM | Call) -> Units:
    """The granularity a policy names: `weight`, `row`, `column`, `2:4`, `block(4, 4)`."""
    if isinstance(granularity, NofM):
        return Groups(granularity.n, granularity.m)
    if isinstance(granularity, Call):
        rows, columns = granularity.args
        return Blocks(int(str(rows)), int(str(columns)))
    return {"weight": Units, "row": Rows, "column": Columns}[granularity]()
