"""How fast quantized models are beside other systems, all in turn in one run, on one core.

    python benchmarks/quantize_speed.py --peers [--models resnet18 vgg11] [--batches 1 16] [--resume]
    python benchmarks/quantize_speed.py --only ours_int8 ort_int8     # these alone, beside eager PyTorch and our fp32
    python benchmarks/quantize_speed.py --peers --without-vnni        # as on a CPU without VNNI instructions
    python benchmarks/quantize_speed.py --show                        # the tables of the CSV, without running anything

Each contestant has its own process, all are prepared before any is timed, and each is timed once a round, on the same
core, in an order that chance gives; then all over again, with other processes. A round's ratio is the time of eager
fp32 over the contestant's in that round. Inputs are 224 x 224, or 128 tokens. Times are processor time of all threads
of the process, which one core bounds.
Packages: `pip install -e ".[bench,peers]"`. What is converted is kept in out/quantize_speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from quantize_models import MODELS, TRANSFORMERS
from quantize_process import TOLD, Measured, Rounds, instructions, measure, options
from tables import Row, markdown, number, read, write

RESULTS = Path(__file__).parent / "results/quantize_speed.csv"
WITHOUT_VNNI = RESULTS.with_name("quantize_speed_without_vnni.csv")
COLUMNS = ("model", "batch", "contestant", "rounds", "ms", "speed", "low", "high", "over_fp32", "drift", "prepare_s",
           "memory_mib", "detail", "cpu", "run", "error")
BASE, FLOAT = "eager", "ours_fp32"
OURS = ("eager", "ours_fp32", "ours_fp32_compiled", "ours_int8", "ours_int8_compiled", "ours_dynamic",
        "ours_dynamic_compiled", "ours_auto")
PEERS = ("inductor", "ao_x86", "ao_onednn", "pt2e", "pt2e_cpp", "ort_fp32", "ort_int8", "ort_dynamic", "ov_fp32",
         "ov_int8")
CANT_BE_TOLD = ("ours_auto", "ort_fp32", "ort_int8", "ort_dynamic", "ov_fp32", "ov_int8")  # to do without VNNI
TRANSFORMERS_ONLY = ("ort_dynamic", "ours_dynamic", "ours_dynamic_compiled")
AGAINST = (  # what is compared below the tables: a name, ours, and the peers of which the fastest counts
    ("`auto`", ("ours_auto",), "the fastest peer", PEERS),
    ("The int8 GraphModule", ("ours_int8", "ours_dynamic"), "torch.ao's faster engine", ("ao_x86", "ao_onednn")),
    ("Compiled int8", ("ours_int8_compiled", "ours_dynamic_compiled"), "PT2E + Inductor", ("pt2e", "pt2e_cpp")))
GARBAGE = 0.5  # drift beyond which an output says nothing of what fp32 says
# Column of the table -> the contestants of which it shows the fastest.
SHOWN: Mapping[str, tuple[str, ...]] = {
    "ours fp32": ("ours_fp32",), "compiled fp32": ("ours_fp32_compiled",), "int8": ("ours_int8", "ours_dynamic"),
    "compiled int8": ("ours_int8_compiled", "ours_dynamic_compiled"), "`auto`": ("ours_auto",),
    "Inductor fp32": ("inductor",), "torch.ao": ("ao_x86", "ao_onednn"), "PT2E + Inductor": ("pt2e", "pt2e_cpp"),
    "ONNX Runtime fp32": ("ort_fp32",),
    "int8 (ORT)": ("ort_int8", "ort_dynamic"), "OpenVINO fp32": ("ov_fp32",), "int8 (OV)": ("ov_int8",),
}


def contestants(model: str, peers: bool, only: Sequence[str], without_vnni: bool = False) -> list[str]:
    """Those that a model is timed with: always the two that others are measured by."""
    wanted = [BASE, FLOAT, *only] if only else [*OURS, *(PEERS if peers else ())]
    return [name for name in dict.fromkeys(wanted) if (name not in TRANSFORMERS_ONLY or model in TRANSFORMERS)
            and not (without_vnni and name in CANT_BE_TOLD)]


def ratios(base: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of how many times as fast it was, round by round."""
    each = [theirs / mine for theirs, mine in zip(base, times, strict=True)]
    if len(each) < 2:
        return each[0], each[0], each[0]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return low, middle, high


