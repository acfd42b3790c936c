"""`fxcompress fmt`: the one layout of a policy. The tree stays the same, comments stay, a second run changes nothing.

It works on tokens: blocks that were written on one line stay on one line, line breaks inside brackets stay, everything
else has one form. Consecutive settings, and consecutive `let`s, have their `=` aligned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..diagnostics import PolicyError
from ..source import Source
from .build import split_quantity
from .parsing import parse_file
from .words import KEYWORDS, MODIFIERS, STATEMENTS

INDENT = "    "

_TOKEN = re.compile(r"""
    (?P<comment>\#[^\n]*) | (?P<newline>\n) | (?P<blank>[ \t\r]+)
  | (?P<string>(?:re)?"(?:\\.|[^"\\\n])*")
  | (?P<quantity>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?[ \t]*
      (?:%|(?:steps?|epochs?|samples?|bits?|us|ms|s|[kKMG]i?B|B|k|M|G)(?![A-Za-z0-9_])))
  | (?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<sign>>>|->|<-|<=|>=|==|!=|\.\.|[{}()\[\],:=|&*<>~-])
""", re.VERBOSE)
_TIGHT_UNITS = ("%", "k", "M", "G")
_OPERATORS = frozenset(("|", "&", "-", ">>", "->", "<-", "<", "<=", ">", ">=", "==", "!=", "~", "="))


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


@dataclass
class _Block:
    """`{ ... }`. `inline`: it was on one line. `comment` stands behind the `{`. Tokens among the items are comments on
    their own line, and blank lines."""

    inline: bool = True
    comment: str = ""
    items: list[_Statement | _Token] = field(default_factory=list)


@dataclass
class _Statement:
    """Tokens and blocks of one statement, with the comment at its end."""

    parts: list[_Token | _Block] = field(default_factory=list)
    comment: str = ""

    def starts_with(self, word: str) -> bool:
        first = self.parts[0] if self.parts else None
        return isinstance(first, _Token) and first.text == word

    @property
    def equals(self) -> int | None:
        """How many tokens stand before the `=` of a one-line setting or `let`, None for anything else."""
        if any(isinstance(part, _Block) or part.kind in ("newline", "comment") for part in self.parts):
            return None
        place = 2 if self.starts_with("let") else 1
        found = self.parts[place] if len(self.parts) > place else None
        return place if isinstance(found, _Token) and found.text == "=" else None


def format_policy(text: str, name: str = "<policy>") -> str:
    """`text` in the one layout. Raises PolicyError where it has syntax errors; nothing else is checked."""
    source = Source(name, text.removeprefix("\ufeff"))
    parsed = parse_file(source)
    if parsed.diagnostics:
        raise PolicyError(parsed.diagnostics)
    items = _Reader(list(_tokens(source.text))).items(top=True)
    lines = _lines(items, 0)
    return "\n".join(lines) + "\n" if lines else ""


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind == "quantity":
            digits, unit = split_quantity(match.group())
            yield _Token("quantity", f"{digits}{unit}" if unit in _TIGHT_UNITS else f"{digits} {unit}")
        elif kind != "blank":
            yield _Token(kind, match.group().rstrip() if kind == "comment" else match.group())


@dataclass
class _Reader:
    """Tokens to statements and blocks."""

    tokens: list[_Token]
    at: int = 0

    def items(self, *, top: bool = False) -> list[_Statement | _Token]:
        """Statements, comments and blank lines up to the end of the block."""
        found: list[_Statement | _Token] = []
        breaks = 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token.text == "}" and not top:
                break
            if token.kind == "newline" or token.text == ",":
                breaks += token.kind == "newline"
                self.at += 1
                continue
            if breaks > 1 and found:
                found.append(_Token("newline", ""))
            if token.kind == "comment":
                self.at += 1
                self._comment(found, token, own_line=breaks > 0 or not found)
            else:
                found.append(self._statement())
            breaks = 0
        return found

    def _comment(self, found: list[_Statement | _Token], token: _Token, *, own_line: bool) -> None:
        last = found[-1] if found else None
        if not own_line and isinstance(last, _Statement) and not last.comment:
            last.comment = token.text
        else:
            found.append(token)

    def _statement(self) -> _Statement:
        statement, depth = _Statement(), 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            in_head = statement.starts_with("phase")  # `after a, b`: no block was met yet
            if depth == 0 and (token.kind in ("newline", "comment") or token.text == "}"
                               or (token.text == "," and not in_head)):
                return statement
            if depth == 0 and token.text == "{":
                statement.parts.append(self._block())
                return statement
            self.at += 1
            if token.text == "<-" and not statement.starts_with("pair"):
                statement.parts += [_Token("sign", "<"), _Token("sign", "-")]
                continue
            if token.kind == "newline" and (statement.parts[-1:] == [token] or self._follows_bracket(statement)):
                continue
            depth += (token.text in ("(", "[")) - (token.text in (")", "]")) if token.kind == "sign" else 0
            statement.parts.append(token)
        return statement

    def _follows_bracket(self, statement: _Statement) -> bool:
        """Blank lines behind an opening bracket are one break; so are those before a closing one."""
        return len(statement.parts) > 1 and statement.parts[-1] == _Token("newline", "\n")

    def _block(self) -> _Block:
        block = _Block()
        self.at += 1
        if self.at < len(self.tokens) and self.tokens[self.at].kind == "comment":
            block.comment = self.tokens[self.at].text
            self.at += 1
        start = self.at
        block.items = self.items()
        inside = self.tokens[start:self.at]
        block.inline = not block.comment and all(token.kind not in ("newline", "comment") for token in inside)
        self.at += 1
        return block


def _lines(items: Sequence[_Statement | _Token], depth: int) -> list[str]:
    """The lines of a block's statements."""
    widths = _widths(items)
    lines: list[str] = []
    for item, width in zip(items, widths, strict=True):
        if isinstance(item, _Token):
            lines.append(f"{INDENT * depth}{item.text}".rstrip())
            continue
        lines += _statement_lines(item, depth, width)
    return lines


