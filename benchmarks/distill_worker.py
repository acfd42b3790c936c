"""One contestant of `distill_step.py` in a process of its own: it trains a step whenever it is told to.

    python benchmarks/distill_worker.py vgg11_shufflenet 16 fused

Speaks as `quantize_worker.py` does; what it says when it is ready is the loss behind the first steps, which must be the
same for all who learn from the teacher, parameter counts, and the most memory that the process held during two steps.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
from quantize_worker import Run, begun, serve

if TYPE_CHECKING:
    from torch import Tensor, nn

    import fxcompress

SIZE, CLASSES, STEPS = 64, 10, 3  # pixels; classes; steps before the loss is told
COMPILED = "_compiled"
SOFT = """pair output <- output { loss = kl, temperature = 4, weight = 0.9 }
    pair output <- targets { loss = cross_entropy, weight = 0.1 }"""
FEATURES = ("layer1", "layer2", "layer3")
PAIRS = "\n".join(f'pair "{name}" <- "{name}" {{ loss = mse }}' for name in FEATURES)
MASK = 'mask conv2d[name ~ "layer[234].**"] { sparsity = 50% }'
Losses = Callable[[], "Tensor"]


@dataclass(frozen=True)
class Setup:
    """Who teaches whom. `features` are the layers that are compared, of both; without any, outputs are. `masked`: the
    student is the teacher with half of its weights masked, and both have the same frozen stem."""

    student: str
    teacher: str
    features: tuple[str, ...] = ()
    masked: bool = False

    def policy(self, settings: str = "") -> str:
        """The policy of the fused graph, with `settings` of `distill`."""
        pairs = f"{PAIRS}\npair output <- targets {{ loss = cross_entropy }}" if self.features else SOFT
        if self.masked:
            return f"policy p {{\ndistill from original {{\n{settings}\n{pairs}\n}}\n{MASK}\n}}"
        return f"policy p(teacher: model) {{\ndistill from teacher {{\n{settings}\n{pairs}\n}}\n}}"


SETUPS: Mapping[str, Setup] = {
    "vgg11_shufflenet": Setup("shufflenet_v2_x0_5", "vgg11"),
    "resnet34_resnet18": Setup("resnet18", "resnet34", FEATURES),
    "masked_resnet18": Setup("resnet18", "resnet18", masked=True),
}


class Job:
    """The models of a setup and a batch, the same in every process."""

    def __init__(self, name: str, batch: int) -> None:
        import torch
        import torchvision

        self.setup = setup = SETUPS[name]
        torch.manual_seed(0)
        self.images, self.labels = torch.randn(batch, 3, SIZE, SIZE), torch.randint(0, CLASSES, (batch,))
        make = torchvision.models.get_model
        self.student: nn.Module = make(setup.student, num_classes=CLASSES)
        if setup.masked:
            statistics(self.student, self.images)
            freeze_stem(self.student)
        self.teacher: nn.Module = copy.deepcopy(self.student) if setup.masked else make(
            setup.teacher, num_classes=CLASSES)
        statistics(self.teacher, self.images)
        self.teacher.eval().requires_grad_(False)
        self.student.train()


def statistics(model: nn.Module, images: Tensor) -> None:
    """Give norms the statistics of `images`: with none, activations of a deep network grow without bound."""
    import torch

    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1


def freeze_stem(model: Any) -> None:
    """Freeze the first convolution and `layer1`, and make their norms constant, as detectors of torchvision do."""
    import torch
    from torchvision.ops import FrozenBatchNorm2d

    def constant(norm: nn.Module) -> nn.Module:
        made = FrozenBatchNorm2d(norm.num_features)
        made.load_state_dict({key: value for key, value in norm.state_dict().items() if key in made.state_dict()})
        return made

    model.bn1 = constant(model.bn1)
    for part in list(model.layer1.modules()):
        for name, child in part.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(part, name, constant(child))
    for part in (model.conv1, model.layer1):
        part.requires_grad_(False)


# What others do


def masked(job: Job) -> nn.Module:
    """The student, half of its weights masked by torch where the setup says so."""
    import torch
    from torch.nn.utils import prune

    for name, part in job.student.named_modules():
        if job.setup.masked and isinstance(part, torch.nn.Conv2d) and re.match("layer[234]", name):
            prune.l1_unstructured(part, "weight", 0.5)
    return job.student


def soft(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss of Hinton, Vinyals and Dean, as everybody writes it."""
    import torch.nn.functional as F

    kl = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")
    return 0.9 * 16 * kl + 0.1 * F.cross_entropy(student, labels)


