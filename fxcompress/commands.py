"""The commands that need a model. Each prints, and gives back an exit code: 0 all is well, 1 there are errors (they are
printed), 2 the command line itself is wrong (`SpecError`s included). Diagnostics go to stderr as text."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, cast

from . import inspect as inspection
from .backends import load, save
from .backends.export import FormatName
from .backends.export import export as export_module
from .diagnostics import Diagnostic, FxcError, PlanError
from .engine import Result
from .engine import compile as compile_policy
from .engine.progress import watcher
from .graph import Captured, capture
from .graph.calibration import Calibration
from .plan import Plan, read_policy
from .plan import check_model as check_binding
from .plan import plan as make_plan
from .plan.make import learning
from .policy import load_policy, parse
from .policy.model import Policy
from .policy.words import ORIGINAL
from .render import RENDERERS, clean, print_text
from .spec import Loaded, SpecError, load_spec
from .spec_data import load_data

P = ParamSpec("P")
Params = Mapping[str, object]


def reporting(command: Callable[P, int]) -> Callable[P, int]:
    """Print the diagnostics that `command` raises; the exit code is 2 for a wrong SPEC, else 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except FxcError as error:
            print_text(error.diagnostics)
            return 2 if isinstance(error, SpecError) else 1

    return run


def check_model(policy_paths: Sequence[Path], spec: str, params: Params | None = None, format: str = "text",
                teacher: str | None = None) -> int:
    """Check policies against the model of `spec`, and what they learn from that of `teacher`: their texts, and whether
    each selector finds its layers. All errors of all files in one run; `format` is `text` (stderr), `json` or `sarif`
    (stdout)."""
    found: list[Diagnostic] = []
    captured: dict[object, Captured] = {}
    wrong_spec = False
    for path in policy_paths:
        try:
            policy = load_policy(path, dict(params or {}))
            if policy.inputs not in captured:
                captured[policy.inputs] = _capture(load_spec(spec, None, policy.inputs))
            policy = _taught(policy, teacher)
            found += check_binding(policy, learning(policy, captured[policy.inputs]))
        except FxcError as error:
            found += [item for item in error.diagnostics if item not in found]
            wrong_spec = wrong_spec or isinstance(error, SpecError)
    errors = sum(item.severity == "error" for item in found)
    if format == "text":
        print_text(found)
        files = f"{len(policy_paths)} file{'s' * (len(policy_paths) != 1)}"
        print(f"{files} checked against {spec}: {errors or 'no'} error{'s' * (errors != 1)}", file=sys.stderr)
    else:
        sys.stdout.write(RENDERERS[format](found))
    return 2 if wrong_spec else int(errors > 0)


@reporting
def plan(policy_path: Path, spec: str, weights: Path | None = None, params: Params | None = None,
         output: Path | None = None, format: str = "text", verbose: bool = False, teacher: str | None = None) -> int:
    """Print what the policy would do to the model (`text`, layer by layer if `verbose`, or `json`), and save it as JSON
    to `output`."""
    policy, loaded = _load(policy_path, spec, weights, params, teacher)
    made = make_plan(policy, _capture(loaded))
    if output is not None:
        write_plan(output, made.to_json())
        print(f"the plan is in {output}", file=sys.stderr)
    sys.stdout.write(made.to_json() if format == "json" else made.show(verbose=verbose))
    return 0


@reporting
def compile(policy_path: Path, spec: str, weights: Path | None = None, params: Params | None = None,
            output: Path = Path("out"), plan_file: Path | None = None, calibration: str | None = None,
            teacher: str | None = None) -> int:
    """Carry the policy out on the model and write the artifact to `output`. There is no training here: every phase runs
    at once and every ramp goes to its end. A plan in `plan_file` is refused if the policy or the model is another.
    `calibration` says where calibration data come from, see `spec_data.py`; runs over them draw a bar on a terminal."""
    policy, loaded = _load(policy_path, spec, weights, params, teacher)
    made = read_plan(plan_file) if plan_file is not None else None
    captured = _capture(loaded)
    data = Calibration.of(load_data(calibration), captured) if calibration is not None else None
    if data is not None:
        data = replace(data, watch=watcher(True))
    result = compile_policy(policy, captured, plan=made, epochs=_epochs(policy), steps_per_epoch=1,
                            calibration=data)
    run_through(result)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are in `result.warnings`, and printed from there
        deployed = result.finalize()
    print_text(result.warnings)
    save(deployed, output)
    sys.stdout.write(clean(inspection.report(deployed, name=f"policy {policy.name}").show(), keep_newlines=True))
    if any(phase.window is not None for phase in policy.phases):
        print("\nnote: nothing was trained: every phase ran at once, and every ramp went straight to its end.\n"
              "      To train along: `fxcompress train`, or fxcompress.compile from Python.")
    print(f"\nthe artifact is in {output}")
    return 0


