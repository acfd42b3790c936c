"""How near the embeddings of the quantized MiniLM are to those of fp32: mean cosine over real sentences.

    python benchmarks/quantize_minilm.py [--only static ...] [--peer] [--out benchmarks/results/quantize_minilm.csv]
    python benchmarks/quantize_minilm.py --show      # the table of the CSV, without running anything

The model and the sentences are those of `minilm.py`: 128 sentences to calibrate on, 256 from other documents to test
on. What is measured is the finalized model: integer kernels on this CPU, and attention as files compute it. A policy
that this version can't read is said to be so. With `--peer` torch's own `quantize_dynamic` is measured too, in a
process of its own.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

import fxcompress
from fxcompress.diagnostics import PolicyError
from fxcompress.nn.attention import rounding

sys.path.insert(0, str(Path(__file__).parent))
from minilm import MiniLM, batches, sentences
from tables import Row, markdown, read, write

RESULTS = Path(__file__).parent / "results/quantize_minilm.csv"
COLUMNS = ("way", "weights", "values", "settings", "cosine", "least", "layers", "bytes")
BATCH = 32
_NARROW = "bits = 8 bits, weight_bits = 7 bits"  # no two products of these saturate 16 bits
_FITS = "bits = 8 bits, fit_pairs = true"  # nor of these
# Name -> bits of weights and of values, for the table, and the settings of `quantize linear`.
WAYS: Mapping[str, tuple[str, str, str]] = {
    "static, values in 7 bits": ("8", "7", "bits = 7 bits"),
    "static, weights in 7 bits": ("7", "8", _NARROW),
    "static, weights in 7 bits, smooth": ("7", "8", f"{_NARROW}, smooth = 50%"),
    "static, weights that fit": ("8", "8", _FITS),
    "static, weights that fit, smooth": ("8", "8", f"{_FITS}, smooth = 50%"),
    "static, weights that fit, attention": ("8", "8", f"{_FITS}, attention = true"),
    "static, weights that fit, smooth, attention": ("8", "8", f"{_FITS}, smooth = 50%, attention = true"),
    "dynamic, per tensor": ("8", "7", "mode = dynamic, bits = 7 bits"),
    "dynamic, per tensor, weights in 7 bits": ("7", "8", f"mode = dynamic, {_NARROW}"),
    "dynamic, per tensor, weights that fit": ("8", "8", f"mode = dynamic, {_FITS}"),
    "dynamic, per token": ("8", "7", "mode = dynamic, bits = 7 bits, activations = per_token"),
    "dynamic, per token, weights in 7 bits": ("7", "8", f"mode = dynamic, {_NARROW}, activations = per_token"),
    "dynamic, per token, weights that fit": ("8", "8", f"mode = dynamic, {_FITS}, activations = per_token"),
    "weights alone, int8": ("8", "32", "mode = weight_only"),
    "weights alone, int4": ("4", "32", "mode = weight_only, weight_bits = 4 bits, granularity = per_group(32)"),
    "weights alone, int4, gptq": ("4", "32", "mode = weight_only, weight_bits = 4 bits, granularity = per_group(32), "
                                             "gptq = true"),
}
PEER = "torch.ao quantize_dynamic"


def measure(way: str) -> Row | None:
    """One way to quantize all linear layers; None where its policy can't be read."""
    weights, values, settings = WAYS[way]
    calibration, test = sentences()
    model = MiniLM()
    try:
        policy = fxcompress.parse(f"policy embed {{ quantize linear {{ {settings} }} }}")
    except PolicyError as error:
        print(f"{way}: {error.diagnostics[0].message}", flush=True)
        return None
    feed = batches(calibration, BATCH)
    result = fxcompress.compile(policy, model, feed[0], calibration=feed)
    final = result.finalize(target="cpu")
    layers = sum(_holds_bytes(final.get_submodule(str(node.target))) for node in final.graph.nodes
                 if node.op == "call_module")
    with rounding(final):
        mean, least = cosines(embeddings(final, test), embeddings(model, test))
    return {"way": way, "weights": weights, "values": values, "settings": settings, "cosine": mean, "least": least,
            "layers": layers, "bytes": size(final) / size(model)}


def _holds_bytes(module: torch.nn.Module) -> bool:
    return any(tensor.dtype in (torch.int8, torch.uint8) for tensor in module.state_dict().values())


def peer() -> Row:
    """Dynamic quantization as torch has it."""
    torch.set_num_threads(1)
    test, model = sentences()[1], MiniLM()
    expected = embeddings(model, test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.ao.quantization.quantize_dynamic(  # noqa: TID251
            model, {torch.nn.Linear}, torch.qint8)
    mean, least = cosines(embeddings(found, test), expected)
    return {"way": PEER, "weights": "8", "values": "8", "cosine": mean, "least": least, "layers": 36}


@torch.no_grad()
def embeddings(model: Callable[..., Tensor], texts: list[str]) -> Tensor:
    """[N, 384]."""
    return torch.cat([model(**batch) for batch in batches(texts, BATCH)])


def cosines(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The mean and the least cosine of each row with that of the other."""
    cosine = torch.nn.functional.cosine_similarity(found.double(), expected.double())
    return float(cosine.mean()), float(cosine.min())


def size(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def table(rows: list[Row]) -> str:
    """The Markdown table."""
    return markdown(("", "weights, bits", "values, bits", "mean cosine", "least", "bytes of fp32"), [
        (str(row["way"]), str(row["weights"]), str(row["values"]), f"{float(row['cosine']):.4f}",
         f"{float(row['least']):.3f}", f"{float(row['bytes']):.2f}" if row["bytes"] else "") for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--peer", action="store_true", help="measure torch's quantize_dynamic too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the CSV")
    args = parser.parse_args()
    if not args.show:
        torch.set_num_threads(1)
        rows = {row["way"]: row for row in read(args.out)}
        for way in args.only:
            row = measure(way)
            if row is not None:
                rows[way] = row
                write(args.out, [rows[name] for name in (*WAYS, PEER) if name in rows], COLUMNS)
        if args.peer:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                rows[PEER] = pool.submit(peer).result()
            write(args.out, rows.values(), COLUMNS)
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
