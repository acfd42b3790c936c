"""One contestant of `quantize_speed.py` in a process of its own: eager PyTorch, ours, or one of `quantize_peer.py`.

    python benchmarks/quantize_worker.py resnet18 1 ours_int8

Prepares the model, and writes a line of JSON: {"ready": true, "drift": ..., "seconds": ..., "memory": ...} or
{"error": ...}. Then it reads orders, a line each, and answers each with a line: `pin 1` (run on that core from now on),
`run 5` (run five times; {"seconds": of one}). It ends when its input does. What libraries print goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

sys.path.insert(0, str(Path(__file__).parent))
import quantize_peer
from quantize_models import Job, cached, made_by

if TYPE_CHECKING:
    from torch import Tensor

    import fxcompress

Run = Callable[[], Any]  # one forward pass; gives the output
FLOAT = "policy float { }"
STATIC = """use "std/quant.fxc" { int8 }
policy static { quantize conv2d | linear | multihead_attention as int8 { attention = true } }"""
DYNAMIC = """use "std/quant.fxc" { int8_dynamic }
policy dynamic { quantize linear | multihead_attention as int8_dynamic { } }"""

REMOVED = "remove channels(conv2d) { ratio = 50%, by = l1, align = 16 }"
# Half of the channels, then integers for what is left.
REMOVE = f"policy smaller {{ phase shrink {{ {REMOVED} }} }}"
REMOVE_AND_QUANTIZE = f"""use "std/quant.fxc" {{ int8 }}
policy smaller_int8 {{
    phase shrink {{ {REMOVED} }}
    phase deploy after shrink {{ quantize conv2d | linear as int8 {{ }} }}
}}"""
CALIBRATED = (STATIC, REMOVE_AND_QUANTIZE)


def eager(job: Job) -> Run:
    net, inputs = job.net, job.inputs
    return lambda: net(*inputs)


def compressed(job: Job, policy: str) -> fxcompress.Result:
    """The job's model under `policy`, calibrated."""
    import fxcompress

    if policy not in CALIBRATED:
        return fxcompress.compile(policy, job.net, job.inputs)
    return fxcompress.compile(policy, job.net, job.inputs, calibration=job.calibration)


def ours(policy: str, **options: Any) -> Callable[[Job], Run]:
    """The GraphModule that `finalize` gives under `policy`: saved by a process of its own, and loaded, as it is
    deployed, and as the files of other systems are."""
    def prepare(job: Job) -> Run:
        import fxcompress

        module, inputs = fxcompress.load(made_elsewhere(_save, job.model, job.batch, policy, options)), job.inputs
        return lambda: module(*inputs)

    return prepare


def made_elsewhere(make: Callable[..., None], *args: Any) -> Path:
    """A folder that `make(*args, folder)` has written to in a process of its own, which what it leaves in memory goes
    with. The script that started this worker finds it again for the next one, and takes it away."""
    def run(folder: Path) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
            maker.submit(make, *args, folder).result()

    key = hashlib.sha256(repr((make.__name__, *args)).encode()).hexdigest()[:16]
    return cached(made_by(os.getppid()) / key, run)


def _save(model: str, batch: int, policy: str, options: Mapping[str, Any], folder: Path) -> None:
    import torch

    import fxcompress

    torch.set_num_threads(1)
    with torch.no_grad():
        fxcompress.save(compressed(Job(model, batch), policy).finalize(target="cpu", **options), folder)


def ours_compiled(policy: str, **options: Any) -> Callable[[Job], Run]:
    """The same, compiled where it was made."""
    def prepare(job: Job) -> Run:
        module = compressed(job, policy).finalize(target="cpu", compile=True, **options)
        inputs = job.inputs
        return lambda: module(*inputs)

    return prepare


def auto(policy: str) -> Callable[[Job], Run]:
    """The fastest of what is installed; saved and loaded too."""
    def prepare(job: Job) -> Run:
        from fxcompress.backends.auto import Deployed

        deployed, inputs = Deployed.load(made_elsewhere(_save_fastest, job.model, job.batch, policy)), job.inputs

        def run() -> Any:
            return deployed(*inputs)

        run.detail = f"{deployed.engine} {deployed.precision}"  # type: ignore[attr-defined]
        return run

    return prepare


