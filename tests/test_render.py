"""Renderers: carets under what they mean, JSON and SARIF that tools can read."""

from __future__ import annotations

import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import STEADY

from fxcompress.diagnostics import Diagnostic, Fix, Label
from fxcompress.render import MAX_WIDTH, clean, print_text, render_json, render_sarif, render_text
from fxcompress.source import Source


def shown(text: str, start: int, end: int, label: str = "here") -> list[str]:
    item = Diagnostic("FXC0000", "wrong", Label(Source("p.fxc", text).span(start, end), label))
    return render_text([item]).splitlines()


def under(lines: list[str]) -> str:
    """What stands above the carets, by terminal columns (wide characters count two, combining ones none)."""
    source, carets = lines[-2], lines[-1]
    left, right = carets.index("^"), carets.rindex("^") + 1
    found, column = "", 0
    for char in source:
        width = 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if left <= column < right:
            found += char
        column += width
    return found


@pytest.mark.parametrize(("before", "marked"), [
    ("let x = ", "conv2d"), ("\t\tlet x = ", "conv2d"), ("日本語 = ", "conv2d"), ("e\u0301\u0301 = ", "conv2d"),
    ("x" * 500 + " ", "conv2d"), ("\x1b[31m", "conv2d"), ("", "日本"), ("\ufeff", "conv2d"), ("🙂🙂 ", "conv2d"),
])
def test_carets_stand_under_what_they_mean(before: str, marked: str) -> None:
    assert under(shown(f"first\n{before}{marked} more", len(before) + 6, len(before) + len(marked) + 6)) == marked


@STEADY
@given(st.text(max_size=30).map(lambda text: text.replace("\n", "")), st.from_regex(r"[a-z]{1,9}", fullmatch=True),
       st.text(max_size=200).map(lambda text: text.replace("\n", "")))
def test_carets_under_any_text(before: str, marked: str, after: str) -> None:
    lines = shown(before + marked + after, len(before), len(before) + len(marked))
    assert len(lines) == 5 and under(lines) == marked
    assert not any(unicodedata.category(char) in ("Cc", "Cf") for line in lines for char in line)


def test_long_lines_are_cut_around_the_place() -> None:
    lines = shown("a" * 5000 + "bad" + "c" * 5000, 5000, 5003)
    assert len(lines[-2]) < MAX_WIDTH + 20 and under(lines) == "bad"
    lines = shown("a" * 5000, 0, 5000)
    assert len(lines[-1]) < MAX_WIDTH + 20


def test_places_at_the_end_and_over_lines() -> None:
    assert shown("abc", 3, 3)[-1] == "  |    ^ here"
    assert shown("", 0, 0)[-1] == "  | ^ here"
    assert shown("abc\ndef", 1, 6)[-1] == "  |  ^^ here"
    assert shown("abc\r\ndef", 5, 8)[1:4] == [" --> p.fxc:2:1", "  |", "2 | def"]


def test_the_whole_form() -> None:
    one, two = Source("a.fxc", "policy p {\n    mask x { }\n\n\n\n\n\n\n    mask y { }\n}\n"), Source("lib.fxc",
                                                                                                      "preset q\n")
    again = one.text.index("mask y")
    item = Diagnostic("FXC0301", "two write\u0007one", Label(one.span(again, again + 6), "again"), (
        Label(one.span(15, 21), "first"), Label(two.span(0, 6), "declared")), ("a note\nof two lines",), "a help")
    assert render_text([item, Diagnostic("FXC0302", "no place", severity="warning")]) == """\
error[FXC0301]: two write␇one
 --> a.fxc:9:5
  |
2 |     mask x { }
  |     ------ first
...
9 |     mask y { }
  |     ^^^^^^ again
 ::: lib.fxc:1:1
  |
1 | preset q
  | ------ declared
  = note: a note
          of two lines
  = help: a help

warning[FXC0302]: no place
"""


def test_json_holds_everything() -> None:
    source = Source("p.fxc", "let größe = 日本\n")
    item = Diagnostic("FXC0105", "wrong", Label(source.span(12, 14), "here"), (Label(source.span(0, 3)),), ("n",), "h",
                      (Fix(source.span(12, 14), '"x"'),))
    [data] = json.loads(render_json([item]))
    assert data == {
        "code": "FXC0105", "severity": "error", "message": "wrong", "notes": ["n"], "help": "h",
        "primary": {"file": "p.fxc", "line": 1, "column": 13, "end_line": 1, "end_column": 15, "text": "here"},
        "secondary": [{"file": "p.fxc", "line": 1, "column": 1, "end_line": 1, "end_column": 4, "text": ""}],
        "fixes": [{"file": "p.fxc", "line": 1, "column": 13, "end_line": 1, "end_column": 15, "replacement": '"x"'}],
    }
    assert json.loads(render_json([])) == []


def test_sarif() -> None:
    source = Source("some dir/p.fxc", "let a = 1\n")
    item = Diagnostic("FXC0105", "wrong", Label(source.span(8, 9), "here"), (Label(source.span(4, 5), "of this"),), (),
                      "h",
                      (Fix(source.span(8, 9), "2"),))
    log = json.loads(render_sarif([item, Diagnostic("FXC0110", "unused", severity="warning")]))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    [run] = log["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["FXC0105", "FXC0110"]
    first, second = run["results"]
    assert first["level"] == "error" and second["level"] == "warning" and "locations" not in second
    place = first["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "some%20dir/p.fxc"
    assert place["region"] == {"startLine": 1, "startColumn": 9, "endLine": 1, "endColumn": 10}
    replaced = first["fixes"][0]["artifactChanges"][0]["replacements"][0]
    assert replaced["insertedContent"]["text"] == "2" and replaced["deletedRegion"]["startColumn"] == 9


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    item = Diagnostic("FXC0105", "a [bold]wrong[/bold] thing", Label(Source("p", "abc").span(0, 1), "x"))
    plain, terminal = io.StringIO(), Terminal()
    print_text([item], plain)
    print_text([item], terminal)
    assert plain.getvalue() == render_text([item])
    assert "\x1b[" in terminal.getvalue() and "[bold]wrong[/bold]" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    print_text([item], terminal)
    assert terminal.getvalue() == render_text([item])


def test_streams_of_other_encodings() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_text([Diagnostic("FXC0105", "größe")], stream)
    stream.flush()
    assert stream.buffer.getvalue() == b"error[FXC0105]: gr\\xf6\\xdfe\n"  # type: ignore[attr-defined]


def test_clean() -> None:
    assert clean("a\x00\x1b\u202eb\u2028") == "a␀␛\ufffdb\ufffd"
