"""The command line's entry point, and the commands that load no torch: `check`, `fmt`, `explain CODE`.

Exit codes: 0 all is well, 1 there are errors (they are printed), 2 the command line itself is wrong. `fxcompress check
FILE...`
and `fxcompress fmt FILE...` without options need no option parser: they start at once, where typer (in `app.py`) takes
more
time to load than a policy takes to check.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

from .diagnostics import Diagnostic, FxcError, nearest
from .policy.check import check_source
from .policy.format import format_policy
from .policy.library import decode, read_source
from .render import RENDERERS, print_text
from .source import Source


def _read(path: Path) -> Source:
    return decode(sys.stdin.buffer.read(), "<stdin>") if str(path) == "-" else read_source(path)


def check_files(paths: Sequence[Path], params: Mapping[str, object] | None = None, form: str = "text") -> int:
    """Print every mistake in the texts of policies, as text to stderr or as `json` or `sarif` to stdout. The exit
    code."""
    found: list[Diagnostic] = []
    for path in paths:
        try:
            found += check_source(_read(path), params).diagnostics
        except FxcError as error:
            found += error.diagnostics
    errors = sum(item.severity == "error" for item in found)
    if form == "text":
        print_text(found)
        gap = "\n" if found else ""
        sys.stderr.write(f"{gap}{_count(len(paths), 'file')} checked: {_count(errors, 'error')}, "
                         f"{_count(len(found) - errors, 'warning')}\n")
    else:
        sys.stdout.write(RENDERERS[form](found))
    return 1 if errors else 0


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def format_files(paths: Sequence[Path], *, check: bool = False) -> int:
    """Bring policies into the one layout, in place; with `check` only say which would change. The exit code."""
    failed = False
    for path in paths:
        try:
            source = _read(path)
            text = format_policy(source.text, source.name)
        except FxcError as error:
            print_text(error.diagnostics)
            failed = True
            continue
        if str(path) == "-" and not check:
            sys.stdout.write(text)
        elif text != source.text or (str(path) != "-" and path.read_bytes() != text.encode()):
            failed = failed or check
            sys.stderr.write(f"{'would change' if check else 'formatted'} {path}\n")
            if not check:
                _write(path, text)
    return 1 if failed else 0


def _write(path: Path, text: str) -> None:
    """Replace a file at once, so that a killed process leaves the old text or the new one, whole."""
    target = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(name, target.stat().st_mode & 0o7777)
        os.replace(name, target)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def code_page(code: str) -> str:
    """The page of a diagnostic code. Raises FxcError for an unknown one."""
    wanted = code.upper()
    folder = files("fxcompress") / "codes"
    if re.fullmatch(r"FXC\d{4}", wanted) and (folder / f"{wanted}.md").is_file():
        return (folder / f"{wanted}.md").read_text(encoding="utf-8")
    known = sorted(entry.name.removesuffix(".md") for entry in folder.iterdir() if entry.name.endswith(".md"))
    near = nearest(wanted, known, 1)
    raise FxcError([Diagnostic("FXC0700", f"there is no diagnostic code `{code}`",
                               notes=("for a layer of an artifact, name the layer too: `fxcompress explain DIR LAYER`",
                                      ),
                               help=f"did you mean `{near[0]}`?" if near else "codes are written as in `FXC0105`")])


_PLAIN: Mapping[str, Callable[[Sequence[Path]], int]] = {"check": check_files, "fmt": format_files}


def run(arguments: Sequence[str]) -> NoReturn:
    """Run one command line, without the program's name. Raises SystemExit with the exit code, and FxcError."""
    command, *rest = arguments or [""]
    if command in _PLAIN and rest and not any(argument.startswith("-") for argument in rest):
        sys.exit(_PLAIN[command]([Path(argument) for argument in rest]))
    from .app import app

    sys.exit(app(list(arguments), prog_name="fxcompress"))


def main() -> None:
    """The entry point: errors that users can mend are printed, and exit with 1."""
    try:
        run(sys.argv[1:])
    except FxcError as error:
        print_text(error.diagnostics)
        sys.exit(1)


if __name__ == "__main__":
    main()
