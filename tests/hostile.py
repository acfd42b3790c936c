"""An artifact of a small model, its document to change, and what must hold of whatever loads."""

from __future__ import annotations

import ast
import copy
import json
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.backends.artifact import from_files, to_files
from fxcompress.diagnostics import FxcError
from fxcompress.inspect import explain, html_page, report
from fxcompress.passes import Mask

CPU = torch.device("cpu")


class Net(nn.Module):
    """A little of everything that an artifact can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.rnn = nn.GRU(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.offset = nn.Parameter(torch.zeros(4))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.norm(self.conv(x))).flatten(2).permute(2, 0, 1)
        z, _ = self.rnn(y + torch.arange(4, device=x.device))
        a, _ = self.attention(z, z, z)
        return {"out": self.tied(self.head(self.drop(a)))[..., :2] + self.offset[None, 0], "low": a.clamp(-1.0, 1.0)}


def make() -> dict[str, bytes]:
    torch.manual_seed(0)
    captured = fxcompress.capture(Net().eval(), (torch.randn(2, 3, 4, 4),))
    masked = Mask(sparsity=0.5).apply(captured, "conv2d").module
    masked.meta["fxcompress"] = {"policy": "policy p {}", "plan": None, "report": {"notes": ["a", "b"]}}
    return to_files(masked)


FILES = make()
DOCUMENT = json.loads(FILES["graph.json"])


def load(document: object, **files: bytes) -> fx.GraphModule:
    return from_files({**FILES, "graph.json": json.dumps(document).encode(), **files}, CPU)


def changed(path: str, value: object) -> Any:
    """The document with the value at `path` ("nodes/3/name") replaced."""
    document = copy.deepcopy(DOCUMENT)
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = document
    for part in way:
        place = place[part]
    place[last] = value
    return document


def index(entries: str, **wanted: object) -> str:
    """`nodes/3`: the first entry with these fields."""
    for place, entry in enumerate(DOCUMENT[entries]):
        if all(entry.get(key) == value for key, value in wanted.items()):
            return f"{entries}/{place}"
    raise LookupError(wanted)


def assert_harmless(loaded: fx.GraphModule) -> None:
    """The generated code only assigns, calls what is known, reads attributes, and returns."""
    tree = ast.parse(loaded.code)
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    for node in ast.walk(function):
        assert not isinstance(node, ast.Import | ast.ImportFrom | ast.Lambda | ast.Global)
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            assert not name.startswith("__") and name not in ("eval", "exec", "open", "compile", "setattr", "globals")
        if isinstance(node, ast.Call):
            root: ast.AST = node.func
            while isinstance(root, ast.Attribute | ast.Call):
                root = root.value if isinstance(root, ast.Attribute) else root.func
            assert isinstance(root, ast.Name), ast.unparse(node)
            assert root.id in KNOWN or root.id.startswith(("torch_", "_operator_")), ast.unparse(node)


KNOWN = {"torch", "operator", "self", "getattr", "slice", "range", "device"}


def exercise(files: dict[str, bytes]) -> None:
    """Load and look at it in every way; only diagnostics may come."""
    try:
        loaded = from_files(files, CPU)
        assert_harmless(loaded)
        report(loaded).show()
        html_page(loaded)
        explain(loaded, "conv")
    except FxcError as error:
        assert error.diagnostics[0].code
