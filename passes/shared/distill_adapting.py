"""Which adapter brings the student's features to the teacher's shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxcompress.nn.losses import Loss

Shape = tuple[int, ...]
_IMAGES = (4, 5)  # ranks of values whose channels are dimension 1, and places all behind


@dataclass(frozen=True)
class Plan:
    """The settings of a `nn.adapters.Adapter`: its parts, each None where it isn't needed."""

    rank: int
    channels: tuple[int, int] | None = None
    pool: Shape | None = None
    interpolate: Shape | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is to be done."""
        return self.channels is None and self.pool is None and self.interpolate is None

    @property
    def parameters(self) -> int:
        """How many are trained along."""
        return 0 if self.channels is None else self.channels[0] * self.channels[1] + self.channels[1]

    def __str__(self) -> str:
        parts = []
        if self.pool is not None:
            parts.append(f"pool to {'×'.join(map(str, self.pool)) or 'one vector'}")
        if self.channels is not None:
            kind = "conv1x1" if self.rank in _IMAGES and self.pool != () else "linear"
            parts.append(f"{kind} {self.channels[0]} -> {self.channels[1]}")
        if self.interpolate is not None:
            parts.append(f"interpolate to {'×'.join(map(str, self.interpolate))}")
        return ", ".join(parts) or "none"


def adapter_for(student: Shape, teacher: Shape, loss: type[Loss], adapt: str) -> Plan | str:
    """The adapter, or why there is none. `adapt` is `auto` or the one that the policy asks for."""
    plain = Plan(len(student))
    if loss.fits == "places" and min(len(student), len(teacher)) < 3:
        return "it compares maps, and these have no places"
    if adapt == "none" or (adapt == "auto" and loss.fits in ("logits", "batch")):
        return plain if fits(student, teacher, loss) else _unlike(student, teacher, loss)
    found = _between(student, teacher, loss.fits != "places" or adapt in ("conv1x1", "linear"))
    if isinstance(found, str):
        return found
    if adapt == "auto":
        return found
    return _asked(found, student, teacher, adapt)


def fits(student: Shape, teacher: Shape, loss: type[Loss]) -> bool:
    """Whether `loss` compares values of these shapes as they are."""
    if loss.fits == "batch":
        return student[:1] == teacher[:1]
    if loss.fits == "places":
        return len(student) == len(teacher) > 2 and places(student) == places(teacher) and student[0] == teacher[0]
    return student == teacher


def channels(shape: Shape) -> int:
    """The features of a place."""
    return shape[1] if len(shape) in _IMAGES else shape[-1]


def places(shape: Shape) -> Shape:
    """The dimensions that aren't the batch, nor the features."""
    return shape[2:] if len(shape) in _IMAGES else shape[1:-1]


def _between(student: Shape, teacher: Shape, maps: bool) -> Plan | str:
    """The least adapter; channels are only mapped where the loss wants them equal (`maps`)."""
    if student[:1] != teacher[:1] or len(student) < 2 or len(teacher) < 2:
        return "their batches differ"
    widths = (channels(student), channels(teacher))
    mapped = widths if maps and widths[0] != widths[1] else None
    if len(student) == len(teacher):
        if places(student) == places(teacher):
            return Plan(len(student), mapped)
        if len(student) not in _IMAGES:
            return f"sequences of {student[1]} and of {teacher[1]} places are not alike"
        larger = all(a >= b for a, b in zip(places(student), places(teacher), strict=True))
        fitted = Plan(len(student), mapped)
        return replace(fitted, pool=places(teacher)) if larger else replace(fitted, interpolate=places(teacher))
    if len(student) in _IMAGES and len(teacher) == 2 and maps:
        return Plan(len(student), mapped, pool=())
    return f"a value of {len(student)} dimensions can't be brought to {len(teacher)}"


def _asked(found: Plan, student: Shape, teacher: Shape, adapt: str) -> Plan | str:
    """`found`, which is needed, where it does what the policy asks for; a map that isn't needed is made if asked for.
    """
    kind = "conv1x1" if len(student) in _IMAGES and found.pool != () else "linear"
    widths = (channels(student), channels(teacher))
    if adapt in ("conv1x1", "linear"):
        if adapt != kind:
            return f"`adapt = {adapt}` is not for features of shape {show(student)}: `{kind}` is"
        return Plan(found.rank, widths, found.pool, found.interpolate)
    if found.channels is not None:
        return f"`adapt = {adapt}` leaves {widths[0]} channels, and the teacher has {widths[1]}"
    wrong = found.interpolate if adapt == "pool" else found.pool
    if wrong is not None:
        other = "interpolate" if adapt == "pool" else "pool"
        return f"`adapt = {adapt}` can't bring {show(student)} to {show(teacher)}: `{other}` can"
    return found


def _unlike(student: Shape, teacher: Shape, loss: type[Loss]) -> str:
    if loss.fits == "logits" and len(student) == len(teacher):
        return f"they give {channels(student)} and {channels(teacher)} classes"
    return "their shapes differ"


def show(shape: Shape) -> str:
    """`[16, 128, 4, 4]`."""
    return f"[{', '.join(map(str, shape))}]"
