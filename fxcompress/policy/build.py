"""From the parser's reductions to the syntax tree. Called while parsing, bottom up, so nothing here recurses."""

# ruff: noqa: D102 -- the methods are the rules of the grammar, where they are described
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lark import Token

from ..source import Source, Span
from . import ast

ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}
Child = Any  # a Token or a node: what a reduction is given depends on its rule


def place(token: Token) -> tuple[int, int]:
    """Where a token stands. Ours all have a place; Lark's class allows for tokens without."""
    start = token.start_pos or 0
    return start, start if token.end_pos is None else token.end_pos


class Builder:
    """One method for each rule of `grammar/policy.lark` without a `_` before its name; helpers bear no rule's name.

    `source` is set for the text that is being parsed.
    """

    source: Source

    def _name(self, token: Token) -> ast.Name:
        return ast.Name(self._at(token), str(token))

    def _at(self, token: Token) -> Span:
        return Span(self.source, *place(token))

    def _span(self, children: Sequence[Child]) -> Span:
        first, last = children[0], children[-1]
        start: int = place(first)[0] if isinstance(first, Token) else first.span.start
        end: int = place(last)[1] if isinstance(last, Token) else last.span.end
        return Span(self.source, start, end)

    # Statements

    def start(self, items: list[Child]) -> ast.File:
        return ast.File(self.source, tuple(items))

    def expression(self, items: list[Child]) -> ast.Expr:
        node: ast.Expr = items[0]
        return node

    def block(self, items: list[Child]) -> ast.Block:
        return ast.Block(self._span(items), tuple(items[1:-1]))

    def use(self, items: list[Child]) -> ast.Use:
        names = tuple(self._name(item) for item in items[3:-1]) if len(items) > 2 else None
        return ast.Use(self._span(items), self.string([items[1]]), names)

    def policy(self, items: list[Child]) -> ast.PolicyDecl:
        parameters = items[2] if len(items) > 3 else ()
        return ast.PolicyDecl(self._span(items), self._name(items[1]), parameters, items[-1])

    def params(self, items: list[Child]) -> tuple[ast.Parameter, ...]:
        return tuple(items[1:-1])

    def param(self, items: list[Child]) -> ast.Parameter:
        default = items[4] if len(items) > 3 else None
        return ast.Parameter(self._span(items), self._name(items[0]), self._name(items[2]), default)

    def preset(self, items: list[Child]) -> ast.PresetDecl:
        return ast.PresetDecl(self._span(items), self._name(items[1]), self._name(items[3]), items[4])

    def let(self, items: list[Child]) -> ast.Let:
        return ast.Let(self._span(items), self._name(items[1]), items[3])

    def target(self, items: list[Child]) -> ast.Target:
        return ast.Target(self._span(items), self._name(items[1]))

    def input(self, items: list[Child]) -> ast.Input:
        dims = tuple(self._name(item) if item.type == "NAME" else self.number([item]) for item in items[5:-1])
        return ast.Input(self._span(items), self._name(items[1]), self._name(items[3]), dims)

    def phase(self, items: list[Child]) -> ast.Phase:
        return ast.Phase(self._span(items), self._name(items[1]), tuple(items[2:-1]), items[-1])

    def over(self, items: list[Child]) -> ast.Over:
        word, start, end = (items[1], items[2], items[4]) if len(items) == 5 else (items[5], items[1], items[3])
        return ast.Over(self._span(items), self._name(word), self._limit(start), self._limit(end))

    def _limit(self, token: Token) -> ast.Number | ast.Quantity:
        return self.number([token]) if token.type == "NUMBER" else self.quantity([token])

    def after(self, items: list[Child]) -> ast.After:
        return ast.After(self._span(items), tuple(self._name(item) for item in items[1:]))

    def action(self, items: list[Child]) -> ast.Action:
        modifiers = [item for item in items if isinstance(item, Token) and item.type != "NAME"]
        verb, *rest = items[len(modifiers):]
        body = rest.pop() if rest and isinstance(rest[-1], ast.Block) else None
        operand = rest.pop(0) if rest and not isinstance(rest[0], ast.Clause) else None
        head = self._span([verb, operand]) if operand is not None else self._at(verb)
        return ast.Action(self._span(items), tuple(self._name(item) for item in modifiers), self._name(verb), operand,
                          tuple(rest), body, head)

    def as_clause(self, items: list[Child]) -> ast.Clause:
        return ast.Clause(self._span(items), "as", self._name(items[1]))

    def from_clause(self, items: list[Child]) -> ast.Clause:
        return ast.Clause(self._span(items), "from", self._name(items[1]))

    def budget(self, items: list[Child]) -> ast.Budget:
        return ast.Budget(self._span(items), items[1])

    def expect(self, items: list[Child]) -> ast.Expect:
        why = self.string([items[3]]) if len(items) > 2 else None
        return ast.Expect(self._span(items), items[1], why)

    def pair(self, items: list[Child]) -> ast.Pair:
        body = items[4] if len(items) > 4 else None
        return ast.Pair(self._span(items), self._end(items[1]), self._end(items[3]), body)

    def _end(self, token: Token) -> ast.Name | ast.String:
        return self._name(token) if token.type == "NAME" else self.string([token])

    def setting(self, items: list[Child]) -> ast.Setting:
        return ast.Setting(self._span(items), items[0], items[2])

    def key(self, items: list[Child]) -> ast.Name:
        return self._name(items[0])

    def broken(self, items: list[Child]) -> ast.Broken:
        return ast.Broken(self._span(items), items[1] if len(items) > 1 else None)

    # Expressions

    def name(self, items: list[Child]) -> ast.Name:
        return self._name(items[0])

    def number(self, items: list[Child]) -> ast.Number:
        return ast.Number(self._span(items), _number(str(items[-1]), negative=len(items) > 1))

    def quantity(self, items: list[Child]) -> ast.Quantity:
        digits, unit = split_quantity(str(items[-1]))
        return ast.Quantity(self._span(items), _number(digits, negative=len(items) > 1), unit)

    def ratio(self, items: list[Child]) -> ast.Ratio:
        return ast.Ratio(self._span(items), _number(str(items[0])), _number(str(items[2])))

    def string(self, items: list[Child]) -> ast.String:
        text = str(items[0])[1:-1]
        return ast.String(self._span(items), _unescape(text) if "\\" in text else text)

    def regex(self, items: list[Child]) -> ast.Regex:
        return ast.Regex(self._span(items), str(items[0])[3:-1].replace('\\"', '"'))

    def star(self, items: list[Child]) -> ast.Star:
        return ast.Star(self._span(items))

    def call(self, items: list[Child]) -> ast.Call:
        return ast.Call(self._span(items), self._name(items[0]), tuple(items[2:-1]))

    def keyword(self, items: list[Child]) -> ast.Keyword:
        return ast.Keyword(self._span(items), self._name(items[0]), items[2])

    def rate(self, items: list[Child]) -> ast.Rate:
        by, amount, per, unit = items
        return ast.Rate(self._span(items), self._name(by), self._limit(amount), self._name(per), self._name(unit))

    def group(self, items: list[Child]) -> ast.Group:
        return ast.Group(self._span(items), items[1])

    def where(self, items: list[Child]) -> ast.Where:
        return ast.Where(self._span(items), items[0], tuple(items[2:-1]))

    def share(self, items: list[Child]) -> ast.Share:
        return ast.Share(self._span(items), items[0], self._name(items[2]))

    def set_of(self, items: list[Child]) -> ast.SetOf:
        operators = tuple(ast.Operator(self._at(item), str(item)) for item in items[1::2])
        return ast.SetOf(self._span(items), tuple(items[::2]), operators)

    def flow(self, items: list[Child]) -> ast.FlowOf:
        return ast.FlowOf(self._span(items), tuple(items[::2]))

    def ramp(self, items: list[Child]) -> ast.Arrow:
        return ast.Arrow(self._span(items), items[0], items[2])

    def compare(self, items: list[Child]) -> ast.Compare:
        operator = ast.Operator(self._at(items[1]), str(items[1]))
        return ast.Compare(self._span(items), items[0], operator, items[2])


def split_quantity(text: str) -> tuple[str, str]:
    """The digits and the unit of a quantity's text: `6 MiB` -> `6`, `MiB`."""
    digits = text.rstrip("%abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ").rstrip(" \t")
    return digits, text[len(digits):].strip(" \t")


def _number(digits: str, *, negative: bool = False) -> int | float:
    """An int where the digits say so, else a float; the parser has reported numbers that are too large."""
    number: int | float = int(digits) if digits.isdecimal() and len(digits) <= 15 else float(digits)
    return -number if negative else number


def _unescape(text: str) -> str:
    out, escaped = [], False
    for char in text:
        if escaped:
            out.append(ESCAPES.get(char, "\\" + char))  # an unknown escape is reported by the parser
        elif char != "\\":
            out.append(char)
        escaped = char == "\\" and not escaped
    return "".join(out)
