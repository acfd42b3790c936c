"""Plain-text pieces that report, diff and explain share: numbers, columns, safe texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..plan.text import amount
from ..render import clean
from .layers import Layer, Sizes

NO_FIGURE = "-"


def count(number: int) -> str:
    """`11,689,512`."""
    return f"{number:,}"


def macs(number: int) -> str:
    """`1.814 G`."""
    return amount(number)


def size(number: int) -> str:
    """`44.63 MiB`."""
    return amount(number, "B")


def change(before: int, after: int) -> str:
    """How much larger `after` is than `before`: `-57.2%`, `+3.0%`, `=`; empty where that is no number."""
    if before == after:
        return "="
    return f"{(after - before) / before:+.1%}" if before else ""


def ranges(numbers: Sequence[int], limit: int = 24) -> str:
    """Rising whole numbers, neighbours together: `0, 3-7, 12`; those beyond `limit` such pieces are counted."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    shown = [f"{piece[0]}-{piece[-1]}" if len(piece) > 1 else str(piece[0]) for piece in pieces[:limit]]
    rest = sum(map(len, pieces[limit:]))
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")


def sparsity(row: Layer | Sizes) -> str:
    """The share of zeros among the weights: `60.0%`; a dash where there are none or their values aren't known."""
    return NO_FIGURE if row.zeros is None or not row.weights else f"{row.zeros / row.weights:.1%}"


@dataclass(frozen=True)
class Table:
    """A table: a heading, rows of texts, and which columns stand to the right. Texts may come from a stranger's file;
    control characters in them are made visible."""

    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()

    def text(self) -> str:
        """The table in columns of spaces, one line a row, without trailing blanks."""
        lines = [tuple(clean(cell) for cell in row) for row in ((self.heading, *self.rows) if any(self.heading)
                                                               else self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)] if lines else []
        return "".join(self._line(line, widths) + "\n" for line in lines)

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = (cell.rjust(width) if place in self.right else cell.ljust(width)
                  for place, (cell, width) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(padded).rstrip()

    def html(self) -> str:
        """The table as HTML, everything escaped."""
        from html import escape

        def row(cells: Sequence[str], tag: str) -> str:
            inner = "".join(f"<{tag}{' class=n' if place in self.right else ''}>{escape(clean(cell))}</{tag}>"
                            for place, cell in enumerate(cells))
            return f"<tr>{inner}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return f"<table><thead>{row(self.heading, 'th')}</thead><tbody>{body}</tbody></table>"


def totals(before: Sizes | None, after: Sizes) -> Table:
    """Parameters, MACs, bytes and sparsity, before and after."""
    lines: list[tuple[str, Callable[[Sizes], int], Callable[[int], str]]] = [
        ("parameters", lambda s: s.params, count), ("MACs", lambda s: s.macs, macs), ("bytes", lambda s: s.bytes, size)]
    if before is None:
        rows = [(name, show(get(after))) for name, get, show in lines]
        return Table(("", ""), (*rows, ("sparsity", sparsity(after))), frozenset({1}))
    compared = [(name, show(get(before)), show(get(after)), change(get(before), get(after)))
                for name, get, show in lines]
    last = ("sparsity", sparsity(before), sparsity(after), "")
    return Table(("", "before", "after", ""), (*compared, last), frozenset({1, 2, 3}))
