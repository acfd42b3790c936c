"""The command line, as a process; and what the commands for models are called with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fxcompress import cli
from fxcompress.diagnostics import FxcError

GOOD = "policy p {\n    mask conv2d { sparsity = 50% }\n}\n"
BAD = "policy p {\n    mask conv2d { sparsity = 50 }\n}\n"
WARNED = "policy p {\n    let a = linear\n    mask conv2d { sparsity = 50% }\n}\n"


def run(*arguments: str, stdin: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fxcompress", *arguments], check=False, capture_output=True, text=True,
                          input=stdin, cwd=cwd, timeout=120, encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, text in (("good", GOOD), ("bad", BAD), ("warned", WARNED)):
        (tmp_path / f"{name}.fxc").write_text(text, encoding="utf-8")
    return tmp_path


def test_check(files: Path) -> None:
    good = run("check", "good.fxc", cwd=files)
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "1 file checked: no errors, no warnings\n")
    warned = run("check", "warned.fxc", "good.fxc", cwd=files)
    assert warned.returncode == 0 and "warning[FXC0110]" in warned.stderr
    assert warned.stderr.endswith("\n\n2 files checked: no errors, 1 warning\n")
    bad = run("check", "good.fxc", "bad.fxc", "missing.fxc", cwd=files)
    assert bad.returncode == 1 and "--> bad.fxc:2:30" in bad.stderr and "error[FXC0016]: `missing.fxc`" in bad.stderr
    assert bad.stderr.endswith("3 files checked: 2 errors, no warnings\n")


def test_check_for_tools(files: Path) -> None:
    found = run("check", "bad.fxc", "--format", "json", cwd=files)
    assert found.returncode == 1 and [item["code"] for item in json.loads(found.stdout)] == ["FXC0105"]
    sarif = run("check", "--format=sarif", "bad.fxc", cwd=files)
    assert sarif.returncode == 1 and json.loads(sarif.stdout)["runs"][0]["results"][0]["ruleId"] == "FXC0105"
    assert json.loads(run("check", "good.fxc", "--format", "json", cwd=files).stdout) == []


def test_check_reads_stdin() -> None:
    assert run("check", "-", stdin=GOOD).returncode == 0
    bad = run("check", "-", stdin=BAD)
    assert bad.returncode == 1 and "--> <stdin>:2:30" in bad.stderr


def test_check_with_parameters(files: Path) -> None:
    (files / "p.fxc").write_text("policy p(a: percent) {\n    mask conv2d { sparsity = a }\n}\n")
    assert run("check", "p.fxc", cwd=files).returncode == 0
    assert run("check", "p.fxc", "--param", "a=50%", cwd=files).returncode == 0
    assert "FXC0106" in run("check", "p.fxc", "--param", "a=150%", cwd=files).stderr
    assert "FXC0133" in run("check", "p.fxc", "--param", "b=1", cwd=files).stderr


def test_usage_errors(files: Path) -> None:
    for arguments in (["check"], ["check", "--frmat", "json", "good.fxc"], ["chek", "good.fxc"], ["check", "good.fxc",
                      "--format", "yaml"], ["plan", "good.fxc"], ["check", "good.fxc", "--param", "a"]):
        found = run(*arguments, cwd=files)
        assert found.returncode == 2 and "Usage:" in found.stderr, arguments
    assert run("--help").returncode == 0


def test_fmt(files: Path) -> None:
    ugly = files / "ugly.fxc"
    ugly.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("    ", "").replace("\n", "\r\n").encode())
    ugly.chmod(0o640)
    checked = run("fmt", "--check", "ugly.fxc", "good.fxc", cwd=files)
    assert (checked.returncode, checked.stderr) == (1, "would change ugly.fxc\n")
    assert run("fmt", "ugly.fxc", "good.fxc", cwd=files).returncode == 0
    assert ugly.read_bytes() == GOOD.encode() and ugly.stat().st_mode & 0o777 == 0o640
    assert run("fmt", "--check", "ugly.fxc", cwd=files).returncode == 0
    assert sorted(path.name for path in files.iterdir()) == ["bad.fxc", "good.fxc", "ugly.fxc", "warned.fxc"]
    assert run("fmt", "-", stdin="policy p{}").stdout == "policy p {}\n"


def test_fmt_leaves_broken_files_alone(files: Path) -> None:
    (files / "broken.fxc").write_text("policy p {")
    found = run("fmt", "broken.fxc", "bad.fxc", cwd=files)
    assert found.returncode == 1 and "FXC0005" in found.stderr
    assert (files / "broken.fxc").read_text() == "policy p {"


def test_verbs() -> None:
    assert [line.split()[0] for line in run("verbs").stdout.splitlines()[:4]] == ["distill", "mask", "quantize",
                                                                             "remove"]
    assert "sparsity: a percentage from 0% to 100% or a ramp" in run("verbs", "mask").stdout
    unknown = run("verbs", "maks")
    assert unknown.returncode == 1 and "did you mean `mask`?" in unknown.stderr


def test_explain() -> None:
    assert run("explain", "FXC0105").stdout.startswith("# FXC0105: ")
    assert run("explain", "fxc0105").returncode == 0
    unknown = run("explain", "FXC9999")
    assert unknown.returncode == 1 and "FXC0700" in unknown.stderr


LOADED = """
import sys
from fxcompress import cli

