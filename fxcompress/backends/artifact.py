"""Save a rewritten GraphModule to a folder, and load it again without the original model's source.

| file | holds |
|---|---|
| `manifest.json` | format version, size and sha256 of each file |
| `graph.json` | modules by class and arguments, tensors by name, nodes by canonical operator, facts and provenance |
| `weights.safetensors` | the tensors, tied ones once |
| `policy.fxc` | the policy's text, empty if there was none |
| `plan.json`, `report.json` | what was planned and what came of it, `null` if there was none |

**Loading runs no code of the file's**: operators and module classes are keys of our tables, names are plain
identifiers, constants are numbers and texts. The hashes show damage, not malice: whoever writes an artifact can write
its hashes, so every document is checked as if a stranger had made it. What a loaded graph computes when it is *called*
is its author's choice, as with any model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn

from ..diagnostics import ArtifactError, Diagnostic
from .artifact_graph import read_nodes, save_nodes
from .artifact_json import Cursor, dump, fail, parse, printable, reason
from .artifact_store import read, write
from .artifact_tree import TreeEncoder, read_modes, read_modules, read_tensors
from .artifact_values import UnsaveableError

META = "fxcompress"  # the key of `GraphModule.meta` under which policy, plan and report travel
_BAD_WEIGHTS = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError)


def save(module: fx.GraphModule, directory: str | os.PathLike[str]) -> None:
    """Save `module` as the artifact in `directory`; one that is there is replaced at once and whole.

    Kept are the graph, weights (ties, dtypes, `requires_grad`, channels-last strides), training modes, facts,
    provenance, and `module.meta["fxcompress"]`: policy, plan, report. A named tuple in the graph comes back as a tuple.
    Raises ArtifactError: FXC0610 for what no artifact may hold (an unknown operator, class or constant, hooks), FXC0612
    where the folder can't be written.
    """
    write(directory, to_files(module))


def load(directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> fx.GraphModule:
    """The GraphModule saved in `directory`, on `device`: equal outputs, trainable, in the mode it was saved in, with
    `meta["fxcompress"]` and each node's facts and provenance. Raises ArtifactError (FXC0601 to FXC0609) for an artifact
    that is damaged, hostile, or of another version."""
    return from_files(read(directory), torch.device(device))


def to_files(module: fx.GraphModule) -> dict[str, bytes]:
    """The content of each file of the artifact of `module`. Raises ArtifactError (FXC0610)."""
    try:
        device = main_device(module)
        tree, document = _encode(module, device)
        loaded = _decode(parse(dump(document), "graph.json"), dict(tree.stored), device, torch.device("cpu"))
        _, again = _encode(loaded, device, copies=False)
    except UnsaveableError as error:
        raise ArtifactError([Diagnostic(
            "FXC0610", f"{error} can't be saved",
            help="an artifact holds the operators and module classes that fxcompress knows "
                 "(fxcompress.graph.ops.OPS, fxcompress.backends.artifact_modules.CLASSES); rewrite this part of the "
                 "model with those")]) from error
    if again != document:
        fail("FXC0610", f"{type(module).__name__} can't be saved: it would not load as it is",
             _difference(document, again), help_="this is a fault of fxcompress; please report it with the model")
    meta = module.meta.get(META, {})
    return {
        "graph.json": dump(document),
        "weights.safetensors": safetensors.torch.save(tree.stored, metadata={"format": "pt"}),
        "policy.fxc": str(meta.get("policy") or "").encode("utf-8"),
        "plan.json": dump(meta.get("plan")),
        "report.json": dump(meta.get("report")),
    }


def from_files(files: Mapping[str, bytes], device: torch.device) -> fx.GraphModule:
    """The GraphModule in the files of an artifact. Raises ArtifactError (FXC0604 to FXC0609)."""
    stored = _weights(files["weights.safetensors"])
    module = _decode(parse(files["graph.json"], "graph.json"), stored, device, device)
    try:
        policy = files["policy.fxc"].decode("utf-8")
    except UnicodeDecodeError as error:
        fail("FXC0604", "policy.fxc is not UTF-8 text", reason(error))
    module.meta[META] = {"policy": policy, "plan": parse(files["plan.json"], "plan.json").value,
                         "report": parse(files["report.json"], "report.json").value}
    return module


def main_device(module: nn.Module) -> torch.device:
    """The device of the weights: that of the first parameter or buffer, the CPU if there are none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _encode(module: fx.GraphModule, device: torch.device, copies: bool = True) -> tuple[TreeEncoder, dict[str, Any]]:
    """The tree, with the tensors to store unless `copies` is off, and the document. `device` is that of the weights."""
    called = frozenset(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    tree = TreeEncoder(called, copies)
    tree.root(module)
    names = frozenset(entry["name"] for entry in tree.tensors)
    document = {
        "name": type(module).__name__,
        "modules": tree.modules,
        "tensors": tree.tensors,
        "evaluation": tree.evaluation,
        "nodes": save_nodes(module.graph, names, device),
    }
    return tree, document


def _decode(document: Cursor, stored: dict[str, Tensor], device: torch.device, holds: torch.device) -> fx.GraphModule:
    """The module of a document, for weights on `device`; `holds` is where they are put (elsewhere only for a check)."""
    fields = document.fields(("name", "modules", "tensors", "evaluation", "nodes"))
    root = fx.GraphModule(nn.Module(), fx.Graph(), class_name=fields["name"].identifier())
    modules = read_modules(root, fields["modules"])
    tensors = read_tensors(root, fields["tensors"], stored, holds)
    read_modes(root, fields["evaluation"])
    graph = read_nodes(fields["nodes"], modules, tensors, device)
    root.graph = graph  # makes the code of `forward`
    return root


def _weights(data: bytes) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load(data))
    except _BAD_WEIGHTS as error:
        fail("FXC0607", "weights.safetensors can't be read", reason(error))


def _difference(document: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    """Where two documents differ first, for the message of a failed check."""
    for key in document:
        if document[key] != again[key]:
            pairs = zip(document[key], again[key], strict=False) if isinstance(document[key], list) else ()
            for one, other in pairs:
                if one != other:
                    return f"{key}: {printable(str(one), 200)} would become {printable(str(other), 200)}"
            return f"the {key} would differ"
    return ""
