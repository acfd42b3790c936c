"""The generated documents say what the code says; the examples in them are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fxcompress import docs
from fxcompress.passbase import VERBS
from fxcompress.policy import check_source, format_policy
from fxcompress.policy.library import Library
from fxcompress.policy.parsing import parse_file
from fxcompress.source import Source

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", sorted(docs.PAGES))
def test_generated_pages_are_current(page: str, update_golden: bool) -> None:
    path = ROOT / "docs" / page
    if update_golden:
        path.write_text(docs.PAGES[page](), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == docs.PAGES[page](), "run `python -m fxcompress.docs`"


def test_examples_in_the_reference_check() -> None:
    text = docs.language()
    examples = re.findall(r"^```fxc\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        assert check_source(Source("example", example)).diagnostics == ()


def test_reference_names_every_parameter() -> None:
    text = docs.language()
    for verb in ("mask", "remove"):
        for parameter in VERBS[verb].parameters():
            assert f"| `{parameter.name}` |" in text


def test_standard_library_checks_and_is_used_by_name() -> None:
    folder = ROOT / "fxcompress" / "policy" / "std"
    for path in folder.glob("*.fxc"):
        text = path.read_text(encoding="utf-8")
        assert check_source(Source(str(path), text)).diagnostics == ()
        assert format_policy(text) == text
    uses = parse_file(Source("p", 'use "std/prune.fxc"')).file.items
    from fxcompress.diagnostics import Sink

    presets = Library(Sink()).use(uses[0], Source("p", ""))  # type: ignore[arg-type]
    verbs = {preset.verb.text for preset in presets}
    assert verbs == {"mask", "remove"} and len(presets) >= 8
    for preset in presets:
        what = "channels(conv2d)" if preset.verb.text == "remove" else "conv2d"
        action = f"{preset.verb.text} {what} as {preset.name.text}"
        text = f'use "std/prune.fxc"\npolicy p {{\n    phase a over epochs 0..9 {{ {action} }}\n}}'
        assert check_source(Source("p", text)).diagnostics == (), preset.name.text
