"""`python -m fxcompress.grammar`: write the parser's tables anew after a change of the grammar."""

from pathlib import Path

from fxcompress.policy import tables

Path(__file__).with_name(tables.TABLES).write_text(tables.encode(tables.build()), encoding="utf-8")
