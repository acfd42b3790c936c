"""The fixed words of the language, and how messages call the parts of its grammar."""

from __future__ import annotations

STATEMENTS = ("use", "policy", "preset", "let", "target", "input", "phase", "budget", "expect", "pair")
MODIFIERS = ("override", "optional")
CLAUSES = ("over", "after", "as", "from", "for", "of", "else")
KEYWORDS = (*STATEMENTS, *MODIFIERS, *CLAUSES)

#: words that can't name a `let`, a parameter or a preset: they would never be read as that name
RESERVED = frozenset({*KEYWORDS, "true", "false", "output"})

OUTPUT, TARGETS = "output", "targets"  # ends of a pair: what a model gives, and the labels it is trained on
ORIGINAL = "original"  # the teacher that needs no parameter: the model as it was captured, before any rewrite

UNITS = ("%", "k", "M", "G", "B", "kB", "MB", "GB", "KiB", "MiB", "GiB", "bits", "steps", "epochs", "samples", "us",
         "ms", "s")

#: what each terminal of the grammar is called in messages; keywords and signs stand for themselves
TERMINALS = {
    "NAME": "a name", "NUMBER": "a number", "QUANTITY": "a number with a unit", "STRING": 'a text in `"`',
    "REGEX": 're"..."', "STAR": "`*`", "_NL": "the end of the line", "$END": "the end of the file", "_COMMA_SEP": "`,`",
    "LBRACE": "`{`", "RBRACE": "`}`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "COLON": "`:`",
    "EQUAL": "`=`", "DOTS": "`..`", "PIPE": "`|`", "AMP": "`&`", "MINUS": "`-`", "FLOW": "`>>`", "ARROW": "`->`",
    "PAIRED": "`<-`", "CMP": "a comparison",
}
TERMINALS.update({word.upper(): f"`{word}`" for word in KEYWORDS})

VALUE_STARTS = frozenset({"NAME", "NUMBER", "QUANTITY", "STRING", "REGEX", "STAR", "LPAR", "MINUS"})
BINARY = frozenset({"PIPE", "AMP", "MINUS", "FLOW", "ARROW", "CMP", "OF", "LSQB"})

#: characters that look like one of ours, from word processors and other languages
LOOKALIKES = {
    "“": '"', "”": '"', "„": '"', "‟": '"', "'": '"', "‘": '"', "’": '"', "`": '"', "–": "-", "—": "-", "−": "-",
    "≤": "<=", "≥": ">=", "≠": "!=", "→": "->", "←": "<-", "»": ">>", "…": "..", "×": "*", "∗": "*", "∪": "|",
    "∩": "&", "∖": "-", "％": "%", "：": ":", "，": ",", "（": "(", "）": ")", "\u00a0": " ", ";": "a new line",
    "/": "`#` for a comment", "+": "`|` to join selections", "!": "`-` to take a selection away", "\ufeff": "nothing",
}


def listed(items: list[str], last: str = "or") -> str:
    """`a, b or c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def quoted(names: object, last: str = "or") -> str:
    """Names as `` `a`, `b` or `c` ``."""
    return listed([f"`{name}`" for name in names], last)  # type: ignore[attr-defined]
