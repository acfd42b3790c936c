"""How `remove` grows with the model: chains of residual blocks, and a Llama of a billion parameters without weights.

    python benchmarks/remove_scaling.py [--blocks 100 1000 10000] [--only chains|llama]

Each measurement is a process of its own, on one thread; seconds are processor time. Memory is the growth of the
process's peak over what it was before. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

WIDTH = 8


def peak() -> float:
    """The peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def chain(blocks: int) -> Any:
    """`blocks` residual blocks of two convolutions and a batch norm, between a first and a last layer."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)
            self.second = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)

        def forward(self, x: Any) -> Any:
            return x + self.second(self.norm(self.first(x)).relu())

    body = [Block() for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(3, WIDTH, 1), *body, nn.Conv2d(WIDTH, 10, 1)).eval()


def everything(captured: Any, what: str = "channels") -> Any:
    """A site of all nodes."""
    from fxcompress.graph.site import Site

    return Site(tuple(node for node in captured.graph.nodes if node.op != "output"), what, selection="*")


def measure_chain(blocks: int) -> dict[str, float]:
    """Seconds and memory of each step on one chain."""
    import torch

    import fxcompress
    from fxcompress.graph.coupling import analyse
    from fxcompress.passes.remove import Remove

    warm = fxcompress.capture(chain(1), torch.zeros(2, 3, 2, 2))
    Remove(ratio=0.5, verify="off").rewrite(warm, everything(warm))
    model, x = chain(blocks), torch.zeros(2, 3, 2, 2)
    numbers: dict[str, float] = {"blocks": blocks}
    before, start = peak(), time.process_time()
    captured = fxcompress.capture(model, x)
    numbers.update(capture=time.process_time() - start, capture_mib=peak() - before, nodes=captured.facts.nodes)
    before, start = peak(), time.process_time()
    analyse(captured)
    numbers["analyse"] = time.process_time() - start
    start = time.process_time()
    Remove(ratio=0.5, verify="off").rewrite(captured, everything(captured))
    numbers.update(rewrite=time.process_time() - start - numbers["analyse"], mib=peak() - before)
    with torch.no_grad():
        captured.module(x)
    return numbers


def measure_llama() -> dict[str, Any]:
    """Capture, analyse and plan a Llama of a billion parameters on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fxcompress
    from fxcompress.graph.coupling import analyse
    from fxcompress.passes.remove import Remove

    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, 16, dtype=torch.long)
    before, start = peak(), time.process_time()
    captured = fxcompress.capture(model, {"input_ids": ids})
    numbers: dict[str, Any] = {
        "capture": time.process_time() - start, "way": captured.way, "nodes": captured.facts.nodes,
        "params": captured.facts.params, "macs": captured.facts.macs}
    start = time.process_time()
    analyse(captured)
    numbers["analyse"] = time.process_time() - start
    skeleton = captured.skeleton()
    start = time.process_time()
    outcome = Remove(ratio=0.5).rewrite(skeleton, everything(skeleton))
    numbers.update(plan=time.process_time() - start, changes=len(outcome.changes), params_after=skeleton.facts.params,
                   macs_after=skeleton.facts.macs, notes=list(outcome.notes))
    held = [p for one in (model, captured.module, skeleton.module) for p in one.parameters() if p.device.type != "meta"]
    numbers.update(before_mib=before, peak_mib=peak(), weights_mib=captured.facts.params * 4 / 2**20,
                   allocated=sum(p.numel() for p in held))
    return numbers


def apart(*arguments: str) -> dict[str, Any]:
    """Run this file for one measurement, in its own process."""
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def show_chains(counts: list[int]) -> None:
    """A table with a row for each chain."""
    head = ["blocks", "nodes", "capture s", "analyse s", "rewrite s", "analyse + rewrite, ms a block",
            "capture, ms a block", "capture, KiB a block", "analyse + rewrite, KiB a block"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for count in counts:
        n = apart("chain", str(count))
        each = [f"{1000 * (n['analyse'] + n['rewrite']) / count:.2f}", f"{1000 * n['capture'] / count:.2f}",
                f"{1024 * n['capture_mib'] / count:.0f}", f"{1024 * n['mib'] / count:.0f}"]
        seconds = [f"{n[key]:.2f}" for key in ("capture", "analyse", "rewrite")]
        cells = [f"{count:,}", f"{n['nodes']:,}", *seconds, *each]
        print(f"| {' | '.join(cells)} |", flush=True)


def show_llama() -> None:
    """What came of the Llama."""
    n = apart("llama")
    print(f"\nA Llama of {n['params'] / 1e9:.2f} billion parameters ({n['weights_mib']:,.0f} MiB of weights), on the "
          f"meta device: captured by {n['way']} in {n['capture']:.1f} s ({n['nodes']:,} nodes), analysed in "
          f"{n['analyse']:.2f} s, planned in {n['plan']:.2f} s ({n['changes']} layers get smaller; parameters x "
          f"{n['params_after'] / n['params']:.2f}, MACs x {n['macs_after'] / n['macs']:.2f}). Weights allocated: "
          f"{n['allocated']}; peak memory {n['peak_mib']:,.0f} MiB, of which {n['before_mib']:,.0f} before.")
    for note in n["notes"]:
        print(f"- {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--only", choices=["chains", "llama"])
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(measure_llama() if args.one[0] == "llama" else measure_chain(int(args.one[1]))))
        return
    if args.only != "llama":
        show_chains(args.blocks)
    if args.only != "chains":
        show_llama()


if __name__ == "__main__":
    main()
