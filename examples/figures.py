"""What the examples measured, put into their README files: by the scripts, never by hand.

A README has the markers `<!-- figures: begin -->` and `<!-- figures: end -->`; what stands between them is made anew.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

BLOCK = re.compile(r"(?<=<!-- figures: begin -->\n).*?(?=<!-- figures: end -->)", flags=re.S)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is set to the left, the others, which hold numbers, to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def machine() -> str:
    """What a figure was measured on."""
    return (f"torch {torch.__version__.partition('+')[0]} on {platform.machine()}, "
            f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}")


def put(text: str, readme: Path | None) -> None:
    """Print `text`, and write it between the markers of `readme` where one is given. Raises ValueError for a file
    without markers."""
    print(text)
    if readme is None:
        return
    page = readme.read_text(encoding="utf-8")
    if not BLOCK.search(page):
        raise ValueError(f"{readme} has no markers for figures")
    readme.write_text(BLOCK.sub(lambda _: f"{text}\n", page), encoding="utf-8")