for line in {lines}:
    try:
        cli.run(line)
    except SystemExit as end:
        assert not end.code
sys.exit(" ".join({heavy} & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize(("lines", "heavy"), [
    ([["check", "good.fxc", "warned.fxc"], ["fmt", "good.fxc"]], {"torch", "numpy", "scipy", "rich", "typer"}),
    ([["verbs"], ["verbs", "remove"], ["explain", "FXC0105"], ["check", "--format", "json", "good.fxc"]], {"torch"}),
])
def test_light_commands_load_no_torch(files: Path, lines: list[list[str]], heavy: set[str]) -> None:
    code = LOADED.format(lines=lines, heavy=heavy)
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=files)
    assert found.returncode == 0, found.stderr


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[object, ...]:
    """What a command line calls in `fxcompress.commands`, whose functions are replaced by ones that tell."""
    import fxcompress

    calls: list[tuple[object, ...]] = []
    fake = ModuleType("fxcompress.commands")
    for name in ("check_model", "plan", "compile", "inspect", "diff", "explain_layer"):
        setattr(fake, name, lambda *args, name=name: calls.append((name, *args)) or 7)
    monkeypatch.setitem(sys.modules, "fxcompress.commands", fake)
    monkeypatch.setattr(fxcompress, "commands", fake, raising=False)
    with pytest.raises(SystemExit) as end:
        cli.run(arguments)
    assert end.value.code == 7, "the exit code is the command's"
    [call] = calls
    return call


def test_commands_for_models(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = Path("p.fxc"), Path("q.fxc")
    assert called(monkeypatch, "check", "p.fxc", "q.fxc", "--model", "torchvision:resnet18") == (
        "check_model", [p, q], "torchvision:resnet18", {}, "text", None)
    assert called(monkeypatch, "plan", "p.fxc", "--model", "m:f", "--weights", "w.safetensors", "-o", "plan.json",
                  "--param",
                  "a=50%", "--param", "b=c=d", "--format", "json") == (
        "plan", p, "m:f", Path("w.safetensors"), {"a": "50%", "b": "c=d"}, Path("plan.json"), "json", False, None)
    assert called(monkeypatch, "plan", "p.fxc", "--model", "m:f", "--teacher", "m:g")[-1] == "m:g"
    assert called(monkeypatch, "compile", "p.fxc", "--model", "m:f", "-o", "out", "--plan", "plan.json") == (
        "compile", p, "m:f", None, {}, Path("out"), Path("plan.json"), None, None)
    assert called(monkeypatch, "compile", "p.fxc", "--model", "m:f", "-o", "out", "--calibration", "x.npy") == (
        "compile", p, "m:f", None, {}, Path("out"), None, "x.npy", None)
    assert called(monkeypatch, "inspect", "out", "--format", "json") == ("inspect", Path("out"), "json", None)
    assert called(monkeypatch, "inspect", "out", "--plots", "pictures") == (
        "inspect", Path("out"), "text", Path("pictures"))
    assert called(monkeypatch, "diff", "a", "b") == ("diff", Path("a"), Path("b"), "text")
    assert called(monkeypatch, "explain", "out", "layer1.0.conv1") == (
        "explain_layer", Path("out"), "layer1.0.conv1", "text")


def test_errors_of_commands_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_arguments: object) -> None:
        cli.code_page("FXC9999")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and capsys.readouterr().err.startswith("error[FXC0700]")
    with pytest.raises(FxcError):
        fail(None)
