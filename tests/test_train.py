"""`fxcompress train` and `Trainer`: what is trained, in which order, what is written and what is refused."""

from __future__ import annotations

from fxcompress.cli import run as run_command


def run(arguments: list[str]) -> int:
    """The exit code of a command line."""
    try:
        return run_command(arguments)
    except SystemExit as done:
        return int(done.code or 0)
