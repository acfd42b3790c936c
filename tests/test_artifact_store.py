"""The folder of an artifact: damage is seen, saves are whole or not there, readers never see a mixture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.backends.artifact_store import FILES, MANIFEST, read, write
from fxcompress.diagnostics import ArtifactError


def content(word: str, size: int = 1) -> dict[str, bytes]:
    return {name: f"{word} {name}".encode() * size for name in FILES}


def entries(folder: Path) -> int:
    """How many things there are besides the links."""
    return sum(not entry.is_symlink() for entry in folder.iterdir())


def code_of(error: pytest.ExceptionInfo[ArtifactError]) -> str:
    (found,) = error.value.diagnostics
    return found.code


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out", content("a"))
    assert read(tmp_path / "deep" / "out") == content("a")


def test_a_second_save_replaces_the_first_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    write(tmp_path, content("a"))
    write(tmp_path, content("b"))
    assert read(tmp_path) == content("b")
    assert entries(tmp_path) == 2  # the manifest and one data folder
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == content("b")  # by the links


def test_what_a_killed_writer_left_is_swept_and_what_the_user_put_there_is_kept(tmp_path: Path) -> None:
    write(tmp_path, content("a"))
    for name in ("0123456789abcdef", "0123456789abcdef.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "graph.json").write_text("half")
    (tmp_path / "0123456789abcdef.json").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, content("b"))
    own = sorted(entry.name for entry in tmp_path.iterdir() if entry.is_file() and not entry.is_symlink())
    assert own == [MANIFEST, "notes.txt"]
    assert sum(entry.is_dir() for entry in tmp_path.iterdir()) == 1


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError) as error:
        write(tmp_path, content("a"))
    assert code_of(error) == "FXC0612"
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_and_a_missing_artifact_are_diagnosed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactError) as error:
        write(tmp_path / "out", content("a"))
    assert code_of(error) == "FXC0612"
    for place in (tmp_path / "out", tmp_path / "nothing", tmp_path):
        with pytest.raises(ArtifactError) as error:
            read(place)
        assert code_of(error) == "FXC0601"


@pytest.mark.parametrize("name", FILES)
def test_every_changed_truncated_longer_or_missing_file_is_seen(tmp_path: Path, name: str) -> None:
    write(tmp_path, content("a", 100))
    path = tmp_path / json.loads((tmp_path / MANIFEST).read_text())["data"] / name
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    for data in (whole[:-1], b"", whole + b" ", flipped):
        path.write_bytes(data)
        with pytest.raises(ArtifactError) as error:
            read(tmp_path)
        assert code_of(error) == "FXC0603"
    path.unlink()
    with pytest.raises(ArtifactError) as error:
        read(tmp_path)
    assert code_of(error) == "FXC0603"


def manifest_with(tmp_path: Path, **changes: object) -> None:
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("changes", "code"), [
    ({"version": 2}, "FXC0602"),
    ({"version": "1"}, "FXC0602"),
    ({"format": "other"}, "FXC0601"),
    ({"data": ".."}, "FXC0606"),
    ({"data": "../../etc"}, "FXC0606"),
    ({"data": "/0123456789abcdef"}, "FXC0606"),
    ({"data": 3}, "FXC0604"),
    ({"files": []}, "FXC0604"),
    ({"files": {}}, "FXC0604"),
    ({"files": {"../passwd": {"size": 1, "sha256": "0"}}}, "FXC0606"),
    ({"files": {name: {"size": -1, "sha256": "0"} for name in FILES}}, "FXC0604"),
    ({"files": {name: {"size": 2**62, "sha256": "0"} for name in FILES}}, "FXC0604"),
    ({"files": {name: {"size": 1} for name in FILES}}, "FXC0604"),
    ({"files": {name: {"size": 2**39, "sha256": "0"} for name in FILES}}, "FXC0603"),
    ({"extra": 1}, "FXC0604"),
])
def test_a_hostile_manifest_is_refused(tmp_path: Path, changes: dict[str, object], code: str) -> None:
    write(tmp_path, content("a"))
    manifest_with(tmp_path, **changes)
    with pytest.raises(ArtifactError) as error:
        read(tmp_path)
    assert code_of(error) == code


@pytest.mark.parametrize("text", [
    "", "{", "[]", "nul", "\x00", "[" * 100_000, '{"format": "x", "format": "x"}', '{"a": NaN}', "\ufeff{}",
    '{"a": 1' + "0" * 5000 + "}", '"\\ud800"',
])
def test_a_broken_manifest_is_a_diagnostic(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArtifactError):
        read(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_for_a_manifest_are_a_diagnostic(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("m")
    (folder / MANIFEST).write_bytes(data)
    with pytest.raises(ArtifactError):
        read(folder)


WRITER = """
import itertools, os, signal, sys, types
sys.modules["torch"] = None  # this needs none, and starts in no time
package = types.ModuleType("fxcompress.backends"); package.__path__ = [sys.argv[2]]
sys.modules["fxcompress.backends"] = package
from fxcompress.backends.artifact_store import FILES, write
folder, die_at, steps = sys.argv[1], int(sys.argv[3]), itertools.count(1)

def watch(event, arguments):  # every touch of the file system is an audit event
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "os.symlink",
                 "fcntl.flock"):
        if next(steps) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
if die_at:
    write(folder, {name: f"b {name}".encode() * 3000 for name in FILES})
for word in "" if die_at else itertools.cycle("ab"):
    write(folder, {name: f"{word} {name}".encode() * 3000 for name in FILES})
"""


def start_writer(folder: Path, die_at: int = 0) -> subprocess.Popen[str]:
    import fxcompress.backends

    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), fxcompress.backends.__path__[0], str(die_at)])


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_writer_killed_at_each_of_its_steps_leaves_the_old_artifact_or_the_new_one_whole(tmp_path: Path) -> None:
    old, new = content("a", 3000), content("b", 3000)
    found = []
    for step in range(1, 100):
        write(tmp_path, old)
        with start_writer(tmp_path, step) as writer:
            pass
        found.append(read(tmp_path))
        assert all((tmp_path / name).read_bytes() in (old[name], new[name]) for name in FILES)  # no link hangs
        if writer.returncode == 0:
            break
        assert writer.returncode == -signal.SIGKILL
    assert len(found) > 10, "so few steps can't be all"
    switch = found.index(new)
    assert found == [old] * switch + [new] * (len(found) - switch)
    assert 5 < switch < len(found) - 1  # kills came before the switch and after it
    write(tmp_path, old)
    assert entries(tmp_path) == 2  # what was left is swept


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_writer_killed_at_any_moment_leaves_a_whole_artifact(tmp_path: Path) -> None:
    wholes = [content("a", 3000), content("b", 3000)]
    write(tmp_path, wholes[0])
    for attempt in range(8):
        with start_writer(tmp_path) as writer:
            time.sleep(0.12 + 0.0037 * attempt)
            writer.send_signal(signal.SIGKILL)
        assert read(tmp_path) in wholes


def test_readers_beside_a_writer_see_whole_artifacts(tmp_path: Path) -> None:
    wholes = [content("a", 3000), content("b", 3000)]
    write(tmp_path, wholes[0])
    stop = threading.Event()

    def save_on_and_on() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            write(tmp_path, wholes[turn % 2])

    writer = threading.Thread(target=save_on_and_on)
    writer.start()
    try:
        seen = [read(tmp_path) for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    assert all(found in wholes for found in seen)
    assert all(whole in seen for whole in wholes)