def rows_of(model: str, batch: int, names: Iterable[str], found: Measured, run: str) -> list[Row]:
    """A row for each contestant; one that failed has its error."""
    rows = []
    for name in names:
        row: Row = {"model": model, "batch": batch, "contestant": name, "cpu": instructions(), "run": run}
        told = found.told.get(name, {})
        row |= {"drift": told.get("drift", ""), "prepare_s": told.get("seconds", ""),
                "memory_mib": told.get("memory", ""), "detail": told.get("detail", "")}
        if name in found.errors:
            row["error"] = " ".join(found.errors[name].split())[:300]
        elif BASE not in found.times:
            row["error"] = f"{BASE} failed, to which it is compared"
        else:
            times = found.times[name]
            low, middle, high = ratios(found.times[BASE], times)
            row |= {"rounds": len(times), "ms": 1000 * statistics.median(times), "speed": middle, "low": low,
                    "high": high}
            if FLOAT in found.times:
                row["over_fp32"] = ratios(found.times[FLOAT], times)[1]
        rows.append(row)
    return rows


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """All rows in the order of models and batches, the new ones in the place of the old."""
    def key(row: Row) -> tuple[str, str, str]:
        return str(row["model"]), str(row["batch"]), str(row["contestant"])

    kept = {key(row): row for row in (*old, *new)}
    order = [*OURS, *PEERS]
    return sorted(kept.values(), key=lambda row: (
        MODELS.index(row["model"]), int(row["batch"]), order.index(row["contestant"])))


def done(rows: Iterable[Row], model: str, batch: int, names: Iterable[str]) -> bool:
    """Whether each of these has a row, one that failed too."""
    there = {row["contestant"] for row in rows if (row["model"], int(row["batch"])) == (model, batch)}
    return there >= set(names)


# Tables


Pair = tuple[str, int]


def best(rows: Mapping[str, Row], names: Sequence[str], key: str = "speed") -> Row | None:
    """The fastest of these that gave an answer worth having."""
    there = [rows[name] for name in names if name in rows and number(rows[name], key) is not None]
    sound = [row for row in there if not garbage(row)]
    return max(sound or there, key=lambda row: float(row[key]), default=None)


def garbage(row: Row) -> bool:
    found = number(row, "drift")
    return found is not None and not found <= GARBAGE


def by_pair(rows: Iterable[Row]) -> dict[Pair, dict[str, Row]]:
    found: dict[Pair, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], int(row["batch"])), {})[row["contestant"]] = row
    return found


def geometric(values: Sequence[float | None]) -> str:
    """The geometric mean, where all are there."""
    present = [value for value in values if value is not None]
    return f"{statistics.geometric_mean(present):.2f}" if values and len(present) == len(values) else "-"


def table(rows: list[Row]) -> str:
    """Markdown: speed over fp32 eager, then over our fp32, then what failed, and how it was measured."""
    pairs = by_pair(rows)
    shown = {head: names for head, names in SHOWN.items() if any(row["contestant"] in names for row in rows)}
    parts = ["Speed over fp32 eager:", _grid(pairs, shown, "speed"), "Speed over our fp32 GraphModule:",
             _grid(pairs, {head: names for head, names in shown.items() if head != "ours fp32"}, "over_fp32")]
    failed = [f"- {row['model']}, batch {row['batch']}, `{row['contestant']}`: "
              + str(row["error"]).replace("|", "/").replace("`", "'")[:160] for row in rows if row["error"]]
    return "\n\n".join([*parts, *(["Failed:\n\n" + "\n".join(failed)] if failed else []), *beside(pairs),
                        _how(rows, pairs)])


