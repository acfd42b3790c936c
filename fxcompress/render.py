"""Diagnostics for people and for tools: text like rustc's, JSON, and SARIF 2.1.0."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .diagnostics import Diagnostic, Fix, Label
from .source import Source, Span

TAB = "    "
MAX_WIDTH = 120  # columns of a source line that are shown; longer ones are cut around the place
MARGIN = 24  # columns kept before the place when a line is cut

#: (text, style): plain text is the joined texts; on a terminal rich paints the styles
Piece = tuple[str, str]
STYLES = {"error": "bold red", "warning": "bold yellow", "help": "bold green", "frame": "bold blue", "strong": "bold",
          "minor": "bold blue", "": ""}


def render_text(diagnostics: Iterable[Diagnostic]) -> str:
    """Every diagnostic as text, without colours, a blank line between them."""
    return "".join(text for text, _ in render_pieces(diagnostics))


def render_pieces(diagnostics: Iterable[Diagnostic]) -> list[Piece]:
    """The text of `render_text` in pieces with a style each, a key of `STYLES`."""
    pieces: list[Piece] = []
    for index, item in enumerate(diagnostics):
        if index:
            pieces.append(("\n", ""))
        pieces += _diagnostic(item)
    return pieces


def print_text(diagnostics: Iterable[Diagnostic], stream: TextIO | None = None) -> None:
    """Print `render_text` to `stream` (stderr), in colour on a terminal (unless `NO_COLOR` is set)."""
    stream = stream or sys.stderr
    pieces = render_pieces(diagnostics)
    if stream.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console
        from rich.text import Text

        text = Text.assemble(*((piece, STYLES[style]) for piece, style in pieces))
        Console(file=stream).print(text, end="", soft_wrap=True)
    else:
        text_only = "".join(piece for piece, _ in pieces)
        encoding = stream.encoding or "utf-8"
        stream.write(text_only.encode(encoding, errors="backslashreplace").decode(encoding))


def _diagnostic(item: Diagnostic) -> list[Piece]:
    pieces: list[Piece] = [(f"{item.severity}[{item.code}]", item.severity), (f": {clean(item.message)}\n", "strong")]
    labels = [(label, True) for label in (item.primary,) if label] + [(label, False) for label in item.secondary]
    gutter = max((len(str(label.span.line)) for label, _ in labels), default=0)
    sources: dict[int, tuple[Source, list[tuple[Label, bool]]]] = {}
    for label, is_primary in labels:
        sources.setdefault(id(label.span.source), (label.span.source, []))[1].append((label, is_primary))
    for index, (source, group) in enumerate(sources.values()):
        pieces += _snippet(source, group, gutter, "-->" if index == 0 else ":::", item.severity)
    edge = " " * (gutter + 1)
    for note in item.notes:
        pieces += _paragraph(edge, "note", note, "strong")
    if item.help is not None:
        pieces += _paragraph(edge, "help", item.help, "help")
    return pieces


def _paragraph(edge: str, word: str, text: str, style: str) -> list[Piece]:
    first, *more = clean(text, keep_newlines=True).split("\n")
    pieces: list[Piece] = [(f"{edge}= ", "frame"), (f"{word}:", style), (f" {first}\n", "")]
    return pieces + [(f"{edge}  {' ' * len(word)}  {line}\n", "") for line in more]


def _snippet(source: Source, labels: Sequence[tuple[Label, bool]], gutter: int, arrow: str,
             severity: str) -> list[Piece]:
    """The lines of one text that have labels, each with its carets."""
    line, column = source.position(labels[0][0].span.start)
    edge = " " * gutter
    pieces: list[Piece] = [(f"{edge}{arrow} ", "frame"), (f"{clean(source.name)}:{line}:{column}\n", ""),
                           (f"{edge} |\n", "frame")]
    by_line: dict[int, list[tuple[Label, bool]]] = {}
    for label, is_primary in sorted(labels, key=lambda item: item[0].span.start):
        by_line.setdefault(label.span.line, []).append((label, is_primary))
    previous = None
    for number, here in sorted(by_line.items()):
        if previous is not None and number > previous + 1:
            pieces.append(("...\n", "frame"))
        previous = number
        text = _Line(source, number, [label.span for label, _ in here])
        pieces += [(f"{number:>{gutter}} |", "frame"), (f" {text.shown}".rstrip() + "\n", "")]
        pieces += _marks(text, here, edge, severity)
    return pieces


def _marks(text: _Line, labels: Sequence[tuple[Label, bool]], edge: str, severity: str) -> list[Piece]:
    """The carets under a line: a row for each label with words, the primary first; those without join the first row."""
    rows: list[Piece] = []
    worded = sorted((item for item in labels if item[0].text or item[1]),
                    key=lambda item: (not item[1], item[0].span.start))
    silent = [item for item in labels if item not in worded]
    first = worded[0] if worded else silent.pop(0)
    rows += _row(text, [first, *silent], edge, severity)
    for item in worded[1:]:
        rows += _row(text, [item], edge, severity)
    return rows


def _row(text: _Line, labels: Sequence[tuple[Label, bool]], edge: str, severity: str) -> list[Piece]:
    """One row of marks, then the words of the first label. Where two overlap, the primary is seen."""
    row: list[Piece] = [(f"{edge} | ", "frame")]
    at = 0
    for label, is_primary in sorted(labels, key=lambda item: (item[0].span.start, not item[1])):
        left, width = text.columns(label.span)
        left, width = max(left, at), left + width - max(left, at)
        if width > 0:
            row += [(" " * (left - at), ""),
                    (("^" if is_primary else "-") * width, severity if is_primary else "minor")]
            at = left + width
    words = f" {clean(labels[0][0].text)}" if labels[0][0].text else ""
    return [*row, (f"{words}\n", severity if labels[0][1] else "minor")]


@dataclass
class _Line:
    """A source line as it is shown: tabs as blanks, control characters as pictures, long ones cut around the places."""

    source: Source
    number: int
    spans: Sequence[Span]

    def __post_init__(self) -> None:
        self.start = self.spans[0].start - self.source.position(self.spans[0].start)[1] + 1
        raw = self.source.line(self.number)
        first = min(span.start for span in self.spans) - self.start
        self.cut = 0
        if len(raw) > MAX_WIDTH:
            self.cut = max(0, min(first - MARGIN, len(raw) - MAX_WIDTH))
        self.raw = raw
        self.end = min(len(raw), self.cut + MAX_WIDTH)
        self.lead = "..." if self.cut else ""
        tail = "..." if self.end < len(raw) else ""
        self.shown = (self.lead + "".join(_cell(char) for char in raw[self.cut:self.end]) + tail).rstrip()

    def columns(self, span: Span) -> tuple[int, int]:
        """(columns before the place, columns of it): to the end of the line where it goes on, at least one."""
        start = max(span.start - self.start, self.cut)
        end = min(max(span.end - self.start, start), self.end)
        left = len(self.lead) + _columns(self.raw[self.cut:start])
        return left, max(1, _columns(self.raw[start:end]))


def _cell(char: str) -> str:
    """One character as it is shown: nothing that moves the cursor, hides or reverses text gets through."""
    if char == "\t":
        return TAB
    category = unicodedata.category(char)
    if ord(char) < 32:
        return chr(0x2400 + ord(char))
    return "\ufffd" if category in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else char


def clean(text: str, *, keep_newlines: bool = False) -> str:
    """`text` with control and formatting characters made visible."""
    return "".join(char if keep_newlines and char == "\n" else _cell(char) for char in text)


def _columns(text: str) -> int:
    """Terminal columns of `text` as shown: wide characters take two, combining ones none."""
    total = 0
    for char in text:
        shown = _cell(char)
        if len(shown) > 1:
            total += len(shown)
        elif not unicodedata.combining(shown) and unicodedata.category(shown) not in ("Mn", "Me"):
            total += 2 if unicodedata.east_asian_width(shown) in "WF" else 1
    return total


# For tools


def _place(span: Span) -> dict[str, Any]:
    line, column = span.source.position(span.start)
    end_line, end_column = span.source.position(span.end)
    return {"file": span.source.name, "line": line, "column": column, "end_line": end_line, "end_column": end_column}


def _label_data(label: Label | None) -> dict[str, Any] | None:
    return None if label is None else {**_place(label.span), "text": label.text}


def _fix_data(fix: Fix) -> dict[str, Any]:
    return {**_place(fix.span), "replacement": fix.replacement}


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    """A JSON list with an object for each diagnostic. Lines and columns count from 1, ends are exclusive."""
    return json.dumps([{
        "code": item.code, "severity": item.severity, "message": item.message, "primary": _label_data(item.primary),
        "secondary": [_label_data(label) for label in item.secondary], "notes": list(item.notes), "help": item.help,
        "fixes": [_fix_data(fix) for fix in item.fixes],
    } for item in diagnostics], indent=2, ensure_ascii=False) + "\n"


def _region(span: Span) -> dict[str, Any]:
    place = _place(span)
    return {"startLine": place["line"], "startColumn": place["column"], "endLine": place["end_line"],
            "endColumn": place["end_column"]}


def _location(label: Label) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(label.span.source.name)},
                                                     "region": _region(label.span)}}
    return {**location, "message": {"text": label.text}} if label.text else location


def _uri(name: str) -> str:
    from urllib.parse import quote

    return quote(Path(name).as_posix())


def _result(item: Diagnostic) -> dict[str, Any]:
    text = "\n".join([item.message, *(f"note: {note}" for note in item.notes),
                      *([f"help: {item.help}"] if item.help is not None else [])])
    result: dict[str, Any] = {"ruleId": item.code, "level": item.severity, "message": {"text": text}}
    if item.primary is not None:
        result["locations"] = [_location(item.primary)]
    if item.secondary:
        result["relatedLocations"] = [_location(label) for label in item.secondary]
    if item.fixes:
        result["fixes"] = [{
            "description": {"text": item.help or "replace"},
            "artifactChanges": [{
                "artifactLocation": {"uri": _uri(fix.span.source.name)},
                "replacements": [{"deletedRegion": _region(fix.span), "insertedContent": {"text": fix.replacement}}],
            } for fix in item.fixes],
        }]
    return result


def render_sarif(diagnostics: Iterable[Diagnostic]) -> str:
    """A SARIF 2.1.0 log with one run (OASIS standard, 2020). Columns are Unicode code points."""
    items = list(diagnostics)
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {"name": "fxcompress",
                                "rules": [{"id": code} for code in sorted({i.code for i in items})]}},
            "columnKind": "unicodeCodePoints",
            "results": [_result(item) for item in items],
        }],
    }
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"


RENDERERS: Mapping[str, Callable[[Iterable[Diagnostic]], str]] = {
    "text": render_text, "json": render_json, "sarif": render_sarif,
}
