"""The commands and their options, by typer. What they do is in `cli.py`, and in `commands.py` for those that need a
model."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .cli import check_files, code_page, format_files

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Compress PyTorch models by declarative policies.")


class Format(StrEnum):
    """How diagnostics are printed: text goes to stderr, the others to stdout."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"


class Layout(StrEnum):
    """How a plan or a difference is printed."""

    TEXT = "text"
    JSON = "json"


Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Policy files; `-` reads from stdin.")]
Policy = Annotated[Path, typer.Argument(metavar="POLICY", help="The policy file.")]
Spec = Annotated[str,
                 typer.Option("--model", metavar="SPEC", help="torchvision:NAME, timm:NAME, package.module:factory "
                                   "or file.py:factory.")]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="The model's weights, as safetensors.")]
Params = Annotated[list[str] | None,
                   typer.Option("--param", metavar="NAME=VALUE", help="A policy parameter; repeatable.")]

Teacher = Annotated[str | None, typer.Option("--teacher", metavar="SPEC", help="The model to learn from, or "
                                             "`original` for the model itself.")]


def _params(given: list[str] | None) -> dict[str, object]:
    found: dict[str, object] = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--param")
        found[name.strip()] = value.strip()
    return found


@app.command()
def check(paths: Files,
          model: Annotated[str | None, typer.Option(metavar="SPEC", help="Bind the policies to this model "
                                                                   "too.")] = None,
          param: Params = None, format: Annotated[Format, typer.Option()] = Format.TEXT,
          teacher: Teacher = None) -> None:
    """Report every mistake in policies: of their text, and with --model of what they select."""
    params = _params(param)
    if model is None:
        raise typer.Exit(check_files(paths, params, format.value))
    from . import commands

    raise typer.Exit(commands.check_model(paths, model, params, format.value, teacher))


@app.command()
def fmt(paths: Files, check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if a file would "
                                                          "change.")] = False) -> None:
    """Bring policies into the one layout, in place. Files with syntax errors stay as they are."""
    raise typer.Exit(format_files(paths, check=check))


@app.command()
def verbs(verb: Annotated[str | None,
                          typer.Argument(metavar="[VERB]", help="One verb, with its parameters.")] = None) -> None:
    """List the verbs that policies may use, or the parameters of one."""
    from .docs import verb_list, verb_text

    if verb is None:
        sys.stdout.write(verb_list())
    else:
        sys.stdout.write(verb_text(verb))


@app.command()
def explain(what: Annotated[str, typer.Argument(metavar="CODE|DIR", help="A code such as FXC0105, or an artifact.")],
            layer: Annotated[str | None,
                             typer.Argument(metavar="[LAYER]", help="A layer of the artifact.")] = None,
            format: Annotated[Layout, typer.Option(help="For a layer.")] = Layout.TEXT) -> None:
    """Explain a diagnostic code; or what was done to a layer of an artifact, and why."""
    if layer is not None:
        from . import commands

        raise typer.Exit(commands.explain_layer(Path(what), layer, format.value))
    sys.stdout.write(code_page(what))


@app.command()
def plan(policy: Policy, model: Spec, weights: Weights = None, param: Params = None,
         output: Annotated[Path | None,
                           typer.Option("-o", "--output", metavar="FILE", help="Save the plan as JSON.")] = None,
         format: Annotated[Layout, typer.Option()] = Layout.TEXT,
         verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Every layer and every note.")] = False,
         teacher: Teacher = None) -> None:
    """Show what a policy would do to a model, before any of it is done."""
    params = _params(param)
    from . import commands

    raise typer.Exit(commands.plan(policy, model, weights, params, output, format.value, verbose, teacher))


@app.command()
def compile(policy: Policy, model: Spec,
            output: Annotated[Path,
                              typer.Option("-o", "--output", metavar="DIR", help="Where the artifact is written.")],
            weights: Weights = None, param: Params = None,
            plan_file: Annotated[Path | None,
                                 typer.Option("--plan", metavar="FILE", help="A saved plan; refused if the "
                                                           "model or the policy has changed since.")] = None,
            calibration: Annotated[str | None,
                                   typer.Option(metavar="SPEC", help="Calibration data: FILE.npy, FILE.npz or "
                                                "FILE.safetensors, package.module:factory or "
                                                "file.py:factory.")] = None,
            teacher: Teacher = None) -> None:
    """Carry a policy out on a model, and write the artifact."""
    params = _params(param)
    from . import commands

    raise typer.Exit(commands.compile(policy, model, weights, params, output, plan_file, calibration, teacher))


