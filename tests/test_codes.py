"""The pages of the diagnostics are tests: every mistake on them is made, and must give exactly the message below it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fxcompress.diagnostics import Diagnostic, FxcError
from fxcompress.policy import check_source
from fxcompress.render import render_text
from fxcompress.source import Source

if TYPE_CHECKING:
    from fxcompress.graph.captured import Captured
    from fxcompress.policy.model import InputSpec

ROOT = Path(__file__).parent.parent
CODES = ROOT / "fxcompress" / "codes"
BLOCKS = re.compile(r"^```(fxc|python)([^\n]*)\n(.*?)^```\n+```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r"# (FXC\d{4}): \S.*\n\n\S")
CODE = re.compile(r"FXC\d{4}")


@dataclass(frozen=True)
class Mistake:
    page: Path
    number: int
    language: str
    options: dict[str, str]
    text: str
    shown: str

    @property
    def name(self) -> str:
        return f"{self.page.stem}-{self.number}"


def mistakes() -> Iterator[Mistake]:
    for page in sorted(CODES.glob("*.md")):
        for number, match in enumerate(BLOCKS.finditer(page.read_text(encoding="utf-8")), 1):
            language, options, text, shown = match.groups()
            yield Mistake(page, number, language, dict(item.split("=", 1) for item in options.split()), text, shown)


ALL = list(mistakes())


def found(mistake: Mistake) -> tuple[Diagnostic, ...]:
    """What the mistake gives, at the level that the page asks for."""
    if mistake.language == "python":
        with pytest.raises(FxcError) as error:
            exec(compile(mistake.text, mistake.page.name, "exec"), {"__name__": mistake.page.stem})
        return error.value.diagnostics
    if "model" not in mistake.options:
        return check_source(Source("policy.fxc", mistake.text)).diagnostics
    return bound(mistake)


def bound(mistake: Mistake) -> tuple[Diagnostic, ...]:
    """Of a policy and a model: `level=plan` plans, else the selectors are bound as `check --model` does."""
    from fxcompress.plan import check_model, plan
    from fxcompress.policy import parse

    policy = parse(Source("policy.fxc", mistake.text))
    model, inputs = captured(mistake.options["model"], policy.inputs)
    if mistake.options.get("level") == "plan":
        with pytest.raises(FxcError) as error:
            plan(policy, model, inputs)
        return error.value.diagnostics
    return tuple(check_model(policy, model))


@cache
def captured(spec: str, inputs: tuple[InputSpec, ...]) -> tuple[Captured, object]:
    """The captured model of a SPEC and its example inputs; pages share it, since neither check nor plan changes it."""
    from fxcompress.graph import capture
    from fxcompress.spec import load_spec

    loaded = load_spec(spec, None, inputs)
    return capture(loaded.model, loaded.example_inputs), loaded.example_inputs


@pytest.mark.parametrize("mistake", ALL, ids=lambda mistake: mistake.name)
def test_page(mistake: Mistake, update_golden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    diagnostics = found(mistake)
    assert mistake.page.stem in {item.code for item in diagnostics}, "a page shows its own code"
    shown = render_text(diagnostics)
    if update_golden:
        rewrite(mistake, shown)
    else:
        assert shown == mistake.shown


def rewrite(mistake: Mistake, shown: str) -> None:
    numbers = iter(range(1, len(ALL) + 1))

    def put(match: re.Match[str]) -> str:
        if next(numbers) != mistake.number:
            return match.group()
        return f"{match.group()[:match.start(4) - match.start()]}{shown}```"

    text = mistake.page.read_text(encoding="utf-8")
    mistake.page.write_text(BLOCKS.sub(put, text), encoding="utf-8")


def test_fifty_mistakes_are_shown() -> None:
    assert len(ALL) >= 50


def test_pages_have_a_title_and_a_mistake() -> None:
    shown = {mistake.page for mistake in ALL}
    for page in CODES.glob("*.md"):
        match = TITLE.match(page.read_text(encoding="utf-8"))
        assert match is not None and match.group(1) == page.stem, page
        assert page in shown, f"{page} shows no mistake"


def test_every_code_has_a_page_and_every_page_a_use() -> None:
    used: dict[str, Path] = {}
    for folder in ("fxcompress", "passes"):
        for file in (ROOT / folder).rglob("*.py"):
            used.update(dict.fromkeys(CODE.findall(file.read_text(encoding="utf-8")), file))
    pages = {page.stem for page in CODES.glob("*.md")}
    assert {code: used[code] for code in used.keys() - pages} == {}, "codes without a page"
    assert pages - used.keys() == set(), "pages of codes that nothing raises"


def test_messages_name_a_way_out() -> None:
    for mistake in ALL:
        assert "help: " in mistake.shown, mistake.name
