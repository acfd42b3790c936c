"""The models that a policy's actions learn from, captured where that can be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..diagnostics import CaptureError, Diagnostic, PlanError
from ..nn.frozen import FrozenTeacher
from ..policy.values import Unset
from ..policy.words import ORIGINAL
from .capture import as_example, bind_inputs, capture_example
from .captured import Captured
from .interpret import evaluating
from .propagate import device_of
from .tree import clone_model, named_tensors, own

if TYPE_CHECKING:
    from ..policy.model import Policy

NO_CAPTURE = "FXC0401"  # of a model whose code no way takes, and which may well run


@dataclass(frozen=True)
class Teacher:
    """One model to learn from.

    * `captured`: its graph, which nobody changes; None for one that can't be captured, which `whole` holds: then only
      what it gives can be learned from
    * `same`: of the student's tensors, by name, those that are the very tensors of the teacher of these names
    * `given`: what it gives for the example inputs, where it couldn't be captured
    """

    name: str
    captured: Captured | None
    same: Mapping[str, str] = field(default_factory=dict)
    whole: nn.Module | None = None
    given: Any = None
    why: str = ""  # why it couldn't be captured


class Teachers:
    """The teachers of a policy, each captured when it is first asked for."""

    def __init__(self, student: Captured, model: nn.Module | None, given: Mapping[str, object]) -> None:
        """`student` is the model as it was captured, and is never changed here; `model` what it was captured from,
        where that is known; `given` are models by the names that stand behind `from`."""
        self.student, self._model, self._given = student, model, dict(given)
        self._known: dict[str, Teacher] = {}

    @classmethod
    def for_policy(cls, policy: Policy, student: Captured, model: nn.Module | None) -> Teachers | None:
        """Those of `policy`; None where no action learns. The original is kept as it is now."""
        names = {action.teacher for phase in policy.phases for action in phase.actions if action.teacher}
        if not names:
            return None
        given = {name: value for name, value in policy.params.items()
                 if name in names and not isinstance(value, Unset)}
        wants_original = ORIGINAL in (names - given.keys()) or ORIGINAL in [
            value for value in given.values() if isinstance(value, str)]
        return cls(student.copy() if wants_original and student.concrete else student, model, given)

    def of(self, name: str) -> Teacher | None:
        """The teacher called `name`; None for one that was not given. Raises PlanError (FXC0353) where it can't be
        run on the student's inputs."""
        given = self._given.get(name, ORIGINAL if name == ORIGINAL else None)
        if given is None:
            return None
        if name not in self._known:
            self._known[name] = self._made(name, given)
        return self._known[name]

    def _made(self, name: str, given: object) -> Teacher:
        if isinstance(given, str) and given == ORIGINAL:
            return Teacher(ORIGINAL, self.student, {key: key for key in named_tensors(self.student.module).all})
        if isinstance(given, Captured):
            return Teacher(name, given, self._same(given.module))
        if not isinstance(given, nn.Module):
            raise _refused(name, f"a `{type(given).__name__}` is no model", (),
                           f"give a torch.nn.Module, or the text `{ORIGINAL}` for the model before it is rewritten")
        try:
            with evaluating(given):
                captured = capture_example(given, self.student.example)
        except CaptureError as error:
            first = error.diagnostics[0]
            if first.code != NO_CAPTURE:
                raise _refused(name, first.message, first.notes,
                               "give a teacher that takes the student's inputs") from error
            return self._as_it_is(name, given, first.message)
        return Teacher(name, captured, self._same(given))

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        """The student's tensors, by identity: their names."""
        found: dict[int, list[str]] = {}
        source = self._model if self._model is not None else self.student.module
        for key, tensor in named_tensors(source).all.items():
            found.setdefault(id(tensor), []).append(key)
        return found

    def _same(self, teacher: nn.Module) -> dict[str, str]:
        return {name: key for key, tensor in named_tensors(teacher).all.items() for name in
                self._names.get(id(tensor), ())}

    def _as_it_is(self, name: str, given: nn.Module, why: str) -> Teacher:
        """A teacher that can't be captured, and what it gives for the example inputs."""
        example = as_example(self.student.example)
        device = device_of(self.student.module, example)
        whole = FrozenTeacher(clone_model(given, own)).to(device)
        inputs = bind_inputs(given, example)
        try:
            with torch.no_grad():
                result = inputs.call(whole, inputs.values)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise _refused(name, f"it doesn't run on the student's inputs: {str(error).splitlines()[0]}", (why,),
                           "give a teacher that takes the student's inputs") from error
        return Teacher(name, None, whole=whole, given=result, why=why)


def _refused(name: str, why: str, notes: tuple[str, ...], help: str) -> PlanError:
    return PlanError([Diagnostic("FXC0353", f"`{name}` can't be a teacher: {why}", notes=notes, help=help)])