def _widths(items: Sequence[_Statement | _Token]) -> list[int]:
    """For each item, how wide the part before its `=` is made: that of the widest of its run; 0 where there is none."""
    widths = [0] * len(items)
    start = 0
    while start < len(items):
        end = start
        while end < len(items) and _run_of(items[end]) is not None and _run_of(items[end]) == _run_of(items[start]):
            end += 1
        heads = [_joined(item.parts[:item.equals]) for item in items[start:end] if isinstance(item, _Statement)]
        widths[start:end] = [max(map(len, heads), default=0)] * (end - start)
        start = max(end, start + 1)
    return widths


def _run_of(item: _Statement | _Token) -> int | None:
    return item.equals if isinstance(item, _Statement) else None


def _statement_lines(statement: _Statement, depth: int, width: int) -> list[str]:
    tail = f"  {statement.comment}" if statement.comment else ""
    equals = statement.equals
    if equals is not None:
        value = _joined(statement.parts[equals + 1:])
        return [f"{INDENT * depth}{_joined(statement.parts[:equals]):<{width}} = {value}{tail}"]
    last = statement.parts[-1]
    head = statement.parts[:-1] if isinstance(last, _Block) else statement.parts
    lines = _wrapped(head, depth)
    if isinstance(last, _Block):
        lines[-1] += " " if lines[-1].strip() else ""
        lines = [*lines[:-1], *_block_lines(last, lines[-1], depth)]
    lines[-1] += tail
    return lines


def _block_lines(block: _Block, head: str, depth: int) -> list[str]:
    if block.inline:
        inside = ", ".join(_inline(item) for item in block.items if isinstance(item, _Statement))
        return [f"{head}{{ {inside} }}" if inside else f"{head}{{}}"]
    comment = f"  {block.comment}" if block.comment else ""
    return [f"{head}{{{comment}", *_lines(block.items, depth + 1), f"{INDENT * depth}}}"]


def _inline(statement: _Statement) -> str:
    return "\n".join(_statement_lines(statement, 0, 0))


def _wrapped(parts: Sequence[_Token | _Block], depth: int) -> list[str]:
    """The tokens of a head, on several lines where it was broken inside brackets."""
    lines: list[list[_Token]] = [[]]
    for part in parts:
        if isinstance(part, _Token) and part.kind == "newline":
            lines.append([])
        elif isinstance(part, _Token):
            lines[-1].append(part)
    shown: list[str] = []
    opened, before = 0, None
    for line in lines:
        if not line:
            continue
        level = depth + opened - (1 if opened and line[0].text in (")", "]") else 0)
        shown.append(INDENT * level + _joined(line, verb=_verb(line) if before is None else None))
        opened += sum((token.text in ("(", "[")) - (token.text in (")", "]")) for token in line if token.kind == "sign")
        before = line[-1]
    return shown or [INDENT * depth]


def _verb(tokens: Sequence[_Token]) -> int | None:
    """The place of an action's verb in its head; None for other statements."""
    place = next((i for i, token in enumerate(tokens) if token.text not in MODIFIERS), None)
    return place if place is not None and tokens[place].text not in STATEMENTS else None


def _joined(parts: Sequence[_Token | _Block], verb: int | None = None) -> str:
    """Tokens with the blanks that belong between them. `verb` is the place of an action's verb: a `(` behind it opens a
    group, where behind other names it opens a call."""
    tokens = [part for part in parts if isinstance(part, _Token)]
    out = ""
    for index, token in enumerate(tokens):
        if index and _spaced(tokens, index, verb):
            out += "  " if token.kind == "comment" else " "
        out += token.text
    return out


def _spaced(tokens: Sequence[_Token], index: int, verb: int | None) -> bool:
    """Whether a blank stands before token `index`."""
    left, right = tokens[index - 1], tokens[index]
    if right.kind == "comment":
        return True
    if left.text in ("(", "[", "..") or right.text in (")", "]", ",", ":", "..", "["):
        return right.text == "[" and left.text in _OPERATORS
    if left.text == ":":
        return left.kind == "sign" and not (index > 1 and tokens[index - 2].kind == right.kind == "number")
    if right.text == "(" and left.kind == "name":
        return index - 1 == verb or left.text in KEYWORDS
    if left.text == "-":
        before = tokens[index - 2]
        unary = index == 1 or (before.kind == "sign" and before.text in ("(", "[", ",", *_OPERATORS))
        return not unary
    return True
