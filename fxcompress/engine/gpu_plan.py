"""What `finalize(target="cuda")` would build, seen on a machine without a GPU."""

from __future__ import annotations

from ..backends.cuda import Gpu
from ..graph.captured import Captured
from .finish import take_masks_off, take_training_off
from .gpu import OnFakes, on_fakes
from .integers import require_ranges


def plan_for_gpu(captured: Captured, gpu: Gpu | None = None) -> OnFakes:
    """The graph for a GPU (of compute capability 8.0 without `gpu`), made of a copy of `captured` and checked node by
    node on fake CUDA tensors. Nothing runs on a device, so that results aren't held against the simulation.

    Raises PlanError: FXC0572 for quantized layers that weren't calibrated, FXC0580 where an operator can't be computed
    on a GPU, FXC0581 for weights out of the range of half precision.
    """
    require_ranges(captured)
    final = captured.copy()
    take_masks_off(final, fold=True)
    take_training_off(final)
    final.module.eval()
    return on_fakes(final, gpu)
