"""The parser's tables: made from `grammar/policy.lark`, kept beside it as JSON, loaded without running anything.

`python -m fxcompress.grammar` writes `grammar/policy.json` anew; a test fails while it is not current. Lark's own
cache is pickles in the folder for temporary files, where any user of the machine can put one; JSON can only be data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from typing import Any

import lark
from lark import Lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

GRAMMAR, TABLES = "policy.lark", "policy.json"
STARTS = ("start", "expression")


def grammar_text() -> str:
    """The grammar as it is installed."""
    return (files("fxcompress.grammar") / GRAMMAR).read_text(encoding="utf-8")


def build(*, strict: bool = False, transformer: Any = None) -> Lark:
    """The parser made from the grammar, in about 0.2 s. `strict` refuses any ambiguity (it needs `interegular`)."""
    return Lark(grammar_text(), parser="lalr", lexer="contextual", start=list(STARTS), maybe_placeholders=False,
                strict=strict, transformer=transformer)


def encode(parser: Lark) -> str:
    """The tables of `parser` as JSON, with what they were made from."""
    data, memo = parser.memo_serialize([TerminalDef, Rule])
    tables = {"grammar": _digest(grammar_text()), "lark": lark.__version__, "data": _pack(data), "memo": _pack(memo)}
    return json.dumps(tables, separators=(",", ":"), sort_keys=True) + "\n"


def load(transformer: Any) -> Lark:
    """The parser from the stored tables; made anew when they are of another grammar or another version of Lark."""
    stored = json.loads((files("fxcompress.grammar") / TABLES).read_text(encoding="utf-8"))
    if stored["lark"] != lark.__version__ or stored["grammar"] != _digest(grammar_text()):
        return build(transformer=transformer)
    parser = Lark.__new__(Lark)
    tables = {"data": _unpack(stored["data"]), "memo": _unpack(stored["memo"])}
    return parser._load(tables, transformer=transformer)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _pack(value: Any) -> Any:
    """`value` with its integer keys made into lists of pairs: JSON's keys are texts."""
    if isinstance(value, Mapping):
        if any(isinstance(key, int) for key in value):
            return {"#": [[key, _pack(item)] for key, item in value.items()]}
        return {key: _pack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_pack(item) for item in value]
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if "#" in value:
            return {key: _unpack(item) for key, item in value["#"]}
        return {key: _unpack(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    return value