def walk(model: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """What a ResNet gives that was written to give its features too."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    found = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(model, name)(x)
        found.append(x)
    return found[:3], model.fc(model.avgpool(x).flatten(1))


def student(job: Job) -> tuple[Losses, nn.Module]:
    """No teacher: what the student's step costs by itself."""
    import torch.nn.functional as F

    net = masked(job)
    return lambda: F.cross_entropy(net(job.images), job.labels), net


def loop(job: Job) -> tuple[Losses, nn.Module]:
    """Two models, and `torch.no_grad` for one; features come from models that give them."""
    import torch
    import torch.nn.functional as F

    net, teacher = masked(job), job.teacher

    def logits() -> Tensor:
        with torch.no_grad():
            given = teacher(job.images)
        return soft(net(job.images), given, job.labels)

    def features() -> Tensor:
        with torch.no_grad():
            given, _ = walk(teacher, job.images)
        found, output = walk(net, job.images)
        total = F.cross_entropy(output, job.labels)
        for mine, theirs in zip(found, given, strict=True):
            total = total + F.mse_loss(mine, theirs)
        return total

    return features if job.setup.features else logits, net


def hooks(job: Job) -> tuple[Losses, nn.Module]:
    """Two models whose features forward hooks put aside."""
    import torch
    import torch.nn.functional as F

    net, teacher = masked(job), job.teacher
    mine: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}

    def kept(aside: dict[str, Tensor], name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            aside[name] = output

        return hook

    for name in job.setup.features:
        net.get_submodule(name).register_forward_hook(kept(mine, name))
        teacher.get_submodule(name).register_forward_hook(kept(theirs, name))

    def losses() -> Tensor:
        with torch.no_grad():
            teacher(job.images)
        total = F.cross_entropy(net(job.images), job.labels)
        for name in job.setup.features:
            total = total + F.mse_loss(mine[name], theirs[name])
        return total

    return losses, net


# What we do


def compressed(job: Job, settings: str = "") -> fxcompress.Result:
    """The job's models as one."""
    import fxcompress

    teacher = None if job.setup.masked else job.teacher
    return fxcompress.compile(job.setup.policy(settings), job.student, job.images, teacher=teacher)


def fused(job: Job) -> tuple[Losses, nn.Module]:
    """One graph."""
    module = compressed(job).module
    return lambda: module(job.images, targets=job.labels, losses=True).total, module


def cached(job: Job) -> tuple[Losses, nn.Module]:
    """One graph, whose teacher has answered before."""
    import torch
    from torch.utils.data import TensorDataset

    from fxcompress.training import keep_teacher

    result, indices = compressed(job, "cache = memory"), torch.arange(len(job.images))
    kept, module = keep_teacher(result, TensorDataset(job.images, job.labels), batch=len(job.images)), result.module

    def losses() -> Tensor:
        known = kept[indices]
        return module(job.images, targets=job.labels, losses=True, teacher_logits=known).total

    return losses, module


CONTESTANTS: Mapping[str, Callable[[Job], tuple[Losses, nn.Module]]] = {
    "student": student, "loop": loop, "hooks": hooks, "fused": fused, "cached": cached}


def stepping(losses: Losses, net: nn.Module) -> Run:
    """A whole step of training."""
    import torch

    optimizer = torch.optim.SGD([each for each in net.parameters() if each.requires_grad], lr=0.01, momentum=0.9)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = losses()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def prepared(name: str, batch: int, contestant: str) -> tuple[Run, dict[str, Any]]:
    """A step that has run before, and what there is to tell."""
    import torch

    begin = time.perf_counter()
    job = Job(name, batch)
    counts = [sum(each.numel() for each in model.parameters()) for model in (job.student, job.teacher)]
    losses, net = CONTESTANTS[contestant.removesuffix(COMPILED)](job)
    if contestant.endswith(COMPILED):
        losses = torch.compile(losses, fullgraph=contestant.startswith("fused"))
    del job.student, job.teacher  # who needs them holds them
    run = stepping(losses, net)
    for _ in range(STEPS):
        loss = float(run())
    left = sum(each.numel() for path, each in net.named_buffers() if ".fused.teacher." in f".{path}")
    return run, {"loss": loss, "student": counts[0], "teacher": counts[1], "teacher_left": left,
                 "seconds": time.perf_counter() - begin, "memory": peak(run)}


def peak(run: Run) -> float:
    """MiB: the most that was resident while it ran twice, the interpreter and its libraries with it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    run()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def main() -> None:
    (model, batch, contestant), send = begun()
    try:
        run, told = prepared(model, int(batch), contestant)
    except Exception as error:  # noqa: BLE001  whatever goes wrong with a contestant is its row of the table
        import traceback

        traceback.print_exc()
        send({"error": f"{type(error).__name__}: {error}"})
        return
    send({"ready": True, **told})
    serve(run, sys.stdin, send)


if __name__ == "__main__":
    main()
