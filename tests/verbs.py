"""Verbs for tests of the language, so that these don't rest on the built-in ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from fxcompress.diagnostics import Diagnostic, PolicyError
from fxcompress.passbase import VERBS, Facet, Param, Pass, param
from fxcompress.policy.types import (
    Bits,
    Boolean,
    CallOf,
    Choice,
    Integer,
    Number,
    OneOf,
    Percent,
    Ratio,
    Text,
    Time,
)


@dataclass(frozen=True)
class Toy(Pass):
    """A verb with a parameter of every type."""

    verb: ClassVar[str] = "toy"
    facet: ClassVar[Facet] = Facet.NUMERIC
    kinds: ClassVar[tuple[str, ...]] = ("conv2d", "linear")

    amount: object = param(Percent(ramp=True), "a percentage", None)
    plain: object = param(Percent(0.1, 0.5), "a percentage without ramps", None)
    rate: object = param(Number(-2, 2, ramp=True), "a number", None)
    number: object = param(Integer(1, 2_000_000), "a whole number", None)
    flag: object = param(Boolean(), "yes or no", False)
    width: object = param(Bits(2, 8), "bits", 8)
    every: object = param(Time(), "a time", None)
    calibrate: object = param(Time(("samples",)), "samples", None)
    mode: object = param(Choice(("fast", "slow")), "a choice", "fast")
    keep: object = param(Ratio(), "n of m", None)
    shape: object = param(OneOf((Choice(("row", "column")), Ratio(), CallOf("block", (Integer(1), Integer(1))))),
                          "a shape",
                          "row")
    label: object = param(Text(), "a text", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flag and self.mode == "slow":
            raise PolicyError([Diagnostic("FXC0500", "`flag` is never slow", help="take one out")])


@dataclass(frozen=True)
class Learn(Pass):
    """A verb with a teacher and pairs."""

    verb: ClassVar[str] = "learn"
    facet: ClassVar[Facet] = Facet.LOSS
    takes_teacher: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    pair_params: ClassVar[tuple[Param, ...]] = (
        Param("weight", Percent(), "its share", None, True),
        Param("loss", Choice(("kl", "mse")), "its loss", "kl", False))


@dataclass(frozen=True)
class Take(Pass):
    """A verb that is told what of the layers, and needs a parameter."""

    verb: ClassVar[str] = "take"
    facet: ClassVar[Facet] = Facet.SHAPE
    whats: ClassVar[Mapping[str, str]] = {"channels": "output channels", "heads": "attention heads"}

    ratio: float = param(Percent(), "how much")


@contextmanager
def toy_verbs() -> Iterator[None]:
    """The registry with these verbs, for a while."""
    before = dict(VERBS._added)
    for cls in (Toy, Learn, Take):
        VERBS.register(cls.verb, cls)
    try:
        yield
    finally:
        VERBS._added.clear()
        VERBS._added.update(before)
