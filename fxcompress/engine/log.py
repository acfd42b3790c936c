"""What a training did to the graph, so that a checkpoint can do the same again.

Which channels leave depends on the weights of their time. A checkpoint therefore holds what stayed of every tensor at
every rewrite, and taking it up repeats these choices, one after another, instead of making them anew on other weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..diagnostics import Diagnostic, PlanError
from ..graph.site import Cuts
from ..graph.tree import named_tensors


@dataclass(frozen=True)
class Entry:
    """One rewrite: by the step `step` of the plan, as its phase began (`value` is None), as its number came to `value`,
    or as its phase ended; what stayed of each tensor that was cut, by name; the shapes of the parameters that came in;
    the share that
    was solved for the step, None where none was."""

    step: int
    value: float | None
    kept: Mapping[str, Cuts]
    added: Mapping[str, tuple[int, ...]]
    share: float | None = None
    ended: bool = False  # what the step had put in was taken out again

    def state(self) -> dict[str, Any]:
        """As plain data and tensors."""
        kept = {name: [[dim, indices] for dim, indices in cuts] for name, cuts in self.kept.items()}
        return {"step": self.step, "value": self.value, "kept": kept, "share": self.share, "ended": self.ended,
                "added": {name: list(shape) for name, shape in self.added.items()}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Entry:
        """That of a checkpoint."""
        kept = {name: tuple((dim, indices) for dim, indices in cuts) for name, cuts in state["kept"].items()}
        return cls(state["step"], state["value"], kept,
                   {name: tuple(shape) for name, shape in state["added"].items()}, state["share"],
                   bool(state["ended"]))

    def same(self, other: Entry) -> bool:
        """Whether both did the same."""
        mine, theirs = ((entry.step, entry.value, entry.ended) for entry in (self, other))
        return mine == theirs and same_cuts(self.kept, other.kept)


def same_cuts(one: Mapping[str, Cuts], other: Mapping[str, Cuts]) -> bool:
    """Whether the same is left of the same tensors."""
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def _same(one: Cuts, other: Cuts) -> bool:
    return [dim for dim, _ in one] == [dim for dim, _ in other] and all(
        torch.equal(a.cpu(), b.cpu()) for (_, a), (_, b) in zip(one, other, strict=True))


def follows(done: Sequence[Entry], past: Sequence[Entry]) -> bool:
    """Whether `past` begins with what was `done`."""
    return len(done) <= len(past) and all(a.same(b) for a, b in zip(done, past, strict=False))


def add_missing(module: fx.GraphModule, added: Mapping[str, tuple[int, ...]]) -> bool:
    """Make the parameters `added` that aren't there, as zeros: a rewrite gave a layer a bias, because of weights that
    aren't loaded yet. Returns whether there were any."""
    known = named_tensors(module).parameters
    missing = {name: shape for name, shape in added.items() if name not in known}
    for name, shape in missing.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        like = next(holder.parameters())
        holder.register_parameter(leaf, nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad))
    return bool(missing)


def other_graph() -> PlanError:
    """FXC0528."""
    return PlanError([Diagnostic(
        "FXC0528", "what was carried out so far isn't what the checkpoint's run had carried out then",
        notes=("what begins at time zero is carried out by `compile` already, on other weights than then",),
        help="hand the checkpoint to `compile(..., resume=state)`, which repeats what it says from the beginning")])