def _epochs(policy: Policy) -> float:
    """An end of training that is behind the end of every phase, in epochs."""
    windows = [phase.window for phase in policy.phases if phase.window is not None]
    return max((window.end for window in windows if window.unit == "epochs"), default=1)


def run_through(result: Result) -> None:
    """Let every phase begin and end, in its order, with every ramp at its end, by moving the clock behind them all."""
    ends = [phase.window.end for phase in result.policy.phases if phase.window and phase.window.unit == "steps"]
    result.clock.steps, result.clock.epochs = math.ceil(max(ends, default=0)), math.ceil(_epochs(result.policy))
    result.epoch_end()  # not `step()`: no penalty on the weights may act, there is no training
    result.clock.steps = result.clock.epochs = result.clock.in_epoch = 0  # nothing was trained, and the report says so


@reporting
def inspect(directory: Path, format: str = "text", plots: Path | None = None) -> int:
    """Print the report of the artifact in `directory`: `text`, `json`, or `html` for one page with plan and policy.
    Pictures of its quantization go into the folder `plots`."""
    for path in inspection.plots(directory, plots) if plots is not None else ():
        print(f"drawn: {path}", file=sys.stderr)
    if format == "html":
        sys.stdout.write(inspection.html_page(directory))
        return 0
    report = inspection.report(directory)
    return _print(report.show(), report.to_json(), format)


@reporting
def export(directory: Path, output: Path, format: str | None = None) -> int:
    """Write the artifact in `directory` to `output`: as `onnx`, `openvino` or `pt2`, by its suffix or `format`."""
    found = export_module(load(directory), output, cast(FormatName | None, format))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    held = "" if found.gap is None else f", within {found.gap:.2g} of the artifact"
    print(f"{found.format} in {found.path}{held}")
    return 0


@reporting
def diff(before: Path, after: Path, format: str = "text") -> int:
    """Print how the graphs of two artifacts differ, as `text` or `json`."""
    found = inspection.diff(before, after)
    return _print(found.show(), found.to_json(), format)


@reporting
def explain_layer(directory: Path, layer: str, format: str = "text") -> int:
    """Print each rule that touched `layer` of the artifact in `directory`, as `text` or `json`."""
    found = inspection.explain(directory, layer)
    return _print(found.show(), found.to_json(), format)


def _print(text: str, data: Any, format: str) -> int:
    if format == "json":
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    else:
        sys.stdout.write(clean(text, keep_newlines=True))
    return 0


def _load(policy_path: Path, spec: str, weights: Path | None, params: Params | None, teacher: str | None = None,
          ) -> tuple[Policy, Loaded]:
    """The policy, with all of its parameters (models to learn from are that of `teacher`), and the model on inputs that
    the policy declares."""
    policy = load_policy(policy_path, dict(params or {}))
    loaded = load_spec(spec, weights, policy.inputs)
    return read_policy(_taught(policy, teacher), None, None), loaded


def _taught(policy: Policy, teacher: str | None) -> Policy:
    """`policy` with the model of the SPEC `teacher` for what its actions learn from; `original` stands for itself."""
    if teacher is None or not policy.missing:
        return policy
    names = {action.teacher for phase in policy.phases for action in phase.actions if action.teacher}
    found = teacher if teacher == ORIGINAL else load_spec(teacher, None, policy.inputs).model
    given = {name: found for name in names if name in policy.missing}
    return parse(policy.source, {**{name: value for name, value in policy.params.items() if name not in policy.missing},
                                 **given}) if given else policy


def _capture(loaded: Loaded) -> Captured:
    return capture(loaded.model, loaded.example_inputs)


def read_plan(path: Path) -> Plan:
    """The plan saved in `path`. Raises PlanError (FXC0720, FXC0332) where there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PlanError([Diagnostic("FXC0720", f"the plan can't be read from {path}: {reason}",
                                    help="write it: `fxcompress plan POLICY --model SPEC -o FILE`")]) from error
    return Plan.from_json(text)


def write_plan(path: Path, text: str) -> None:
    """Write `text` to `path`, at once and whole. Raises PlanError (FXC0721) where that can't be."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise PlanError([Diagnostic("FXC0721", f"the plan can't be written to {path}: {error.strerror}",
                                    help="name a file in a folder that exists")]) from error
