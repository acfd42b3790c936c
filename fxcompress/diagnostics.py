"""Diagnostics as data: a stable code, places, notes and a way out. Renderers are in `render.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from typing import Literal

from .source import Span

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Label:
    """A place with a few words on what is the matter there."""

    span: Span
    text: str = ""


@dataclass(frozen=True)
class Fix:
    """A replacement a tool may apply."""

    span: Span
    replacement: str


@dataclass(frozen=True)
class Diagnostic:
    """One finding. `code` has a page in `fxcompress/codes/`, printed by `fxcompress explain CODE`."""

    code: str
    message: str
    primary: Label | None = None
    secondary: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    help: str | None = None
    fixes: tuple[Fix, ...] = ()
    severity: Severity = "error"


class FxcError(Exception):
    """The one error that fxcompress raises for what a user can mend; it holds every diagnostic of its level."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        from .render import render_text

        return render_text(self.diagnostics)


class PolicyError(FxcError):
    """A policy text is wrong (levels `check` and `check --model`)."""


class CaptureError(FxcError):
    """A model can't be brought into the normal form."""


class PlanError(FxcError):
    """A policy can't be carried out on this model, or a budget can't be met."""


class RewriteError(FxcError):
    """A pass would have broken an invariant; nothing was written."""


class ArtifactError(FxcError):
    """An artifact is damaged, hostile or of another version."""


@dataclass
class Sink:
    """Collects the diagnostics of one level, so that all of them are shown in one run."""

    items: list[Diagnostic] = field(default_factory=list)

    def error(self, code: str, message: str, primary: Span | None = None, label: str = "", **rest: object) -> None:
        """Record an error; `rest` are further fields of `Diagnostic`."""
        place = Label(primary, label) if primary is not None else None
        self.items.append(Diagnostic(code, message, place, **rest))  # type: ignore[arg-type]

    def raise_if_errors(self, kind: type[FxcError]) -> None:
        """Raise `kind` with everything recorded if any of it is an error."""
        if any(item.severity == "error" for item in self.items):
            raise kind(self.items)


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names most like `word`, best first, compared without regard to case. Of equally like ones those with the same
    letters come first: two that changed places are the commonest slip."""
    names = {name.lower(): name for name in known}
    lower = word.lower()

    def likeness(match: str) -> tuple[bool, float]:
        return sorted(match) == sorted(lower), SequenceMatcher(None, match, lower).ratio()

    matches = get_close_matches(lower, names, n=max(count, 12), cutoff=0.6)
    return [names[match] for match in sorted(matches, key=likeness, reverse=True)[:count]]
