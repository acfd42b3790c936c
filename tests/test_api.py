"""The public surface: its names, and that it loads lazily."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fxcompress


def declared_for_type_checkers() -> set[str]:
    tree = ast.parse(Path(fxcompress.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_type_checkers_and_the_lazy_table_know_the_same_names() -> None:
    assert declared_for_type_checkers() | {"__version__"} == set(fxcompress.__all__)


@pytest.mark.parametrize("name", fxcompress.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(fxcompress, name)
    assert name == "__version__" or thing.__doc__


def test_dir_lists_the_surface() -> None:
    assert set(fxcompress.__all__) <= set(dir(fxcompress))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = fxcompress.prune  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'Prune'"):
        _ = fxcompress.passes.Prune  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", ["import fxcompress.plan", "from fxcompress.plan import Plan", "import fxcompress"])
def test_plan_is_callable_whatever_was_imported_first(first: str) -> None:
    code = (f"{first}\nimport fxcompress, torch\n"
            "plan = fxcompress.plan('policy p { mask linear { sparsity = 50% } }', torch.nn.Sequential("
            "torch.nn.Linear(4, 4)), (torch.zeros(1, 4),))\n"
            "assert isinstance(plan, fxcompress.Plan), plan")
    subprocess.run([sys.executable, "-c", code], check=True)
