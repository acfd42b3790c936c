"""The package as a stranger gets it: sdist, wheel, and the wheel at work in a fresh environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("fxcompress", "passes", "grammar", "pyproject.toml", "README.md", "LICENSE")
DATA = (".py", ".md", ".fxc", ".lark", ".json", ".typed")


def run(*command: str | Path, cwd: Path) -> tuple[int, str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def python(*args: str | Path, cwd: Path, executable: str | Path = sys.executable) -> str:
    code, output = run(executable, *args, cwd=cwd)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from that sdist, of a copy of the sources (a build writes beside them)."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, tree / name)
    python("-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=tree)
    (sdist,), (wheel,) = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    return sdist, wheel


def expected(fold: dict[str, str]) -> set[str]:
    """Every file of ours that must be in an archive, under the names it has there."""
    found = set()
    for folder, inside in fold.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in DATA and "__pycache__" not in path.parts:
                found.add(f"{inside}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_the_wheel_holds_every_module_and_data_file(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    want = expected({"fxcompress": "fxcompress", "passes": "fxcompress/passes", "grammar": "fxcompress/grammar"})
    assert want - names == set()
    assert "fxcompress/grammar/policy.lark" in want
    assert not [name for name in names if name.split("/")[0] in ("passes", "grammar", "tests")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_three_folders(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert expected({folder: folder for folder in ("fxcompress", "passes", "grammar")}) - names == set()
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.fixture(scope="module")
def fresh(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, beside the torch of this one. Its own site-packages come first, and a path
    that a .pth file names has its own .pth files left unread: so the editable install here can't be what runs."""
    place = tmp_path_factory.mktemp("fresh")
    python("-m", "venv", "venv", cwd=place)
    inside = next((place / "venv/lib").glob("python*/site-packages"))
    (inside / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    binary = place / "venv/bin/python"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[1], cwd=place, executable=binary)
    return place


def test_the_wheel_checks_a_policy(fresh: Path) -> None:
    command = fresh / "venv/bin/fxcompress"
    shutil.copy(ROOT / "examples/lenet_mnist/policy.fxc", fresh / "policy.fxc")
    code, output = run(command, "check", "policy.fxc", cwd=fresh)
    assert code == 0, output
    (fresh / "wrong.fxc").write_text("policy p { mask linear { sparsty = 50% } }\n", encoding="utf-8")
    code, output = run(command, "check", "wrong.fxc", cwd=fresh)
    assert code == 1
    assert "sparsity" in output


FROM_THE_WHEEL = """
import torch, fxcompress, fxcompress.grammar, fxcompress.passes
captured = fxcompress.capture(torch.nn.Sequential(torch.nn.Linear(8, 2)), (torch.zeros(1, 8),))
fxcompress.passes.Mask(sparsity=0.5, by="magnitude").apply(captured, "linear")
for module in (fxcompress, fxcompress.passes, fxcompress.grammar):
    print(module.__file__)
"""


def test_the_wheel_is_what_is_imported(fresh: Path) -> None:
    files = python("-c", FROM_THE_WHEEL, cwd=fresh, executable=fresh / "venv/bin/python").splitlines()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(fresh / "venv") for file in files), files


def test_the_tested_versions_cover_what_is_asked_for() -> None:
    """Every direct dependency, of every extra, has its exact version in constraints.txt, within the bounds."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    wanted = [Requirement(text) for text in [*project["dependencies"], *extras] if not text.startswith("fxcompress")]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in wanted:
        assert requirement.name in tested, requirement
        assert requirement.specifier.contains(tested[requirement.name]), requirement
    assert set(tested) == {requirement.name for requirement in wanted}
