"""README.md is true: its commands and code run, its links lead somewhere, its figures are those of a stored run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import fxcompress

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def policy_folder(folder: Path) -> Path:
    (folder / "policy.fxc").write_text(blocks("fxc")[0], encoding="utf-8")
    return folder


def test_the_policies_are_right_and_formatted() -> None:
    policies = blocks("fxc")
    assert [re.search(r"policy (\w+)", text)[1] for text in policies] == ["slim", "learn"]  # type: ignore[index]
    assert [fxcompress.format_policy(text) for text in policies] == policies
    fxcompress.parse(policies[0])


def test_the_policy_that_learns_fits_its_models(tmp_path: Path) -> None:
    """As the command below it has them; and that command knows its options."""
    (tmp_path / "policy.fxc").write_text(blocks("fxc")[1], encoding="utf-8")
    (command,) = (block.replace("\\\n", " ").split() for block in blocks("sh") if "fxcompress train" in block)
    given = dict(pairwise(command))
    run("fxcompress", "plan", "policy.fxc", "--model", given["--model"], "--teacher", given["--teacher"], cwd=tmp_path)
    helped = run("fxcompress", "train", "--help", cwd=tmp_path)
    assert all(option in helped for option in command if option.startswith("--"))


def test_the_commands_on_top_are_targets() -> None:
    commands = [line.split("#")[0].split() for line in blocks("sh")[0].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    helped = run("make", "help", cwd=ROOT)
    assert all(re.search(rf"^make {target} ", helped, flags=re.M) for _, target in commands)


def test_the_command_lines_run(tmp_path: Path) -> None:
    folder = policy_folder(tmp_path)
    (block,) = (block for block in blocks("sh") if "fxcompress check" in block)
    for line in block.splitlines():
        assert run(*line.partition("#")[0].split(), cwd=folder)
    assert (folder / "out" / "weights.safetensors").exists()


def test_the_plan_shown_is_the_plan(tmp_path: Path, update_golden: bool) -> None:
    folder = policy_folder(tmp_path)
    command, _, shown = blocks("text")[0].partition("\n")
    printed = run(*command.removeprefix("$ ").split(), cwd=folder).strip() + "\n"
    if update_golden:
        (ROOT / "README.md").write_text(README.replace(shown, printed), encoding="utf-8")
    else:
        assert printed == shown


def test_the_python_runs(tmp_path: Path) -> None:
    folder = policy_folder(tmp_path)
    (code,) = blocks("python")
    compared = ("\nx = torch.randn(2, 3, 64, 64)\n"
                "assert torch.equal(module.eval()(x), deployed.eval()(x))\n"
                "from fxcompress.passes import Mask\n"
                f"{one_liner()}\n")
    assert "plan slim" in run(sys.executable, "-c", code + compared, cwd=folder)


def one_liner() -> str:
    (code,) = re.findall(r"`(fxcompress\.passes\.Mask.*?)`", README)
    return str(code)


def test_the_figures_are_those_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    record = json.loads(readme.RECORD.read_text(encoding="utf-8"))
    (shown,) = readme.block("figures").findall(README)
    assert shown == readme.figures(record)
    assert record["before"]["accuracy"] - record["after"]["accuracy"] < 0.01
    assert record["seconds"] < 180


def test_the_tables_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    pages = [(ROOT / page).read_text(encoding="utf-8") for page in readme.PAGES]
    assert all(sum(len(readme.block(name).findall(text)) for text in pages) == 1 for name in readme.TABLES)
    assert [readme.filled(text) for text in pages] == pages


def test_a_table_follows_its_file_and_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    place = tmp_path / "one.csv"
    monkeypatch.setattr(readme, "TABLES", {"one": (place, lambda rows: str(rows[0]["a"]))})
    text = "before\n<!-- one: begin -->\nold\n<!-- one: end -->\nafter\n"
    with pytest.raises(FileNotFoundError, match=r"one\.csv"):
        readme.filled(text)
    place.write_text("a\nnew \\1\n", encoding="utf-8")
    assert readme.filled(text) == "before\n<!-- one: begin -->\nnew \\1\n<!-- one: end -->\nafter\n"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/design.md", "docs/removal.md",
                                  "docs/calibration.md", "docs/adr/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []
