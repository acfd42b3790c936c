"""The folder of an artifact: which files, hashes, and how a save stays whole.

    out/manifest.json                 format, version, the name of the data folder, size and sha256 of each file
    out/<16 hex digits>/graph.json    and weights.safetensors, policy.fxc, plan.json, report.json
    out/graph.json, ...               links to these, for people and their tools; nothing here reads them

A save writes a new data folder beside the old one, flushes it to the disk, and then puts the new manifest in the place
of the old by one `os.replace`. That one rename is the whole switch: a reader sees the old manifest with the old files
or the new one with the new files, a killed writer leaves one or the other, and no file that a manifest names is ever
written twice. It needs no rename of `out` itself, which may be a mount. Old data folders go after the switch; what a
killed writer left is swept up by the next save. Two writers are kept apart by a lock on the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..diagnostics import ArtifactError, Diagnostic
from .artifact_json import Cursor, dump, fail, parse, printable

try:
    import fcntl
except ImportError:  # not on Windows, where two writers at once are the caller's care
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
FORMAT = "fxcompress artifact"
VERSION = 1
FILES = ("graph.json", "weights.safetensors", "policy.fxc", "plan.json", "report.json")
MAX_FILE_BYTES = 2**40
MAX_MANIFEST_BYTES = 2**20
_DATA = re.compile(r"[0-9a-f]{16}")
_LEFTOVER = re.compile(r"[0-9a-f]{16}(\.new|\.json|\.link)?")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says: the data folder, and (size in bytes, sha256) of each file in it."""

    data: str
    files: Mapping[str, tuple[int, str]]

    def to_json(self) -> bytes:
        """The manifest as it is written."""
        files = {name: {"size": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        return dump({"format": FORMAT, "version": VERSION, "data": self.data, "files": files})

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Read and check the manifest of `directory`. Raises ArtifactError (FXC0601, 0602, 0604)."""
        path = directory / MANIFEST
        try:
            with path.open("rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except OSError as error:
            fail("FXC0601", f"{printable(str(directory), 200)} is not an artifact",
                 f"{MANIFEST} can't be read there: {error.strerror}",
                 help_="name the folder that `fxcompress compile -o` or `fxcompress.save` wrote")
        if len(data) > MAX_MANIFEST_BYTES:
            fail("FXC0608", f"{MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")
        return _manifest(parse(data, MANIFEST))


def _manifest(document: Cursor) -> Manifest:
    if not isinstance(document.value, dict) or document.value.get("format") != FORMAT:
        fail("FXC0601", f"{MANIFEST} is not the manifest of an fxcompress artifact")
    if document.value.get("version") != VERSION:
        found = printable(str(document.value.get("version")))
        fail("FXC0602", f"the artifact has format version {found}; this fxcompress reads version {VERSION}",
             help_="compile it anew with this fxcompress, or load it with the one that wrote it")
    fields = document.fields(("format", "version", "data", "files"))
    data = fields["data"].text()
    if not _DATA.fullmatch(data):
        fail("FXC0606", f"{fields['data'].place}: {printable(data)} is not the name of a data folder")
    files = {}
    for name, entry in fields["files"].pairs(len(FILES)):
        if name not in FILES:
            fail("FXC0606", f"{entry.place}: {printable(name)} is not a file of an artifact")
        values = entry.fields(("size", "sha256"))
        files[name] = (values["size"].integer(0, MAX_FILE_BYTES), values["sha256"].text(64))
    for name in FILES:
        if name not in files:
            fail("FXC0604", f"{fields['files'].place}: the file {name} is missing")
    return Manifest(data, files)


def read(directory: str | os.PathLike[str]) -> dict[str, bytes]:
    """The content of every file of the artifact in `directory`, checked against its manifest, all of one save even
    while another process saves there. Raises ArtifactError (FXC0601 to FXC0604, FXC0606, FXC0608)."""
    folder = Path(directory)
    manifest = Manifest.read(folder)
    while True:
        try:
            return {name: _checked(folder / manifest.data / name, *manifest.files[name]) for name in FILES}
        except ArtifactError:
            newer = Manifest.read(folder)
            if newer == manifest:  # nobody saved in between: the artifact is damaged
                raise
            manifest = newer


def _checked(path: Path, size: int, digest: str) -> bytes:
    name = path.name
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if found == size else b""
    except OSError as error:
        fail("FXC0603", f"the artifact is damaged: {name} can't be read", error.strerror or "")
    if len(data) != size:
        fail("FXC0603", f"the artifact is damaged: {name} has {found} bytes, the manifest says {size}")
    if hashlib.sha256(data).hexdigest() != digest:
        fail("FXC0603", f"the artifact is damaged: {name} is not the file that was saved (its sha256 differs)")
    return data


def write(directory: str | os.PathLike[str], files: Mapping[str, bytes]) -> Manifest:
    """Write `files` (one for each of `FILES`) as the artifact in `directory`, made if need be; an artifact that is
    there is replaced at once and whole. Raises ArtifactError (FXC0612) where that can't be."""
    folder = Path(directory)
    entries = {name: (len(files[name]), hashlib.sha256(files[name]).hexdigest()) for name in FILES}
    # The data folder never has a name that was used before: an unchanged manifest means that nobody saved.
    manifest = Manifest(secrets.token_hex(8), entries)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(folder)
        with _locked(folder):
            _write_data(folder, manifest, files)
            _switch(folder, manifest)
            _link(folder, manifest)
            _sweep(folder, keep=manifest.data)
    except OSError as error:
        raise ArtifactError([Diagnostic(
            "FXC0612", f"the artifact can't be written to {printable(str(folder), 200)}: {error.strerror}",
            help="name a folder that can be written; an artifact that was there is as it was")]) from error
    return manifest


def _refuse_strangers(folder: Path) -> None:
    """Refuse a folder that holds other things and no artifact: data folders are swept, so it must be ours."""
    strangers = [entry.name for entry in folder.iterdir() if not _LEFTOVER.fullmatch(entry.name)]
    if strangers and not (folder / MANIFEST).exists():
        fail("FXC0612", f"{printable(str(folder), 200)} holds other files and no artifact",
             f"{printable(sorted(strangers)[0])} is there, for one", help_="name a new or an empty folder")


def _write_data(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    new = folder / f"{manifest.data}.new"
    new.mkdir()
    for name in FILES:
        _write_file(new / name, files[name])
    _flush_folder(new)
    new.rename(folder / manifest.data)
    _flush_folder(folder)


def _switch(folder: Path, manifest: Manifest) -> None:
    new = folder / f"{manifest.data}.json"
    _write_file(new, manifest.to_json())
    os.replace(new, folder / MANIFEST)
    _flush_folder(folder)


def _link(folder: Path, manifest: Manifest) -> None:
    """Point the links of the folder at the new data, each at once; the data that they pointed at is still there."""
    for name in FILES:
        new = folder / f"{manifest.data}.link"
        if (folder / name).exists() and not (folder / name).is_symlink():  # a file of the user's
            continue
        try:
            new.symlink_to(Path(manifest.data) / name)
        except OSError:  # not every file system (nor Windows without rights) has links; they are a convenience
            return
        os.replace(new, folder / name)


def _sweep(folder: Path, keep: str) -> None:
    """Remove data folders that no manifest names, and what a killed writer left."""
    for entry in folder.iterdir():
        name = entry.name
        if name == keep or not _LEFTOVER.fullmatch(name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)  # a reader on Windows may hold a file; the next save tries again
        else:
            entry.unlink(missing_ok=True)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets it go when this process ends, however it ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
