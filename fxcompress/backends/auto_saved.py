"""The folder of a deployment.

| file | holds |
|---|---|
| `deployed.json` | the engine, what was measured, what the model takes and gives, size and sha256 of the other files |
| `model.onnx`, `model.xml`, ... | the model in the form of its engine, or |
| `artifact/` | an artifact, for the engines of torch |

Loading runs no code of the folder's: engines are keys of our table, files have the names that we give. The hashes show
damage, not malice.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..diagnostics import ArtifactError, Diagnostic
from .artifact import load, save
from .artifact_json import Cursor, dump, fail, parse, printable
from .signature import Input, Signature

ABOUT = "deployed.json"
FORMAT = "fxcompress deployment"
VERSION = 1
_FILE = re.compile(r"model\.(onnx|onnx\.data|xml|bin)")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool)}
_MOST = 2**20  # bytes of `deployed.json`


def write(directory: Path, about: Mapping[str, Any], module: fx.GraphModule | None, signature: Signature | None,
          folder: str | os.PathLike[str] | None) -> None:
    """Write a deployment: `about` says of which engine; an artifact of `module`, or the files in `folder` with their
    `signature`. Raises ArtifactError: FXC0612 where the folder can't be written or holds something else, FXC0610."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise FileExistsError(17, "there is something in it")
        files = {}
        if module is not None:
            save(module, directory / "artifact")
        else:
            assert folder is not None
            for file in sorted(Path(folder).iterdir()):
                if _needed(file.name, about["engine"]):
                    shutil.copyfile(file, directory / file.name)
                    files[file.name] = {"size": file.stat().st_size, "sha256": _digest(file)}
        document = {"format": FORMAT, "version": VERSION, **about, "files": files,
                    "signature": _plain(signature) if module is None and signature is not None else None}
        (directory / ABOUT).write_bytes(dump(document))
    except OSError as error:
        raise ArtifactError([Diagnostic("FXC0612", f"{printable(str(directory), 200)} can't be written: "
                                        f"{error.strerror or error}", help="name a new folder")]) from error


def _needed(name: str, engine: str) -> bool:
    """Whether the file `name` is what `engine` reads: both kinds may lie side by side while contenders are measured."""
    return bool(_FILE.fullmatch(name)) and name.startswith("model.onnx") == (engine == "onnxruntime")


def read(directory: Path, own: tuple[str, ...],
         files: Mapping[str, str]) -> tuple[dict[str, Any], fx.GraphModule | None, Signature | None]:
    """What `write` was given. `own` are the engines of torch, `files` the file of each other one. Raises ArtifactError
    (FXC0645, and those of `fxcompress.load`)."""
    try:
        data = (directory / ABOUT).read_bytes()
    except OSError as error:
        fail("FXC0645", f"{printable(str(directory), 200)} is not a deployment",
             f"{ABOUT} can't be read there: {error.strerror}", help_="name a folder that `Deployed.save` wrote")
    if len(data) > _MOST:
        fail("FXC0608", f"{ABOUT} has more than {_MOST} bytes")
    document = parse(data, ABOUT)
    if not isinstance(document.value, dict) or document.value.get("format") != FORMAT:
        fail("FXC0645", f"{ABOUT} doesn't describe a deployment")
    if document.value.get("version") != VERSION:
        fail("FXC0602", f"the deployment is of another version; this fxcompress reads version {VERSION}")
    fields = document.fields(("format", "version", "engine", "precision", "table", "files", "signature"))
    engine = fields["engine"].choice((*own, *files))
    about = {"engine": engine, "table": _table(fields["table"]),
             "precision": fields["precision"].choice(("int8", "fp32"))}
    if engine in own:
        return about, load(directory / "artifact"), None
    _check(directory, fields["files"], files[engine])
    return about, None, _signature(fields["signature"])


def _check(directory: Path, files: Cursor, main: str) -> None:
    names = []
    for name, entry in files.pairs(4):
        if not _FILE.fullmatch(name):
            fail("FXC0606", f"{entry.place}: {printable(name)} is not a file of a deployment")
        values = entry.fields(("size", "sha256"))
        file = directory / name
        if not file.is_file() or file.is_symlink() or file.stat().st_size != values["size"].integer(0) or (
                _digest(file) != values["sha256"].text(64)):
            fail("FXC0645", f"{name} is not the file that was saved")
        names.append(name)
    if main not in names:
        fail("FXC0604", f"{files.place}: the file {main} is missing")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _table(cursor: Cursor) -> dict[str, Any] | None:
    if cursor.value is None:
        return None
    fields = cursor.fields(("threads", "rows"))
    rows = []
    for row in fields["rows"].items(64):
        entry = row.fields(("engine", "precision", "seconds", "why", "chosen"))
        seconds = entry["seconds"].optional()
        rows.append({"engine": entry["engine"].text(32), "precision": entry["precision"].text(32),
                     "seconds": None if seconds is None else seconds.number(), "why": entry["why"].text(),
                     "chosen": entry["chosen"].boolean()})
    return {"threads": fields["threads"].integer(1), "rows": rows}


def _plain(signature: Signature) -> dict[str, Any]:
    inputs = {name: {"shape": list(entry.shape), "dtype": str(entry.dtype).removeprefix("torch."),
                     "dynamic": list(entry.dynamic)} for name, entry in signature.inputs.items()}
    return {"inputs": inputs, "outputs": list(signature.outputs), "result": signature.result}


def _signature(cursor: Cursor) -> Signature:
    fields = cursor.fields(("inputs", "outputs", "result"))
    inputs = {}
    for name, entry in fields["inputs"].pairs(1024):
        values = entry.fields(("shape", "dtype", "dynamic"))
        inputs[name] = Input(tuple(size.integer(0) for size in values["shape"].items(16)),
                             _DTYPES[values["dtype"].choice(tuple(_DTYPES))],
                             tuple(flag.boolean() for flag in values["dynamic"].items(16)))
    outputs = tuple(item.text(1024) for item in fields["outputs"].items(1024))
    return Signature(inputs, outputs, _nest(fields["result"], len(outputs)))


def _nest(cursor: Cursor, count: int) -> dict[str, Any]:
    """A nest of results, whose places lie below `count`."""
    pairs = list(cursor.pairs(1))
    kind, content = pairs[0] if pairs else ("", cursor)
    if kind == "at":
        return {kind: content.integer(0, count - 1)}
    if kind == "is" and not isinstance(content.value, list | dict):
        return {kind: content.value}
    if kind in ("tuple", "list"):
        return {kind: [_nest(item, count) for item in content.items(1024)]}
    if kind == "dict":
        return {kind: {name: _nest(item, count) for name, item in content.pairs(1024)}}
    cursor.wrong("a result")
