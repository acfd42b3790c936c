"""The one direction of imports (docs/design.md), and a few rules of the house, checked on the syntax trees.

Imports inside functions, under TYPE_CHECKING and by `import_module("...")` count too, save for those in `DEFERRED`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"fxcompress": "fxcompress", "fxcompress.passes": "passes", "fxcompress.grammar": "grammar"}
LONGEST = 420

# The layers from the bottom up. The longest prefix of a module's name says its layer.
LAYERS: dict[str, str] = {
    "fxcompress.source": "text", "fxcompress.diagnostics": "text", "fxcompress.render": "text",
    "fxcompress.grammar": "grammar", "fxcompress.grammar.__main__": "cli",
    "fxcompress.policy": "policy",
    "fxcompress.passbase": "passbase",
    "fxcompress.nn": "nn",
    "fxcompress.graph": "graph",
    "fxcompress.passes": "passes",
    "fxcompress.plan": "plan",
    "fxcompress.engine": "engine",
    "fxcompress.backends": "backends",
    "fxcompress.inspect": "inspect",
    "fxcompress.training": "training",
    "fxcompress.spec_training": "commands", "fxcompress.train": "commands",
    "fxcompress.spec": "commands", "fxcompress.spec_data": "commands", "fxcompress.commands": "commands",
    "fxcompress.cli": "cli", "fxcompress.app": "cli", "fxcompress.docs": "cli", "fxcompress.__main__": "cli",
    "fxcompress": "api",
}
ORDER = ("text", "grammar", "policy", "passbase", "nn", "graph", "passes", "plan", "backends", "engine", "inspect",
         "training", "commands", "cli", "api")
NARROWER: dict[str, set[str]] = {"nn": set()}  # a layer may import every layer below it, save for these
# The arrows back that are not there when the module is imported: (from layer, to layer) -> why.
DEFERRED = {
    ("policy", "passbase"): "the checker asks the registry what a verb takes, when it checks",
    ("passbase", "graph"): "Pass.apply works on captured graphs, and the protocol's types name them",
}
TORCH_FREE = ("text", "grammar", "policy", "passbase", "cli", "api")
BANNED = ("torch.jit", "torch.ao")


@dataclass(frozen=True)
class Import:
    """One import statement's target, and whether it runs when its module is imported."""

    target: str
    line: int
    at_import: bool


def module_files() -> dict[str, Path]:
    """Module name (as installed) -> file, for everything in the three folders."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


FILES = module_files()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(name: str, tree: ast.AST, is_package: bool) -> Iterator[Import]:
    """Every import in `tree`; `from . import x` names the submodule x where there is one."""
    package = name if is_package else name.rpartition(".")[0]

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parents, *([child.module] if child.module else [])])
                for alias in child.names:
                    deeper = f"{base}.{alias.name}"
                    yield Import(deeper if deeper in FILES else base, child.lineno, at_import)
            else:
                if isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                    yield from (Import(arg.value, child.lineno, at_import) for arg in child.args[:1]
                                if isinstance(arg, ast.Constant))
                later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_import and not later and not is_type_checking(child))

    yield from walk(tree, True)


def layer_of(module: str) -> str:
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS[module]


def allowed(layer: str) -> set[str]:
    return NARROWER.get(layer, set(ORDER[: ORDER.index(layer)])) | {layer}


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
IMPORTS = {name: list(imports_of(name, TREES[name], FILES[name].name == "__init__.py")) for name in FILES}


def ours(item: Import) -> bool:
    return item.target.split(".")[0] == "fxcompress"


def arrows_back(name: str) -> list[str]:
    layer = layer_of(name)
    wrong = []
    for item in filter(ours, IMPORTS[name]):
        target = layer_of(item.target)
        if target in allowed(layer) or ((layer, target) in DEFERRED and not item.at_import):
            continue
        if item.target == "fxcompress" and layer == "cli":
            continue
        wrong.append(f"{FILES[name].relative_to(ROOT)}:{item.line}: {layer} imports {item.target} ({target})")
    return wrong


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name: str) -> None:
    assert arrows_back(name) == []


def test_an_arrow_back_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse("def f():\n    from ..plan import Plan\nfrom .. import source\nimport_module('fxcompress.cli')")
    items = list(imports_of("fxcompress.graph.toy", tree, is_package=False))
    assert [(i.target, i.at_import) for i in items] == [
        ("fxcompress.plan", False), ("fxcompress.source", True), ("fxcompress.cli", True)]
    monkeypatch.setitem(IMPORTS, "fxcompress.graph.toy", items)
    monkeypatch.setitem(FILES, "fxcompress.graph.toy", ROOT / "fxcompress/graph/toy.py")
    assert [text.partition(": ")[2] for text in arrows_back("fxcompress.graph.toy")] == [
        "graph imports fxcompress.plan (plan)", "graph imports fxcompress.cli (cli)"]


def test_the_table_of_the_design_has_this_order() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("| layer |")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in text.splitlines()[2:]]
    rows = [{name.removesuffix(".py").rstrip("/") for name in re.findall(r"`(.*?)`", cell)} for cell in cells]
    layers = [{layer_of(f"fxcompress.{name}") for name in row} for row in rows]
    assert layers == [{layer} for layer in ORDER if layer != "api"]


def test_no_verb_imports_another() -> None:
    verbs = {name for name in FILES if name.startswith("fxcompress.passes.") and ".shared" not in name}
    wrong = [f"{name} imports {item.target}" for name in verbs for item in IMPORTS[name]
             if item.target in verbs - {name}]
    assert wrong == []


def test_shared_rewrites_import_no_verb() -> None:
    """For its types alone (under TYPE_CHECKING) the work of one verb may name that verb."""
    wrong = [f"{name} imports {item.target}" for name in FILES if name.startswith("fxcompress.passes.shared")
             for item in IMPORTS[name]
             if item.at_import and item.target.startswith("fxcompress.passes.") and ".shared" not in item.target]
    assert wrong == []


def torch_free() -> list[str]:
    verbs = [name for name in FILES if name.startswith("fxcompress.passes") and ".shared" not in name]
    return [name for name in FILES if layer_of(name) in TORCH_FREE] + verbs


@pytest.mark.parametrize("name", torch_free())
def test_no_torch_at_module_level(name: str) -> None:
    wrong = [item for item in IMPORTS[name] if item.at_import and item.target.split(".")[0] in ("torch", "torchvision")]
    assert wrong == []


def test_importing_the_language_loads_no_torch() -> None:
    code = ("import sys, fxcompress, fxcompress.policy, fxcompress.cli, fxcompress.passes\n"
            "fxcompress.passes.Mask, fxcompress.passes.Remove, fxcompress.parse, fxcompress.PolicyError\n"
            "print('torch' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


@pytest.mark.parametrize("name", FILES)
def test_house_rules(name: str) -> None:
    for item in IMPORTS[name]:
        assert not item.target.startswith(BANNED), f"{name}:{item.line} imports {item.target}"
        assert item.target.split(".")[0] not in ("passes", "grammar"), f"{name}:{item.line}: a second copy"
    dotted = [ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)]
    assert not [text for text in dotted if text in BANNED]
    length = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST, f"{FILES[name].relative_to(ROOT)} has {length} lines; the limit is {LONGEST}"


def test_every_verb_of_the_registry_has_its_file() -> None:
    from fxcompress.passbase import VERBS

    built_in = {VERBS[name].__module__ for name in ("mask", "remove")}
    assert built_in == {"fxcompress.passes.mask", "fxcompress.passes.remove"}