def _save_fastest(model: str, batch: int, policy: str, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    job = Job(model, batch)
    with torch.no_grad():
        compressed(job, policy).finalize(target="auto", data=job.calibration[0]).save(folder)


CONTESTANTS: Mapping[str, Callable[[Job], Run]] = {
    "eager": eager,
    "ours_fp32": ours(FLOAT, pack=True),
    "ours_fp32_compiled": ours_compiled(FLOAT, pack=True),
    "ours_int8": ours(STATIC),
    "ours_int8_compiled": ours_compiled(STATIC),
    "ours_dynamic": ours(DYNAMIC), "ours_dynamic_compiled": ours_compiled(DYNAMIC),
    "ours_auto": auto(STATIC),
    "ours_removed": ours(REMOVE),
    "ours_removed_int8": ours(REMOVE_AND_QUANTIZE),
    "ours_removed_auto": auto(REMOVE_AND_QUANTIZE),
    **quantize_peer.CONTESTANTS,
}
# Compiled under `no_grad`, as their documents have it.
NOT_INFERENCE = frozenset({"inductor", "pt2e", "pt2e_cpp", "ours_fp32_compiled", "ours_int8_compiled",
                           "ours_dynamic_compiled", "ours_auto", "ours_removed_auto"})


def reference(job: Job) -> Tensor:
    """The output of the eager model."""
    import torch

    def make(path: Path) -> None:
        torch.save(job.net(*job.inputs), path)

    found: Tensor = torch.load(cached(job.file("reference.pt"), make), weights_only=True)
    return found


def drift(found: Any, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected."""
    import torch

    found = next(iter(found.values())) if isinstance(found, dict) else found
    found = found[0] if isinstance(found, list | tuple) else found
    return float((torch.as_tensor(found).double() - expected).norm() / expected.double().norm())


def prepared(job: Job, contestant: str, send: Callable[[dict[str, Any]], None]) -> Run | None:
    """A forward pass that has run before; None, and the reason sent, where that fails."""
    import torch

    begin = time.perf_counter()
    try:
        with torch.no_grad():
            expected, run = reference(job), CONTESTANTS[contestant](job)
        with mode(contestant):
            run()
            found = drift(run(), expected)
    except Exception as error:  # noqa: BLE001  whatever a peer raises is its row of the table
        import traceback

        traceback.print_exc()
        send({"error": f"{type(error).__name__}: {error}"})
        return None
    job.__dict__.pop("net", None)  # a contestant that needs the float model holds it itself
    job.__dict__.pop("calibration", None)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the others need what preparing took
    send({"ready": True, "drift": found, "seconds": time.perf_counter() - begin, "memory": memory,
          "detail": getattr(run, "detail", "")})
    return run


def mode(contestant: str) -> Any:
    """In which it runs."""
    import torch

    return torch.no_grad() if contestant in NOT_INFERENCE else torch.inference_mode()


def timed(run: Run, repeats: int) -> float:
    """Processor seconds of one pass: what it takes on a core that does nothing else."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def serve(run: Run, orders: TextIO, send: Callable[[dict[str, Any]], None]) -> None:
    for line in orders:
        order, number = line.split()
        if order == "pin":
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), {int(number)})
            send({})
        elif order == "run":
            send({"seconds": timed(run, int(number))})
        else:
            raise ValueError(f"no such order: {order}")


def begun() -> tuple[list[str], Callable[[dict[str, Any]], None]]:
    """What this process was started for (model, batch, contestant), and what sends its answers, from one thread on.
    What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    import torch

    torch.set_num_threads(1)
    return sys.argv[1:], send


def main() -> None:
    (model, batch, contestant), send = begun()
    run = prepared(Job(model, int(batch)), contestant, send)
    if run is not None:
        with mode(contestant):
            serve(run, sys.stdin, send)


if __name__ == "__main__":
    main()