def beside(pairs: Mapping[Pair, Mapping[str, Row]]) -> Iterator[str]:
    """A sentence for each of `AGAINST`: where it is ahead, level (behind, but quartiles overlap) and behind."""
    for name, ours, theirs, peers in AGAINST:
        ahead, level, behind = 0, [], []
        for (model, batch), mine in pairs.items():
            one, other = best(mine, ours), best(mine, peers)
            if one is None or other is None or garbage(other):
                continue
            ratio = float(one["speed"]) / float(other["speed"])
            ahead += ratio >= 1
            if ratio < 1:
                (level if float(one["high"]) >= float(other["low"]) else behind).append(
                    f"{model} at batch {batch} ({1 - ratio:.1%})")
        if ahead or level or behind:
            yield f"{name} beside {theirs}: ahead or equal on {ahead} line{'s' * (ahead != 1)}" + (
                f"; behind, but quartiles overlap: {', '.join(level)}" if level else "") + (
                f"; behind: {', '.join(behind)}" if behind else "") + "."


def table_without_vnni(rows: list[Row]) -> str:
    """Markdown: speed over fp32 eager of what can be told to do without VNNI, and what that means."""
    pairs = by_pair(rows)
    shown = {head: names for head, names in SHOWN.items() if any(row["contestant"] in names for row in rows)}
    return "\n\n".join([_grid(pairs, shown, "speed"), (
        "Speed over fp32 eager. oneDNN, FBGEMM, MKL, ATen and Inductor were told to take this for a CPU with AVX2 and "
        "no more (`ONEDNN_MAX_CPU_ISA` and its like), so that byte products saturate as they do there; ONNX Runtime "
        "and OpenVINO, and with them `auto`, can't be told. A real CPU of that kind has other clocks and caches. "
        f"{_spread(rows)}.")])


def _grid(pairs: Mapping[Pair, Mapping[str, Row]], shown: Mapping[str, tuple[str, ...]], key: str) -> str:
    """A line for each model and batch, its fastest in bold; then geometric means over the lines where all of a
    column's are there, and over those that every column has."""
    values = {head: [best(mine, names, key) for mine in pairs.values()] for head, names in shown.items()}
    lines = []
    for place, ((model, batch), mine) in enumerate(pairs.items()):
        found = {head: values[head][place] for head in shown}
        top = max((float(row[key]) for row in found.values() if row is not None and not garbage(row)), default=0.0)
        eager = number(mine[BASE], "ms") if BASE in mine else None
        cells = [_cell(row, key, top, any(name in mine for name in shown[head])) for head, row in found.items()]
        lines.append([model, str(batch), "-" if eager is None else f"{eager:.3g}", *cells])
    whole = [place for place in range(len(pairs)) if all(values[head][place] is not None for head in shown)]
    lines.append(["geometric mean", "", "", *(
        geometric([None if row is None else float(row[key]) for row in values[head]]) for head in shown)])
    if 0 < len(whole) < len(pairs):
        lines.append([f"of the {len(whole)} lines without a gap", "", "", *(
            geometric([float(row[key]) for row in (values[head][place] for place in whole) if row is not None])
            for head in shown)])
    return markdown(["model", "batch", "eager ms", *shown], lines)


def _cell(row: Row | None, key: str, top: float, tried: bool) -> str:
    if row is None:
        return "failed" if tried else "not run"
    value = float(row[key])
    text = f"**{value:.2f}**" if value == top else f"{value:.2f}"
    return f"{text} (drift {float(row['drift']):.0%})" if garbage(row) else text


