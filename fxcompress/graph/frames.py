"""Where in the model's source a call comes from."""

from __future__ import annotations

import linecache
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import torch

_OURS = f"{Path(__file__).parent}{os.sep}"
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_MODULES = f"{_TORCH}nn{os.sep}modules{os.sep}"
_known: dict[str, bool] = {}


def _is_user(filename: str) -> bool:
    if filename not in _known:
        _known[filename] = not filename.startswith((_OURS, _TORCH, "<frozen")) and "importlib" not in filename
    return _known[filename]


def is_model_code(filename: str) -> bool:
    """Whether a file holds forwards of modules: the model's own, or those of `torch.nn`; not torch's machinery."""
    return _is_user(filename) or (filename.startswith(_MODULES) and not filename.endswith(f"{os.sep}module.py"))


@lru_cache(maxsize=4096)
def line_of(filename: str, number: int) -> str:
    """`resnet.py:102 \\`out += identity\\``."""
    text = " ".join(linecache.getline(filename, number).split())
    return f"{Path(filename).name}:{number} `{text}`" if text else f"{Path(filename).name}:{number}"


def user_line() -> str:
    """The innermost running line outside torch and this package; empty if a capture runs no such line."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if _is_user(code.co_filename):
            return line_of(code.co_filename, frame.f_lineno)
        if code.co_name == _BOUNDARY:
            return ""
        frame = frame.f_back  # type: ignore[assignment]
    return ""


_BOUNDARY = "_run_traced"  # the function of `trace.py` that calls the model: what is above it isn't the model
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')


def stack_line(stack_trace: str | None) -> str:
    """The innermost line outside torch of a stack trace that `torch.export` wrote."""
    for match in reversed(list(_FRAME.finditer(stack_trace or ""))):
        if _is_user(match["file"]):
            return line_of(match["file"], int(match["line"]))
    return ""


def innermost(error: BaseException) -> str:
    """The last line outside torch that `error` came through; empty if there is none."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if _is_user(filename):
            place = line_of(filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return place
