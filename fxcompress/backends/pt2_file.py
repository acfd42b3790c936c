"""`.pt2` files: `torch.export`'s program of a GraphModule, on torch's operators alone. Integer layers are in it as
oneDNN's operators with int8 weights, which are packed inside the program; a loader needs torch, not fxcompress."""

from __future__ import annotations

import os
import warnings

import torch
from torch import fx

from ..diagnostics import Diagnostic, PlanError
from ..graph.tree import copy_module
from .signature import Signature, flatten_inputs


def write_pt2(module: fx.GraphModule, signature: Signature, path: str | os.PathLike[str]) -> None:
    """Write `module` to `path`. Raises PlanError (FXC0641) for a graph that `torch.export` can't trace."""
    own = copy_module(module, lambda tensor: tensor)
    flatten_inputs(own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        try:
            program = torch.export.export(own, tuple(signature.examples()),
                                          dynamic_shapes=signature.dynamic_shapes())
            _fill_lists(program.graph)
            torch.export.save(program, os.fspath(path))
        except (torch._dynamo.exc.UserError, torch._export.serde.serialize.SerializeError, RuntimeError,
                ValueError, TypeError) as error:
            words = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise PlanError([Diagnostic("FXC0641", "this graph can't be written as a pt2 program",
                                        notes=tuple(words[:3]), help="keep it as an artifact: `fxcompress.save`")
                             ]) from error


def _fill_lists(graph: fx.Graph) -> None:
    """oneDNN's operators take a list of an activation's numbers, for most an empty one, which the file format has no
    form for: one number stands there instead, and isn't read."""
    for node in graph.nodes:
        if str(node.target).startswith("onednn."):
            node.args = tuple([0.0] if isinstance(arg, tuple | list) and not arg else arg for arg in node.args)