def _how(rows: Sequence[Row], pairs: Mapping[Pair, Mapping[str, Row]]) -> str:
    mixed = [f"{model} at batch {batch}" for (model, batch), mine in pairs.items()
             if len({row["run"] for row in mine.values()}) > 1]
    several = f" Not all of one run: {', '.join(mixed)}." if mixed else ""
    drifts = [float(row["drift"]) for row in rows if number(row, "drift") is not None and not garbage(row)]
    by_cpu: dict[str, list[str]] = {}
    for (model, batch), mine in pairs.items():
        by_cpu.setdefault(" or ".join(sorted({str(row["cpu"]) for row in mine.values()})), []).append(
            f"{model} at batch {batch}")
    most = max(by_cpu, key=lambda cpu: len(by_cpu[cpu]), default="")
    cpus = "; ".join([most, *(f"but {cpu} for {', '.join(names)}" for cpu, names in by_cpu.items() if cpu != most)])
    return (f"{_spread(rows)}. One pinned core ({cpus}), one thread, 224 x "
            "224, MiniLM 128 tokens; glibc's allocator keeps its pages (`MALLOC_TRIM_THRESHOLD_`, "
            "`MALLOC_MMAP_MAX_=0`), huge ones (`glibc.malloc.hugetlb=1`), for all. Activations of PyTorch's and "
            "weights of ONNX Runtime have 7 bits, which no CPU saturates; ours fit in pairs where 8 would. torch.ao: "
            "the faster of its engines x86 and onednn; PT2E: with or without the C++ wrapper; int8 of ONNX Runtime and "
            "ours: static or, for transformers, dynamic; ours round attention too, as NNCF does for OpenVINO, which "
            "GraphModules compute in floats; ours are loaded from where they were saved, but for what is compiled. "
            "Outputs were compared with fp32 eager's: norm of the difference at most "
            f"{max(drifts, default=0.0):.0%}, or shown.{several}")


def _spread(rows: Sequence[Row]) -> str:
    counts = sorted({int(row["rounds"]) for row in rows if number(row, "rounds") is not None})
    spread = [float(row["high"]) / float(row["low"]) - 1 for row in rows if number(row, "low") is not None
              and row["contestant"] != BASE]
    apart = statistics.median(spread) if spread else 0.0
    return (f"Medians of paired ratios, {counts[0] if counts else 0} to {counts[-1] if counts else 0} rounds; the "
            f"quartiles of a ratio lie {apart:.0%} apart in the median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--peers", action="store_true", help="the other systems too")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *PEERS), default=[], metavar="CONTESTANT",
                        help="these, in place of all: " + ", ".join((*OURS, *PEERS)))
    parser.add_argument("--resume", action="store_true", help="leave out what the CSV has")
    parser.add_argument("--without-vnni", action="store_true", help="tell the libraries that this CPU has no VNNI")
    options(parser, RESULTS)
    args = parser.parse_args()
    if args.without_vnni:
        os.environ.update(TOLD)  # which workers inherit
        args.out = WITHOUT_VNNI if args.out == RESULTS else args.out
    rows = read(args.out)
    run = time.strftime("%Y-%m-%d %H:%M")
    for model in () if args.show else args.models:
        for batch in args.batches:
            names = contestants(model, args.peers, args.only, args.without_vnni)
            if args.resume and done(rows, model, batch, names):
                continue
            begin = time.monotonic()
            found = measure(names, model, batch, Rounds.of(args), args.core, args.limit)
            new = rows_of(model, batch, names, found, run)
            rows = merged(rows, new)
            write(args.out, rows, COLUMNS)
            tell(new, time.monotonic() - begin)
    print((table_without_vnni if args.without_vnni else table)(read(args.out)))


def tell(rows: Sequence[Row], seconds: float) -> None:
    print(f"{rows[0]['model']}, batch {rows[0]['batch']}: {seconds:.0f} s", file=sys.stderr)
    for row in rows:
        what = row.get("error") or (
            f"{row['ms']:8.1f} ms  x {row['speed']:.2f} ({row['low']:.2f} to {row['high']:.2f})  "
            f"drift {row['drift']:.2g}  prepared in {row['prepare_s']:.0f} s, {row['memory_mib']:.0f} MiB")
        print(f"  {row['contestant']:20} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
