"""Remove half of the channels of one model and say how it went: one JSON object on the last line of the output.

Seconds are processor time of the one thread, so that other work on the machine doesn't count.

    python benchmarks/zoo_worker.py SUITE NAME CORE [--peer] [--full] [--brief]

`--brief` stops after the rewriting: nothing is proven, run or differentiated; and all of it is done twice, of which
the second time counts, without what either contestant loads and makes on first use.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

RATIO = 0.5
ATTENTION = frozenset(("scaled_dot_product_attention", "multihead_attention", "matmul", "bmm", "baddbmm", "einsum"))


def parameters(model: Any) -> int:
    """The number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def layer_sizes(model: Any) -> dict[str, int]:
    """The number of weights of every convolution and linear layer, by path; an attention module counts as one each for
    its projections in and out."""
    from torch import nn

    sizes = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            sizes[path] = module.weight.numel()
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            sizes[f"{path}.in_proj"] = module.in_proj_weight.numel()
    return sizes


def thinner(before: dict[str, int], model: Any) -> float:
    """The share of the layers that have fewer weights than before."""
    after = layer_sizes(model)
    return sum(after.get(path, size) < size for path, size in before.items()) / max(1, len(before))


def tensors(value: Any) -> list[Any]:
    """Every tensor in an output, in order."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    value = dict(value) if hasattr(value, "items") else value
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def backward(model: Any, inputs: Any, again: Callable[[], Any]) -> str:
    """Empty if one backward pass in training mode gives every parameter a finite gradient that has one in the model
    `again()`; else what is wrong."""
    import torch

    def missing(one: Any) -> set[str]:
        one.train()
        sum(output.float().square().mean() for output in tensors(one(inputs)) if output.requires_grad).backward()
        return {name for name, p in one.named_parameters() if p.requires_grad and p.grad is None}

    without = missing(model)
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if wrong:
        return f"{len(wrong)} gradients aren't finite, such as that of {wrong[0]}"
    if without:
        without -= missing(again())
    return f"{len(without)} parameters get no gradient, such as {min(without)}" if without else ""


def ours(entry: Any, result: dict[str, Any], brief: bool) -> None:
    """Fill `result` by removing with fxcompress."""
    import torch

    import fxcompress

    warm_up()
    model = entry.build()
    x = entry.inputs(model)
    result.update(input="x".join(map(str, x.shape)), stage="capture")
    start = time.process_time()
    captured = fxcompress.capture(model, x)  # before the model runs: some models of timm then hold weights in caches
    result.update(seconds_capture=time.process_time() - start, way=captured.way)
    facts, layers = captured.facts, layer_sizes(captured.module)
    result.update(params_before=facts.params, macs_before=facts.macs, nodes=facts.nodes, kind=kind_of_model(captured))
    dense = [] if brief else checked(model, captured, x)
    del model
    seconds, trial = rewritten(captured, result)
    if brief:
        result.update(params_after=trial.facts.params, macs_after=trial.facts.macs, ok=True, stage="")
        return
    del trial
    result["stage"] = "prove"
    start = time.process_time()
    outcome = removal(captured, "on")
    result.update(seconds_prove=max(0.0, time.process_time() - start - seconds), stage="run")
    result.update(params_after=captured.facts.params, macs_after=captured.facts.macs,
                  share_thinner=thinner(layers, captured.module), **_noted(outcome.notes))
    with torch.no_grad():
        thin = tensors(captured.module(x))
    if [t.shape for t in dense] != [t.shape for t in thin]:
        raise WrongError("the outputs have other shapes than before")
    result["stage"] = "backward"
    wrong = backward(captured.module, torch.cat([x, x]) if len(x) < 2 else x,
                     lambda: fxcompress.capture(entry.build(), x).module)
    if wrong:
        raise WrongError(wrong)
    result.update(backward=True, ok=True, stage="")


def kind_of_model(captured: Any) -> str:
    """How a model mixes places: by "attention", if products of two activations make more than 0.2 % of its MACs (some
    convolutional ones gate with a little of it), by "convolution", or by "other" means."""
    products = convolutions = total = 0
    for node in captured.graph.nodes:
        fact = node.meta["fxc"]
        total += fact.macs
        if fact.kind in ATTENTION and not any(source.op == "get_attr" for source in node.all_input_nodes):
            products += fact.macs
        elif fact.kind.startswith("conv") and fact.macs and overlapping(captured.module, node):
            convolutions += fact.macs
    return "attention" if products > 0.002 * total else "convolution" if convolutions else "other"


def overlapping(root: Any, node: Any) -> bool:
    """Whether a convolution's windows overlap: those of a patch embedding don't."""
    if node.op != "call_module":
        return True
    layer = root.get_submodule(node.target)
    return any(size > step for size, step in zip(layer.kernel_size, layer.stride, strict=True))


def removal(captured: Any, verify: str) -> Any:
    """Remove half of everything, in place."""
    from fxcompress.graph.apply import carry_out
    from fxcompress.graph.site import Site
    from fxcompress.passes.remove import Remove

    site = Site(tuple(node for node in captured.graph.nodes if node.op != "output"), "channels", selection="*")
    return carry_out(captured, Remove(ratio=RATIO, by="l2", verify=verify), site)


def little() -> tuple[Any, Any]:
    """A little model of common layers and an input of it, for both contestants to begin with: what is loaded and made
    on first use isn't counted."""
    import torch
    from torch import nn

    class Little(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
                                      nn.Conv2d(8, 8, 1))
            self.head = nn.Linear(8, 4)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            pooled = nn.functional.adaptive_avg_pool2d(x + self.body(x), 1)
            return self.head(torch.flatten(pooled, 1))

    return Little().eval(), torch.zeros(2, 3, 8, 8)