@app.command()
def train(policy: Policy, model: Spec,
          data: Annotated[str, typer.Option(metavar="SPEC", help="mnist5k, imagefolder:DIR, torchvision:NAME:DIR, "
                                            "package.module:factory or file.py:factory.")],
          epochs: Annotated[int, typer.Option(metavar="N", min=1, help="How long to train.")],
          output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where checkpoints, metrics, "
                                               "pictures and the artifact go.")],
          weights: Weights = None, param: Params = None,
          teacher: Annotated[str | None, typer.Option(metavar="SPEC", help="The model to distil from.")] = None,
          teacher_weights: Annotated[Path | None, typer.Option(metavar="FILE", help="The teacher's weights, as "
                                                               "safetensors.")] = None,
          batch: Annotated[int, typer.Option(help="Samples of a step, over all processes and parts.")] = 64,
          optimizer: Annotated[str, typer.Option(help="One of torch.optim, with its settings: "
                                                 "'SGD(lr=0.1, momentum=0.9)'.")] = "AdamW(lr=0.001)",
          scheduler: Annotated[str | None, typer.Option(help="One of torch.optim.lr_scheduler, with its settings: "
                                                        "'CosineAnnealingLR'; its length is that of the "
                                                        "training.")] = None,
          scheduler_every: Annotated[str | None, typer.Option(metavar="epoch|step", help="When the scheduler moves, "
                                                              "where it has no time of its own.")] = None,
          loss: Annotated[str, typer.Option(help="cross_entropy, nll, mse, l1, smooth_l1, huber or "
                                            "binary_cross_entropy, with settings: "
                                            "'cross_entropy(label_smoothing=0.1)'.")] = "cross_entropy",
          accumulate: Annotated[int, typer.Option(help="Cut each batch into so many parts, to save memory.")] = 1,
          clip: Annotated[float | None, typer.Option(help="The largest norm of the gradient.")] = None,
          monitor: Annotated[str | None, typer.Option(help="The metric that says which weights are best: accuracy or "
                                                      "loss; -NAME where less is better.")] = None,
          patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better one, once the "
                                                       "policy has come to rest.")] = None,
          keep_best: Annotated[bool, typer.Option(help="End with the best weights, or with the last ones.")] = True,
          seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
          calibration: Annotated[int, typer.Option(help="Training samples for what the policy measures on "
                                                   "data.")] = 256,
          checkpoint_every: Annotated[int | None, typer.Option(metavar="STEPS", help="Write a checkpoint so often; "
                                                               "each epoch ends with one anyway.")] = None,
          log_every: Annotated[int, typer.Option(metavar="STEPS", help="Write a line of metrics so often.")] = 10,
          workers: Annotated[int, typer.Option(help="Processes that read the data.")] = 0,
          device: Annotated[str, typer.Option(metavar="auto|cpu", help="A GPU where there is one, or the "
                                              "CPU.")] = "auto",
          resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output "
                                               "folder.")] = False) -> None:
    """Train a model by a policy, all phases in order, and write the finished artifact. Under `accelerate launch -m
    fxcompress train ...` it runs on several processes."""
    params = _params(param)
    from .train import Specs, train_policy

    raise typer.Exit(train_policy(
        policy, Specs(model, data, weights, teacher, teacher_weights), output, {
            "epochs": epochs, "batch": batch, "optimizer": optimizer, "scheduler": scheduler,
            "scheduler_every": scheduler_every, "loss": loss, "accumulate": accumulate, "clip": clip,
            "monitor": monitor, "patience": patience, "keep_best": keep_best, "seed": seed,
            "calibration": calibration, "checkpoint_every": checkpoint_every, "log_every": log_every,
            "workers": workers, "device": device}, params, resume))


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact.")],
            format: Annotated[Layout, typer.Option()] = Layout.TEXT,
            plots: Annotated[Path | None,
                             typer.Option(metavar="FOLDER", help="Draw how its layers are quantized, as PNG and "
                                          "SVG.")] = None) -> None:
    """Show the report of an artifact."""
    from . import commands

    raise typer.Exit(commands.inspect(directory, format.value, plots))


@app.command()
def diff(before: Annotated[Path, typer.Argument(metavar="BEFORE", help="An artifact.")],
         after: Annotated[Path, typer.Argument(metavar="AFTER", help="An artifact.")],
         format: Annotated[Layout, typer.Option()] = Layout.TEXT) -> None:
    """Show how two artifacts' graphs differ."""
    from . import commands

    raise typer.Exit(commands.diff(before, after, format.value))


@app.command()
def export(directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact.")],
           output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE",
                                                help="Where to: .onnx, .xml (OpenVINO) or .pt2 (torch.export).")],
           format: Annotated[str | None, typer.Option(metavar="FORMAT", help="onnx, openvino or pt2, where the suffix "
                                                      "doesn't say it.")] = None) -> None:
    """Write an artifact as a file of another format, and hold it against the artifact."""
    from . import commands

    raise typer.Exit(commands.export(directory, output, format))
