"""`fxcompress train`: a whole policy from the command line, alone or under `accelerate launch`."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import inspect as inspection
from .commands import reporting
from .plan import read_policy
from .policy import load_policy
from .render import clean, print_text
from .spec import load_spec
from .spec_training import load_training
from .training import Settings, Trainer

ORIGINAL = "original"  # as a teacher: the model itself, as it was before the policy


@dataclass(frozen=True)
class Specs:
    """What is trained on what: SPECs of the model, its teacher and the data, and files of weights."""

    model: str
    data: str
    weights: Path | None = None
    teacher: str | None = None
    teacher_weights: Path | None = None


@reporting
def train_policy(policy_path: Path, specs: Specs, output: Path, choices: Mapping[str, Any],
                 params: Mapping[str, object] | None = None, resume: bool = False) -> int:
    """Train the model by the policy, with the `choices` of `Settings`, and write checkpoints, metrics, pictures and the
    artifact into `output`. Lines are printed by the main process alone."""
    settings = Settings(**choices)
    policy = load_policy(policy_path, dict(params or {}))
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)  # the same weights in each process, and again when it is resumed
    loaded = load_spec(specs.model, specs.weights, policy.inputs)
    teacher: Any = specs.teacher
    if teacher is not None and teacher != ORIGINAL:
        teacher = load_spec(teacher, specs.teacher_weights, policy.inputs).model
    data = load_training(specs.data, loaded.example_inputs, settings.seed)
    trainer = Trainer(read_policy(policy, None, teacher), loaded.model, data, loaded.example_inputs, output=output,
                      teacher=teacher, settings=settings)
    main = trainer.accelerator.is_main_process

    def say(line: str) -> None:
        if main:
            print(clean(line), flush=True)

    for note in data.notes:
        say(note)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are in `result.warnings`, and printed from there
        trained = trainer.fit(resume=resume, progress=True, say=say)
    if not main or trained.deployed is None:
        return 0
    print_text(trained.result.warnings)
    report = inspection.report(trained.deployed, name=f"policy {policy.name}").show()
    sys.stdout.write("\n" + clean(report, keep_newlines=True) + "\n")
    for note in trained.notes:
        if note not in data.notes:
            say(note)
    if trained.final:
        say(f"the finished model: {', '.join(f'{name} {value:.4f}' for name, value in trained.final.items())}")
    print(f"\nthe artifact is in {trained.artifact}")
    return 0