def warm_up() -> None:
    """Remove from a little model once."""
    import fxcompress

    removal(fxcompress.capture(*little()), "on")


def checked(model: Any, captured: Any, x: Any) -> list[Any]:
    """The outputs of the model. Raises WrongError where those of the captured one differ."""
    import torch

    with torch.no_grad():
        dense = tensors(model(x))
        again = tensors(captured.module.eval()(x))
    if [t.shape for t in dense] != [t.shape for t in again] or _worst(dense, again) > 1e-4:
        raise WrongError("the captured model differs from the model")
    return dense


def rewritten(captured: Any, result: dict[str, Any]) -> tuple[float, Any]:
    """Analyse, then remove from a copy without the proof, which analyses anew. Returns the second's seconds, the
    copy."""
    from fxcompress.graph.coupling import analyse

    result["stage"] = "analyse"
    start = time.process_time()
    analyse(captured)
    result.update(seconds_analyse=time.process_time() - start, stage="rewrite")
    trial = captured.copy()
    start = time.process_time()
    removal(trial, "off")
    unproven = time.process_time() - start
    result["seconds_rewrite"] = max(0.0, unproven - result["seconds_analyse"])
    return unproven, trial


class WrongError(Exception):
    """The rewritten model isn't what it should be."""


def _worst(expected: list[Any], found: list[Any]) -> float:
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.is_floating_point()]
    return max((float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs), default=0.0)


def _noted(notes: tuple[str, ...]) -> dict[str, Any]:
    """What the notes of a removal say: its proof, the barriers, the ratios not reached."""
    proof = next((re.search(r"to ([\d.e+-]+)", note) for note in notes if note.startswith("proven equal")), None)
    barriers = [note for note in notes if "can't shrink" in note and "the model gives" not in note]
    short = [note for note in notes if "of 50% asked" in note]
    inexact = [note for note in notes if note.startswith("inexact")]
    return {"error": float(proof.group(1)) if proof else None, "barriers": barriers, "shortfalls": short,
            "inexact": len(inexact)}


def main() -> None:
    suite, name, core = sys.argv[1:4]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) % (os.cpu_count() or 1)})
    sys.path.insert(0, str(Path(__file__).parent))
    import warnings

    import torch

    from fxcompress.diagnostics import FxcError
    from zoo_models import Entry
    from zoo_peer import peer

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"ok": False, "stage": "build"}
    try:
        contestant = peer if "--peer" in sys.argv else ours
        entry, brief = Entry(suite, name, "--full" in sys.argv), "--brief" in sys.argv
        if brief:
            contestant(entry, {}, brief)
        contestant(entry, result, brief)
    except FxcError as error:
        result.update(reason=f"{type(error).__name__}: {error}", refused=True)
    except WrongError as error:
        result.update(reason=f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001  # whatever a model raises is its result, and its row says so
        result.update(reason=f"{type(error).__name__}: {error}", traceback=traceback.format_exc(limit=-8), crash=True)
    import resource

    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
