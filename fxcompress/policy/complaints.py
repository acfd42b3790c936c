"""What the parser says: from a token that can't stand where it stands to a diagnostic with a way out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from lark import Token

from ..diagnostics import Diagnostic, Fix, Label, nearest
from ..source import Source, Span
from . import schema
from .build import ESCAPES, split_quantity
from .words import BINARY, KEYWORDS, LOOKALIKES, MODIFIERS, STATEMENTS, TERMINALS, UNITS, VALUE_STARTS, listed, quoted

STATEMENT_WORDS = frozenset({*STATEMENTS, *MODIFIERS})
SPOILT = ("FXC0010", "FXC0012")  # what was read of the statement before these is not what was meant
SIGNS = {"LPAR": ")", "LSQB": "]", "LBRACE": "}"}
_ESCAPE = re.compile(r"\\(.)")


def _span(source: Source, token: Token) -> Span:
    start = token.start_pos or 0
    end = token.end_pos if token.end_pos is not None else start
    if token.type == "_NL":
        end = start  # the caret stands behind the last character of the line
    return Span(source, start, end)


def _shown(token: Token) -> str:
    if token.type in ("_NL", "$END"):
        return TERMINALS[token.type]
    text = str(token)
    return f"`{text if len(text) <= 40 else text[:37] + '...'}`"


def unexpected(source: Source, token: Token, expected: set[str], previous: Token | None, first: Token | None,
               opens: Sequence[Token]) -> Diagnostic:
    """The best message for `token`, which is none of `expected`; `first` began the statement."""
    for special in (_missing_value, _unit, _equals, _misspelt_statement, _misspelt_keyword):
        found = special(source, token, expected, previous, first)
        if found is not None:
            return found
    secondary: tuple[Label, ...] = ()
    if opens and opens[-1].type in ("LPAR", "LSQB") and {"RPAR", "RSQB"} & expected:
        secondary = (Label(_span(source, opens[-1]), "opened here"),)
    return Diagnostic("FXC0004", f"expected {_wanted(expected)}, found {_shown(token)}",
                      Label(_span(source, token), "not expected here"), secondary, help=_hint(token, expected, opens))


def _wanted(expected: set[str]) -> str:
    """The expectation set in few words."""
    names = set(expected)
    words = []
    if names >= VALUE_STARTS - {"MINUS"}:
        names -= VALUE_STARTS
        words.append("a value or a selector")
    if {"USE", "POLICY", "LET"} <= names:
        names -= {word.upper() for word in (*STATEMENTS, *MODIFIERS)} | {"NAME", "_NL", "_COMMA_SEP", "$END"}
        words.append("a statement")
    if len(names & BINARY) > 3:
        names -= BINARY | {"LPAR"}
        words.append("an operator")
    if "_NL" in names:
        names -= {"_COMMA_SEP", "$END"}
    words += sorted(TERMINALS[name] for name in names)
    return listed(words or ["nothing"])


def _hint(token: Token, expected: set[str], opens: Sequence[Token]) -> str:
    if "_NL" in expected and "USE" not in expected and token.type not in ("_NL", "$END"):
        return "begin a new statement on a new line"
    if opens and opens[-1].type != "LBRACE" and {"RPAR", "RSQB"} & expected:
        return f"close it with `{SIGNS[opens[-1].type]}`"
    if "USE" in expected:
        return "a statement begins with a keyword or a verb, a setting with its name: `key = value`"
    return f"write {_wanted(expected)} here"


def _missing_value(source: Source, token: Token, _expected: set[str], previous: Token | None,
                   _first: Token | None) -> Diagnostic | None:
    if previous is None or previous.type != "EQUAL" or token.type not in ("_NL", "$END", "RBRACE", "_COMMA_SEP",
                                                                          "RPAR"):
        return None
    place = Span(source, previous.start_pos or 0, previous.end_pos or 0)
    return Diagnostic("FXC0007", "a value is missing behind `=`", Label(place, "nothing follows on this line"),
                      help="write the value on the same line as `=`, such as `align = 8`")


def _unit(source: Source, token: Token, _expected: set[str], previous: Token | None,
          _first: Token | None) -> Diagnostic | None:
    if token.type in ("_NL", "$END") or previous is None or previous.type != "NUMBER" or not str(token)[:1].isalpha():
        return None
    known = nearest(str(token), UNITS, 1)
    span = _span(source, token)
    return Diagnostic("FXC0012", f"unknown unit `{token}`", Label(span, "not a unit"),
                      notes=(f"units: {', '.join(UNITS)}",),
                      help=f"did you mean `{known[0]}`?" if known
                      else "write the number with one of the units, or alone",
                      fixes=(Fix(span, known[0]),) if known else ())


def _equals(source: Source, token: Token, expected: set[str], previous: Token | None,
            _first: Token | None) -> Diagnostic | None:
    span = _span(source, token)
    if token.type == "EQUAL" and "CMP" in expected:
        return Diagnostic("FXC0004", "`=` sets a value; a comparison is written `==`",
                          Label(span, "a comparison stands here"),
                          help="write `==`", fixes=(Fix(span, "=="),))
    if token.type in ("EQUAL", "CMP") and previous is not None and previous.type == "EQUAL":
        both = Span(source, previous.start_pos or 0, span.end)
        return Diagnostic("FXC0004", "`==` compares; a value is set with `=`", Label(both, "a value is set here"),
                          help="write `=`", fixes=(Fix(both, "="),))
    return None


def _misspelt_statement(source: Source, _token: Token, _expected: set[str], _previous: Token | None,
                        first: Token | None) -> Diagnostic | None:
    """`phse deploy after x`: the leading word is neither a keyword nor a verb."""
    if first is None or first.type != "NAME" or str(first) in schema.verb_names():
        return None
    known = nearest(str(first), (*STATEMENTS, *MODIFIERS, *schema.verb_names()), 1)
    if not known:
        return None
    span = _span(source, first)
    return Diagnostic("FXC0010", f"`{first}` is neither a keyword nor a verb", Label(span, "begins no statement"),
                      help=f"did you mean `{known[0]}`?", fixes=(Fix(span, known[0]),))


def _misspelt_keyword(source: Source, token: Token, expected: set[str], _previous: Token | None,
                      _first: Token | None) -> Diagnostic | None:
    """`phase a ovr epochs 0..3`: the word is near one that could stand here."""
    if token.type in ("_NL", "$END") or not str(token).isidentifier():
        return None
    known = nearest(str(token), [word for word in KEYWORDS if word.upper() in expected], 1)
    if not known:
        return None
    span = _span(source, token)
    return Diagnostic("FXC0010", f"`{token}` is not a keyword that can stand here",
                      Label(span, f"expected {quoted(known)}"),
                      help=f"did you mean `{known[0]}`?", fixes=(Fix(span, known[0]),))


def unclosed(source: Source, opened: Token) -> Diagnostic:
    """A bracket that is never closed."""
    sign = SIGNS[opened.type]
    return Diagnostic("FXC0005", f"`{opened}` is never closed", Label(_span(source, opened), "opened here"),
                      help=f"add the missing `{sign}`")


def unmatched(source: Source, token: Token, opened: Token | None) -> Diagnostic:
    """A closing bracket that closes nothing."""
    secondary: tuple[Label, ...] = ()
    if opened is not None:
        secondary = (Label(_span(source, opened), f"open here, closed by `{SIGNS[opened.type]}`"),)
    return Diagnostic("FXC0006", f"`{token}` closes nothing", Label(_span(source, token), "no bracket is open for it"),
                      secondary, help="take it out, or add the bracket that it should close")


def too_deep(source: Source, token: Token, limit: int) -> Diagnostic:
    """Brackets nest past the limit; reading ends there."""
    return Diagnostic("FXC0008", f"brackets nest more than {limit} deep", Label(_span(source, token), "one too many"),
                      help="name inner parts with `let`", notes=("the rest of the text was not read",))


def too_many(limit: int) -> Diagnostic:
    """The last word after `limit` errors."""
    return Diagnostic("FXC0009", f"more than {limit} syntax errors; the rest of the text was not read",
                      help="mend the first ones, and check again; is this a policy at all?")


def unterminated(source: Source, start: int, end: int) -> Diagnostic:
    """A text that does not end on its line."""
    return Diagnostic("FXC0002", 'this text has no closing `"`', Label(Span(source, start, end), "begins here"),
                      help='end it with `"` on the same line; a `"` inside it is written `\\"`')


def wrong_quotes(source: Source, start: int, end: int) -> Diagnostic:
    """A text in quotes of another kind; it is read as if they were ours."""
    span, fix = Span(source, start, end), f'"{source.text[start + 1:end - 1]}"'
    return Diagnostic("FXC0003", 'texts stand in `"`', Label(span, "in quotes of another kind"), help=f"write `{fix}`",
                      fixes=(Fix(span, fix),))


def strange(source: Source, start: int, end: int) -> Diagnostic:
    """Characters that begin nothing."""
    text = source.text[start:end]
    span = Span(source, start, end)
    instead = LOOKALIKES.get(text[0])
    if instead is not None:
        exact = len(instead) <= 2
        meant = instead if not exact else f"`{instead}`" if instead.strip() else "a blank"
        return Diagnostic("FXC0003", f"the character {_named(text[0])} means nothing here",
                          Label(span, "not of the language"),
                          help=f"did you mean {meant}?",
                          fixes=(Fix(span, instead),) if exact and len(text) == 1 else ())
    if text[0].isalpha():
        while start > 0 and (source.text[start - 1].isalnum() or source.text[start - 1] == "_"):
            start -= 1
        word = Span(source, start, end)
        return Diagnostic("FXC0003", "names are made of the letters a-z and A-Z, digits and `_`",
                          Label(word, "not a name"),
                          help='module paths with other letters are written as texts: `name ~ "größe"`')
    return Diagnostic("FXC0003", f"the character {_named(text[0])} means nothing here",
                      Label(span, "not of the language"),
                      help="take it out")


def _named(char: str) -> str:
    return f"`{char}`" if char.isprintable() and not char.isspace() else f"U+{ord(char):04X}"


def literal(source: Source, token: Token) -> Iterator[Diagnostic]:
    """What is wrong inside a text or a number."""
    start = token.start_pos or 0
    if token.type == "STRING":
        for match in _ESCAPE.finditer(token):
            if match.group(1) not in ESCAPES:
                place = Span(source, start + match.start(), start + match.end())
                yield Diagnostic("FXC0013", f"unknown escape `{match.group()}`", Label(place, "in this text"),
                                 notes=('escapes: `\\"`, `\\\\`, `\\n`, `\\t`',),
                                 help="a backslash itself is written `\\\\`",
                                 fixes=(Fix(place, "\\" + match.group()),))
        return
    digits = split_quantity(str(token))[0]
    if not math.isfinite(float(digits)):
        yield Diagnostic("FXC0014", "this number is too large", Label(_span(source, token), "past 1e308"),
                         help="write a smaller number")
