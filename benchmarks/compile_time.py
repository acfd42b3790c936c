"""How long the compiler takes, as Markdown tables. Every measurement is a fresh process; medians of several.

    make bench                                              # or:
    python benchmarks/compile_time.py [--repeat 5] [--peer]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODELS = ("resnet50", "mobilenet_v2")
RATIO = 0.3
POLICY = f"""
policy bench {{
    let body = conv2d[out_channels >= 8] - first(conv2d)
    phase shrink {{
        remove channels(body) {{ ratio = {RATIO:.0%}, by = l1 }}
    }}
    phase sparsify after shrink {{
        mask linear {{ sparsity = 50% }}
    }}
}}
"""

# Each prints its seconds as JSON. Imports are not counted, save by `cold`.
JOBS = {
    "plan": """
import json, time, torch, torchvision, fxcompress
model, example = getattr(torchvision.models, NAME)().eval(), (torch.zeros(1, 3, 224, 224),)
policy = fxcompress.parse(POLICY)
fxcompress.plan, fxcompress.compile
start = time.perf_counter(); captured = fxcompress.capture(model, example); mid = time.perf_counter()
fxcompress.plan(policy, model, example); end = time.perf_counter()
print(json.dumps({"capture": mid - start, "plan": end - mid}))
""",
    "compile": """
import json, time, torch, torchvision, fxcompress
model, example = getattr(torchvision.models, NAME)().eval(), (torch.zeros(1, 3, 224, 224),)
policy = fxcompress.parse(POLICY)
fxcompress.plan, fxcompress.compile
start = time.perf_counter(); result = fxcompress.compile(policy, model, example)
mid = time.perf_counter(); result.finalize(target="cpu"); end = time.perf_counter()
print(json.dumps({"compile": mid - start, "finalize": end - mid}))
""",
    "fxcompress": """
import json, time, torch, torchvision, fxcompress
model, example = getattr(torchvision.models, NAME)().eval(), (torch.zeros(1, 3, 224, 224),)
removal = fxcompress.passes.Remove(ratio=RATIO, by="l1", verify=VERIFY)
start = time.perf_counter(); captured = fxcompress.capture(model, example); mid = time.perf_counter()
thin = removal.apply(captured, "conv2d", what="channels"); end = time.perf_counter()
print(json.dumps({"trace": mid - start, "remove": end - mid,
                  "params": thin.facts.params / captured.facts.params}))
""",
    "Torch-Pruning": """
import json, time, torch, torchvision, torch_pruning as tp
model, example = getattr(torchvision.models, NAME)().eval(), torch.zeros(1, 3, 224, 224)
dense = sum(p.numel() for p in model.parameters())
heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
start = time.perf_counter()
pruner = tp.pruner.MagnitudePruner(model, example, tp.importance.MagnitudeImportance(p=1), pruning_ratio=RATIO,
                                   ignored_layers=heads)
mid = time.perf_counter(); pruner.step(); end = time.perf_counter()
print(json.dumps({"trace": mid - start, "remove": end - mid,
                  "params": sum(p.numel() for p in model.parameters()) / dense}))
""",
}


def median_of(job: str, model: str, repeat: int) -> dict[str, float]:
    """The median of each number that the job prints."""
    name, _, without = job.partition(" without ")
    settings = {"NAME": model, "RATIO": RATIO, "POLICY": POLICY, "VERIFY": "off" if without else "on"}
    code = "\n".join([*(f"{key} = {value!r}" for key, value in settings.items()), JOBS[name]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                                      env=environment).stdout.splitlines()[-1]) for _ in range(repeat)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def wall(command: list[str], repeat: int) -> float:
    """The median wall time of a command, in seconds, its start included."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def long_policy(actions: int) -> str:
    """A policy of `actions` actions, each on its own layer."""
    lines = [f'    mask "layer{i}" {{ sparsity = 50%, by = magnitude }}' for i in range(actions)]
    return "\n".join(["policy long {", *lines, "}", ""])


def check_table(repeat: int) -> list[list[str]]:
    check = [str(Path(sys.executable).parent / "fxcompress"), "check"]
    example = str(ROOT / "examples/lenet_mnist/policy.fxc")
    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder, "long.fxc")
        long.write_text(long_policy(1000), encoding="utf-8")
        return [
            ["`fxcompress check examples/lenet_mnist/policy.fxc`", f"{wall([*check, example], repeat):.2f}"],
            ["`fxcompress check`, a policy of 1,000 actions", f"{wall([*check, str(long)], repeat):.2f}"],
        ]


def compile_table(repeat: int) -> list[list[str]]:
    rows = []
    for model in MODELS:
        numbers = {**median_of("plan", model, repeat), **median_of("compile", model, repeat)}
        rows.append([model, *(f"{numbers[key]:.2f}" for key in ("capture", "plan", "compile", "finalize"))])
    return rows


def removal_table(repeat: int, jobs: list[str]) -> list[list[str]]:
    rows = []
    for model in MODELS:
        for job in jobs:
            numbers = median_of(job, model, repeat)
            seconds = (f"{numbers[key]:.2f}" for key in ("trace", "remove"))
            rows.append([model, job, *seconds, f"{numbers['params']:.0%}"])
    return rows


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"### {title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="processes a measurement")
    parser.add_argument("--peer", action="store_true", help="measure Torch-Pruning too")
    args = parser.parse_args()
    print(f"Seconds, one thread, medians of {args.repeat} processes; {platform.machine()}, "
          f"Python {platform.python_version()}.\n")
    show("Cold start of the command, imports included", ["command", "s"], check_table(args.repeat))
    show(f"Remove {RATIO:.0%} of channels and mask the classifier, 224 x 224",
         ["model", "capture", "plan", "compile", "finalize"], compile_table(args.repeat))
    jobs = ["fxcompress", "fxcompress without its proof", *(["Torch-Pruning"] if args.peer else [])]
    show(f"Remove {RATIO:.0%} of channels, by l1, nothing else", ["model", "by", "trace", "remove", "parameters left"],
         removal_table(args.repeat, jobs))


if __name__ == "__main__":
    main()
