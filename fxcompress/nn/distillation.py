"""The module by which a student's graph reaches its teacher: one node, silent unless losses are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn


class Losses(NamedTuple):
    """What a student in distillation gives on request: `output`, as without; `total`, 0-dim, to call `backward` on;
    `terms`, each 0-dim and *not* weighted, by name. `total` is the sum of the terms times their weights, which are
    buffers of the module (`weights()` of `Distillation` reads them)."""

    output: Any
    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Cache:
    """Where a teacher's logits are kept: `place` is `memory` or `disk`; of `top_k` classes of a sample, None of all."""

    place: str
    top_k: int | None = None


class Weight(nn.Module):
    """Multiplies a term by the buffer `value`, 0-dim, which a schedule may write."""

    value: Tensor

    def __init__(self, value: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value, device=device))

    def forward(self, term: Tensor) -> Tensor:
        """The weighted term."""
        return term * self.value

    def put(self, value: float) -> bool:
        """Write the weight, in place."""
        self.value.fill_(value)
        return True


class Distillation(nn.Module):
    """Teacher, adapters, terms, temperatures and weights of one `distill`, in the graph `fused`.

    `fused(targets, *values)` takes what the student computes (its inputs, its taps, the stages it shares) and gives
    (total, each term). Its children: `teacher`, whose tensors are buffers that aren't saved; `adapters`, which are
    trained along; `losses`, `temperatures`, `weights`.

    With a `cache` what the teacher gives may come from outside, as `teacher_logits`: then the teacher stands apart, in
    `teacher`, and is asked where none are given; `forget_teacher` leaves the placeholder alone.
    """

    fxc_kind: ClassVar[str] = "distillation"
    fxc_apart: ClassVar[bool] = True  # no part of the student: neither counted nor selected

    def __init__(self, fused: fx.GraphModule, terms: tuple[str, ...], needs_targets: bool,
                 shared: Mapping[str, str], cache: Cache | None = None, teacher: nn.Module | None = None,
                 inputs: int = 0) -> None:
        """`terms` are the names of what `fused` gives behind the total; `shared` says of each node of the student that
        the teacher reads in the place of its own what it was then. With `cache`, `teacher` takes the first `inputs` of
        the values."""
        super().__init__()
        self.fused, self.teacher = fused, teacher
        self.cache, self.inputs = cache, inputs
        self.terms, self.needs_targets, self.shared = terms, needs_targets, dict(shared)

    def forward(self, output: Any, targets: Tensor | None, losses: bool, *values: Any) -> Any:
        """`output`, the student's, as it is; with `losses` a `Losses`, which takes up the terms of an `output` that is
        one already. Raises ValueError where labels are needed and not given."""
        if not losses:
            return output
        if self.needs_targets and targets is None:
            raise ValueError(f"a term of {', '.join(self.terms)} compares with labels: call the module with "
                             "`targets=labels, losses=True`")
        if self.cache is not None:
            values = self._with_teacher(*values)
        total, *found = self.fused(targets, *values) if self.needs_targets else self.fused(*values)
        terms = dict(zip(self.terms, found, strict=True))
        if isinstance(output, Losses):
            return Losses(output.output, output.total + total, {**output.terms, **terms})
        return Losses(output, total, terms)

    def _with_teacher(self, given: Tensor | None, *values: Any) -> tuple[Any, ...]:
        """What `fused` reads: the teacher's logits, given or computed, and the student's values."""
        if given is None:
            if self.teacher is None:
                raise ValueError("the teacher has gone, for its logits are kept: call the module with "
                                 "`teacher_logits=kept[indices]`")
            given = self.teacher(*values[:self.inputs])
        return (given.detach(), *values[self.inputs:])

    def forget_teacher(self) -> None:
        """Let go of the teacher, whose logits are kept: they have to be given from now on."""
        self.teacher = None

    def numbers(self, kind: str) -> dict[str, float]:
        """The `weights` or `temperatures`, as they are, by the name of their term."""
        held = dict(self.fused.named_children()).get(kind)
        return {} if held is None else {name: float(child.value) for name, child in held.named_children()}  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The terms."""
        return ", ".join(self.terms)
