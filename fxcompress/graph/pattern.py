"""Name patterns: globs and regular expressions on dotted module paths. Both must match the whole path.

Both run in time polynomial in the path's length with a small exponent, whatever a stranger's policy says: globs are
matched part by part, and regular expressions that could backtrack without end are refused.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from functools import lru_cache

MOST_REPETITIONS = 4  # unbounded ones (`*`, `+`, `{2,}`) in one regular expression
MOST_OPTIONS = 8  # bounded ones (`?`, `{1,3}`)
_BOUNDS = re.compile(r"\{(\d*)(,?)(\d*)\}")


class PatternError(ValueError):
    """A pattern that can't be used; `help` is the way out."""

    def __init__(self, reason: str, help: str) -> None:
        super().__init__(reason)
        self.help = help


@dataclass(frozen=True)
class Glob:
    """`layer*.**`: `*` and `?` stand for characters of one dotted part, `[ab]` for one of them, `**` (a whole part)
    for any number of parts, none included: `layer1.**` matches `layer1`, `layer1.0` and `layer1.0.conv1`."""

    text: str
    parts: tuple[re.Pattern[str] | None, ...]  # None is `**`

    def matches(self, path: str) -> bool:
        """Whether the glob matches the whole of `path`: the set of places reached, part by part."""
        reached = self._skip({0})
        for part in path.split("."):
            step = set()
            for place in reached:
                pattern = self.parts[place] if place < len(self.parts) else _END
                if pattern is None:
                    step.add(place)
                elif pattern.match(part):
                    step.add(place + 1)
            reached = self._skip(step)
        return len(self.parts) in reached

    def _skip(self, places: set[int]) -> set[int]:
        """`places` and those behind `**` parts that stand for nothing."""
        more = set(places)
        for place, part in enumerate(self.parts):
            if part is None and place in more:
                more.add(place + 1)
        return more

    @property
    def is_literal(self) -> bool:
        """Whether the glob has no wildcard: it is one exact path."""
        return not any(char in self.text for char in "*?[")


_END = re.compile(r"(?!)")  # nothing matches behind the last part


@lru_cache(maxsize=1024)
def glob(text: str) -> Glob:
    """Compile a glob. Raises PatternError for `**` within a part and for empty parts."""
    parts: list[re.Pattern[str] | None] = []
    for part in text.split("."):
        if part == "**":
            parts.append(None)
        elif "**" in part:
            raise PatternError(f'`**` in "{text}" is only a part of its dotted part `{part}`',
                               "`**` stands for whole parts: write `layer*.**`; within a part `*` is enough")
        elif not part and text:
            raise PatternError(f'"{text}" has an empty part', "paths are parts joined by single dots: `layer1.0.conv1`")
        else:
            parts.append(re.compile(fnmatch.translate(part)))  # atomic groups: no backtracking over several `*`
    return Glob(text, tuple(parts))


@lru_cache(maxsize=1024)
def regex(text: str) -> re.Pattern[str]:
    """Compile a regular expression for `fullmatch`. Raises PatternError for one that is wrong or could run without end:
    a repetition of a group that itself repeats or has alternatives, or too many repetitions."""
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f'`re"{text}"` is not a regular expression: {error}',
                           "the syntax is that of Python's `re`; a dot in a path is written `\\.`") from error
    _bounded(text)
    return pattern


def _bounded(text: str) -> None:
    """Refuse what could backtrack without end on a long path."""
    repetitions = options = place = 0
    groups = [False]  # for every open group: has it a repetition or alternatives?
    while place < len(text):
        char = text[place]
        if char == "\\":
            place += 2
            continue
        if char == "[":
            place = _end_of_class(text, place)
            continue
        if char == "(":
            groups.append(False)
            place += 2 if text[place + 1: place + 2] == "?" else 1
            continue
        closed = groups.pop() if char == ")" else False
        if char == ")":
            place += 1
            groups[-1] = groups[-1] or closed
            if text[place: place + 1] in ("*", "+", "{") and closed and _repeat(text, place) is not None:
                raise PatternError(
                    f'`re"{text}"` repeats a group that itself repeats or has alternatives: that can take for ever',
                    "let a glob cross the parts (`encoder.**.conv1`), or join selectors with `|`")
            continue
        found = _repeat(text, place)
        if found is not None:
            place, unbounded = found
            repetitions, options = repetitions + unbounded, options + (not unbounded)
            groups[-1] = True
            continue
        groups[-1] = groups[-1] or (char == "|")
        place += 1
    if repetitions > MOST_REPETITIONS or options > MOST_OPTIONS:
        raise PatternError(
            f'`re"{text}"` has {repetitions} repetitions and {options} optional parts; the most allowed are '
            f"{MOST_REPETITIONS} and {MOST_OPTIONS}",
            "use a glob, where `*` and `**` cost nothing, or several predicates")


def _repeat(text: str, place: int) -> tuple[int, bool] | None:
    """(the place behind the quantifier at `place`, whether it is unbounded), or None if there is none."""
    char = text[place]
    if char in "*+?":
        end, unbounded = place + 1, char != "?"
    elif char == "{" and (match := _BOUNDS.match(text, place)) is not None and match.group() != "{}":
        end, unbounded = match.end(), bool(match.group(2)) and not match.group(3)
    else:
        return None
    return end + (text[end: end + 1] in ("?", "+")), unbounded


def _end_of_class(text: str, place: int) -> int:
    """The place behind the `[...]` that begins at `place`."""
    end = place + 1
    end += text[end: end + 1] == "^"
    end += text[end: end + 1] == "]"
    while end < len(text) and text[end] != "]":
        end += 2 if text[end] == "\\" else 1
    return end + 1
