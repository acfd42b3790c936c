"""Parsing with recovery: every syntax error of a text in one run, and a tree of what could be read.

Lark's contextual lexer and LALR tables do the reading. After an error the statement it stands in is dropped: the
parser's stack is taken back to where a statement may begin, a `BROKEN` token is fed in its place, and reading goes on
at the end of the line, or at the block that follows. Nothing recurses, and brackets nest at most `MAX_DEPTH` deep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, Literal

from lark import Lark, Token, UnexpectedCharacters, UnexpectedToken
from lark.lexer import LexerState, LineCounter
from lark.utils import TextSlice

from ..diagnostics import Diagnostic, Sink
from ..source import Source
from . import ast, complaints, tables
from .build import Builder

MAX_DEPTH = 64
MAX_ERRORS = 100
OPENERS = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
CLOSERS = {close: open_ for open_, close in OPENERS.items()}

_SKIP = re.compile(r'(?:re)?"(?:\\.|[^"\\\n])*"?|#[^\n]*|[(\[]|[)\]]|[{}\n,]|[^()\[\]{}\n,"#r]+|r')
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STRANGE = re.compile(r"[^\x00-\x7f]+|.", re.DOTALL)
_QUOTED = re.compile(r"[“”„‟'‘’`]([^“”„‟'‘’`\"\\\n]*)[“”„‟'‘’`]")
_RUN = {"RBRACE": re.compile(r"[}\s]+"), "RPAR": re.compile(r"\)+"), "RSQB": re.compile(r"\]+")}
_BUILDER, _LOCK = Builder(), Lock()


@dataclass(frozen=True)
class Parsed:
    """What was read. `broken_words` are the words of dropped statements: what they declared is not "unknown" later."""

    file: ast.File
    diagnostics: tuple[Diagnostic, ...] = ()
    broken_words: frozenset[str] = frozenset()


@cache
def _parser() -> Lark:
    return tables.load(_BUILDER)


def parse_file(source: Source) -> Parsed:
    """The tree of a whole text, and every syntax error in it. Any text is taken; nothing is raised."""
    return _run(source, "start")


def parse_expression(source: Source) -> tuple[ast.Expr | None, tuple[Diagnostic, ...]]:
    """The tree of one value or selector, or None and why not."""
    with _LOCK:
        _BUILDER.source = source
        reader = _Reader(source, "expression")
        tree = reader.read()
    return (None if reader.sink.items else tree), tuple(reader.sink.items)


def _run(source: Source, start: Literal["start", "expression"]) -> Parsed:
    with _LOCK:
        _BUILDER.source = source
        reader = _Reader(source, start)
        tree = reader.read()
    file = tree if isinstance(tree, ast.File) else ast.File(source)
    return Parsed(file, tuple(reader.sink.items), frozenset(reader.broken))


class _Stop(Exception):  # noqa: N818 -- control flow: reading ends here, the reason is in the sink
    pass


@dataclass
class _Reader:
    """One run over one text."""

    source: Source
    start: Literal["start", "expression"]
    sink: Sink = field(default_factory=Sink)
    opens: list[Token] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    statement: int = 0  # where the statement began that is being read
    first: Token | None = None  # its first token
    previous: Token | None = None
    pending: Token | None = None  # read already: the text meant by wrong quotes
    quiet: bool = False  # an error was just reported, and nothing was read since that could be another

    def __post_init__(self) -> None:
        parser: Any = _parser().parser
        self.lexers, self.root = parser.lexer.lexers, parser.lexer.root_lexer
        self.state = parser.parse_interactive(None, self.start).parser_state
        self.states = self.state.parse_conf.states
        self.counter = LineCounter("\n")  # type: ignore[no-untyped-call]
        text = self.source.text
        self.lexer_state = LexerState(TextSlice(text, 0, len(text)), self.counter)

    def read(self) -> Any:
        """The tree, or None where reading had to stop."""
        try:
            while True:
                token = self._next()
                state = self.state.state_stack[-1]
                if "BROKEN" in self.states[state] and token.type not in ("_NL", "_COMMA_SEP", "RBRACE"):
                    self.statement, self.first = token.start_pos or 0, token
                if token.type == "$END":
                    return self._finish(token)
                if token.type in CLOSERS and not self._closes(token):
                    continue
                try:
                    self.state.feed_token(token)
                except UnexpectedToken:
                    self._recover(token)
                else:
                    self._took(token)
        except _Stop:
            return None

    def _next(self) -> Token:
        """The next token that counts: newlines inside brackets don't."""
        while True:
            try:
                token, self.pending = self.pending or self._lex(), None
            except EOFError:
                end = len(self.source.text)
                return Token("$END", "", end, end_pos=end)
            except UnexpectedCharacters:
                self._strange()
                continue
            if token.type == "_NL" and (self.start == "expression" or (self.opens and self.opens[-1].type != "LBRACE")):
                continue
            return token

    def _lex(self) -> Token:
        try:
            token: Token = self.lexers[self.state.state_stack[-1]].next_token(self.lexer_state)
        except UnexpectedCharacters:  # known in another place of the grammar, or nowhere
            token = self.root.next_token(self.lexer_state)
        return token

    def _took(self, token: Token) -> None:
        self.previous = token
        self.quiet = self.quiet and token.type in ("LBRACE", "RBRACE", "BROKEN")
        if token.type in OPENERS:
            self.opens.append(token)
            if len(self.opens) > MAX_DEPTH:
                self._report(complaints.too_deep(self.source, token, MAX_DEPTH))
                raise _Stop
        elif token.type in CLOSERS:
            self.opens.pop()
        elif token.type in ("STRING", "NUMBER", "QUANTITY"):
            for problem in complaints.literal(self.source, token):
                self._report(problem)

    def _closes(self, token: Token) -> bool:
        """Whether a closing bracket has an opening one; one that has none is reported and left out."""
        wanted = CLOSERS[token.type]
        if any(opened.type == wanted for opened in self._same_block(token)):
            return True
        self._report(complaints.unmatched(self.source, token, self.opens[-1] if self.opens else None))
        run = _RUN[token.type].match(self.source.text, token.start_pos or 0)
        self.counter.char_pos = run.end() if run is not None else self.counter.char_pos
        return False

    def _same_block(self, token: Token) -> list[Token]:
        """The open brackets that `token` may close: a `)` can't reach over a `{`."""
        if token.type == "RBRACE":
            return self.opens
        last = max((i for i, opened in enumerate(self.opens) if opened.type == "LBRACE"), default=-1)
        return self.opens[last + 1:]

    def _report(self, problem: Diagnostic) -> None:
        if self.quiet and problem.code in ("FXC0004", "FXC0006"):
            return
        self.quiet = True
        self.sink.items.append(problem)
        if len(self.sink.items) >= MAX_ERRORS:
            self.sink.items.append(complaints.too_many(MAX_ERRORS))
            raise _Stop

    def _strange(self) -> None:
        """Report characters that begin no token, and step over them."""
        text, start = self.source.text, self.counter.char_pos
        quoted = _QUOTED.match(text, start)
        if quoted is not None:
            self.counter.char_pos = quoted.end()
            self._report(complaints.wrong_quotes(self.source, start, quoted.end()))
            self.pending = Token("STRING", f'"{quoted.group(1)}"', start, end_pos=quoted.end())
            return
        if text[start] == '"' or text.startswith('re"', start):
            end = text.find("\n", start)
            self.counter.char_pos = end = len(text) if end < 0 else end
            self._report(complaints.unterminated(self.source, start, end))
            self._drop(Token("STRING", text[start:end], start, end_pos=end), reported=True)
            return
        match = _STRANGE.match(text, start)
        assert match is not None
        end = match.end()
        while end < len(text) and (text[end].isalnum() or text[end] == "_") and match.group()[-1].isalpha():
            end += 1  # the rest of a word such as `größe`
        while match.group()[0] not in "\n" and end < len(text) and text[end] == match.group()[0]:
            end += 1
        self.counter.char_pos = end
        if self.previous is not None and self.previous.end_pos == start and text[start].isalpha():
            self.broken.add(str(self.previous))
        self._report(complaints.strange(self.source, start, end))

    def _recover(self, token: Token) -> None:
        opened = self.opens[-1] if self.opens else None
        if opened is not None and opened.type != "LBRACE" and self._has_newline(opened, token):
            self._report(complaints.unclosed(self.source, opened))
            end = self.source.text.find("\n", opened.start_pos)
            self._drop(Token("$UNCLOSED", "", end, end_pos=end), reported=True)
            return
        self._drop(token, reported=False)

    def _has_newline(self, first: Token, last: Token) -> bool:
        return "\n" in self.source.text[first.start_pos:last.start_pos]

    def _drop(self, token: Token, *, reported: bool) -> None:
        """Give up the statement at `token`, and set the reader to go on behind it."""
        complete = not reported and self._accepts("_NL", "BROKEN")
        if not reported:
            problem = complaints.unexpected(self.source, token, self._expected(), self.previous, self.first, self.opens)
            complete = complete and problem.code not in complaints.SPOILT
            self._report(problem)
        if self.start == "expression":
            raise _Stop
        if complete:
            self.state.feed_token(Token("_NL", "\n", token.start_pos))
            self.opens = [opened for opened in self.opens if opened.type == "LBRACE"]
            self.statement = token.start_pos or 0
            if token.value in complaints.STATEMENT_WORDS:
                self.counter.char_pos = token.start_pos or 0
                return
        else:
            while not self._accepts("BROKEN"):
                self.state.state_stack.pop()
                self.state.value_stack.pop()
            self.opens = [value for value in self.state.value_stack if isinstance(value, Token)
                          and value.type in OPENERS]
        end = self._sync(token.start_pos or 0)
        self.broken.update(_WORD.findall(self.source.text[self.statement:end]))
        self.state.feed_token(Token("BROKEN", "", self.statement, end_pos=max(end, self.statement)))
        self.counter.char_pos = end
        self.previous = None

    def _sync(self, start: int) -> int:
        """Where reading goes on: the end of the line, or a brace before it; in a block on one line a comma too."""
        text = self.source.text
        one_line = bool(self.opens) and "\n" not in text[self.opens[-1].start_pos:start]
        depth = 0
        for match in _SKIP.finditer(text, start):
            sign = match.group()
            if sign in ("\n", "{", "}") or (sign == "," and one_line and depth <= 0):
                return match.start()
            depth += (sign in "([") - (sign in ")]")
        return len(text)

    def _expected(self) -> set[str]:
        """The terminals the parser would take now. A table entry alone may only lead to a reduction that then fails."""
        return {name for name in self.states[self.state.state_stack[-1]] if name.lstrip("_$").isupper()
                and name != "BROKEN" and self._accepts(name)}

    def _accepts(self, *names: str) -> bool:
        """Whether the parser would take tokens of these types now, one after the other."""
        stack = list(self.state.state_stack)
        return all(self._shift(stack, name) for name in names)

    def _shift(self, stack: list[int], name: str) -> bool:
        """Do to `stack` what the parser would do for a token of type `name`; False where it has no place."""
        while True:
            entry = self.states[stack[-1]].get(name)
            if entry is None:
                return False
            action, argument = entry
            if action.name == "Shift":
                stack.append(argument)
                return True
            if len(argument.expansion):
                del stack[-len(argument.expansion):]
            stack.append(self.states[stack[-1]][argument.origin.name][1])
            if stack[-1] == self.state.parse_conf.end_state:
                return name == "$END"

    def _finish(self, end: Token) -> Any:
        """The tree at the end of the text, with open blocks closed so that what was read is kept."""
        if self.start == "expression":
            if self._accepts("$END"):
                return self.state.feed_token(end, is_end=True)
            self._report(complaints.unexpected(self.source, end, self._expected(), self.previous, self.first,
                                               self.opens))
            return None
        if not self._accepts("$END") or self.opens:
            opened = self.opens[-1] if self.opens else None
            if opened is not None:
                self._report(complaints.unclosed(self.source, opened))
                self._drop(end, reported=True)
            else:
                self._drop(end, reported=False)
            for opened in reversed(self.opens):
                self.state.feed_token(Token("RBRACE", "", opened.start_pos, end_pos=len(self.source.text)))
        return self.state.feed_token(end, is_end=True)
