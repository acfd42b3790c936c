"""`Trainer`: all phases of a policy in order, in one training; then the finished model, its report and its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..backends import save
from ..engine import Result
from ..engine import compile as compile_policy
from ..engine.finish import device_for
from ..plan import read_policy
from ..policy.model import Policy
from . import checkpoint, plots
from .data import Data, first_inputs, length, parted, size_of, training_loader, validation_loader
from .log import finite
from .run import Metrics, Run, Told
from .settings import Loss, Settings, make_loss
from .setup import accelerator_for, calibration_for, require_time
from .show import bar
from .step import begin_alike, prediction

if TYPE_CHECKING:
    from accelerate import Accelerator

ARTIFACT = "artifact"  # the folder of the finished model in the output folder


@dataclass(frozen=True)
class Trained:
    """What a training gives. On processes other than the main one `deployed` is None.

    * `result`: the module as it was trained, with the best weights if any were kept
    * `deployed`: the finished module, for the policy's target; saved in `artifact` where there is an output folder
    * `history`: a row an epoch: losses, `validation`, sparsity, parameters, what ramps have written
    * `final`: the metrics of `deployed` on the validation data
    """

    result: Result
    deployed: fx.GraphModule | None
    history: tuple[Mapping[str, Any], ...]
    best_epoch: int | None
    final: Mapping[str, float]
    artifact: Path | None
    notes: tuple[str, ...]


class Trainer:
    """Trains `model` by `policy` on `data`, on Hugging Face Accelerate: on whatever `accelerate launch` gives, or in
    this process.

        trained = fxcompress.Trainer("policy.fxc", model, (train, validation), epochs=30, output="out").fit()

    * `policy`, `params`, `teacher`, `example_inputs`: as `compile` takes them; without example inputs the first samples
      are taken
    * `data`: a `Data`, a pair of datasets, or one, of which a fifth is kept for validation
    * `loss`: a function of (output, target) for one that `Settings.loss` can't name; `metrics` are more such functions,
      by name, that are means over their batch
    * `output`: the folder of checkpoints, metrics, pictures and the artifact; without it nothing is written
    * further keywords are those of `Settings`, or a whole `settings=`

    `model` and teacher are moved to the device that trains. Raises FxcError for what is wrong with policy, settings or
    data before anything is trained.
    """

    def __init__(self, policy: Policy | str | Path, model: nn.Module, data: object, example_inputs: Any = None, *,
                 output: str | Path | None = None, teacher: Any = None,
                 params: Mapping[str, object] | None = None, loss: Loss | str | None = None,
                 metrics: Metrics | None = None, settings: Settings | None = None, **keywords: Any) -> None:
        """Checks everything, and trains nothing."""
        if isinstance(loss, str):
            keywords["loss"] = loss
        self.settings = settings if settings is not None else Settings(**keywords)
        self.policy = read_policy(policy, params, teacher)
        self.data = Data.of(data, self.settings.seed)
        self.accelerator: Accelerator = accelerator_for(self.policy, self.settings)
        self.folder = Path(output) if output is not None else None
        self._source = (policy, dict(params or {}), _on(teacher, self.accelerator.device))
        named, classes = make_loss(self.settings.loss)
        own = loss if callable(loss) else None
        self.loss: Loss = own if own is not None else named
        self.metrics: Metrics = {"loss": self.loss, **({"accuracy": accuracy} if classes and own is None else {}),
                                 **(metrics or {})}
        self.model = model.to(self.accelerator.device)
        begin_alike(self.accelerator, self.model)
        self.example_inputs = _moved(example_inputs if example_inputs is not None else first_inputs(self.data),
                                     self.accelerator.device)
        order = training_loader(self.data, self.settings.batch, self.settings.accumulate, self.settings.seed, 0)[1]
        require_time(self.policy, self.settings.epochs, order.steps)

    def fit(self, *, resume: bool = False, progress: bool = False, say: Callable[[str], object] = lambda text: None,
            told: Told = lambda run, moment: None) -> Trained:
        """Train all epochs, finish and save. With `resume` from the checkpoint in the output folder on, to the same
        weights as if it had never stopped. `progress` draws a bar on a terminal, `say` is given a line an epoch, and
        `told` the run behind every step, epoch and before every checkpoint.

        Raises FxcError: FXC0805 for a checkpoint that isn't there or of another run; FXC0802 where model or loss fail
        on a batch; FXC0809 where nothing can be written; and whatever the passes of a phase and `finalize` raise.
        """
        main = self.accelerator.is_main_process
        if self.folder is not None and main:
            checkpoint.make_ready(self.folder, resume=resume)
        self.accelerator.wait_for_everyone()
        identity: dict[str, Any] = {"settings": self.settings.counts, "initial": checkpoint.print_of(self.model)}
        state = checkpoint.load((self.folder or Path()) / checkpoint.NAME) if resume else None
        if state is not None:
            checkpoint.require_same(state, identity["settings"], identity["initial"])
        run = Run(self.accelerator, self.settings, self.data, self.loss, self.metrics, self._begin, folder=self.folder,
                  state=state, identity=identity, told=self._told(say, told))
        with bar(self.settings.epochs, run.order.steps, shown=progress and main) as tell:
            run.train(tell)
        return self._finished(run)

    def _begin(self, steps_per_epoch: int, schedule: Mapping[str, Any] | None) -> Result:
        policy, params, teacher = self._source
        return compile_policy(
            policy, self.model, self.example_inputs, teacher, params, epochs=self.settings.epochs,
            steps_per_epoch=steps_per_epoch, calibration=calibration_for(self.policy, self.data, self.settings),
            seed=self.settings.seed, resume=schedule)

    def _told(self, say: Callable[[str], object], told: Told) -> Told:
        def tell(run: Run, moment: str) -> None:
            if moment == "epoch" and self.accelerator.is_main_process:
                from .show import words

                row = run.history[-1]
                say(f"epoch {run.epoch}/{self.settings.epochs}  {words(row)}  {row['params']:,} parameters")
            told(run, moment)

        return tell

    def _finished(self, run: Run) -> Trained:
        """The best weights put back, the module finished, everything written: by the main process."""
        result, best = run.result, run.best
        if best is not None and best.weights is not None:
            result.module.load_state_dict(best.weights)
        notes = [*self.data.notes]
        if best is not None and best.epoch is not None:
            notes.append(f"the weights are those of epoch {best.epoch}, the best by {best.metric}"
                         if self.settings.keep_best else f"epoch {best.epoch} was the best by {best.metric}")
        if run.stopped:
            notes.append(f"stopped behind epoch {run.epoch}: {self.settings.patience} epochs without a better one")
        deployed: fx.GraphModule | None = None
        final: dict[str, float] = {}
        artifact: Path | None = None
        if self.accelerator.is_main_process:
            deployed = result.finalize()
            final = self._measured(deployed)
            if self.folder is not None:
                notes += self._drawn(run, self.folder)
            deployed.meta["fxcompress"]["report"]["training"] = self._report(run, final, notes)
            if self.folder is not None:
                artifact = self.folder / ARTIFACT
                save(deployed, artifact)
        self.accelerator.wait_for_everyone()
        return Trained(result, deployed, tuple(run.history), best.epoch if best is not None else None, final, artifact,
                       tuple(notes))

    def _drawn(self, run: Run, folder: Path) -> list[str]:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [row for row in map(json.loads, lines) if row["kind"] == "step"]
        note = plots.draw(folder, run.history, steps)[1]
        return [note] if note else []

    def _report(self, run: Run, final: Mapping[str, float], notes: list[str]) -> dict[str, Any]:
        """Plain data for the artifact's report."""
        found: dict[str, Any] = finite({
            "settings": self.settings.counts, "precision": self.accelerator.mixed_precision,
            "processes": self.accelerator.num_processes, "samples": length(self.data.train), "steps": run.steps,
            "epochs": [{**row, "numbers": dict(row.get("numbers", {}))} for row in run.history],
            "final": dict(final), "notes": list(notes)})
        return found

    @torch.no_grad()
    def _measured(self, deployed: nn.Module) -> dict[str, float]:
        """The metrics of the finished module, where it will run."""
        loader = validation_loader(self.data, self.settings.batch, self.settings.seed, 0)
        if loader is None:
            return {}
        device = torch.device(device_for(self.policy.target))
        sums, count = dict.fromkeys(self.metrics, 0.0), 0
        for batch in loader:
            args, kwargs, target = _moved(parted(batch), device)
            output, size = prediction(deployed(*args, **kwargs)).float(), size_of([target])
            for name, metric in self.metrics.items():
                sums[name] += float(metric(output, target)) * size
            count += size
        return {name: value / count for name, value in sums.items()}


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The share of samples whose greatest logit, in dimension 1, is that of their class; probabilities of classes count
    by the greatest."""
    named = target.argmax(1) if target.is_floating_point() else target
    return (output.argmax(1) == named).double().mean()


def _on(teacher: Any, device: torch.device) -> Any:
    return teacher.to(device) if isinstance(teacher, nn.Module) else teacher


def _moved(value: Any, device: torch.device) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(partial(_to, device=device), value)


def _to(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf
