"""The language's functions: texts to checked policies and selectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..diagnostics import Diagnostic, Label, PolicyError, Sink
from ..source import Source
from . import model, selector
from .check import Checked, check_source
from .library import read_source
from .parsing import parse_expression
from .selectors import Scope, read_selector
from .values import Unset
from .words import quoted


def parse(text: str | Source, params: Mapping[str, object] | None = None) -> model.Policy:
    """The checked policy of a text. `params` gives values for its parameters: Python values, or texts in the policy's
    syntax (`"60%"`). One without value and default stays `Unset`, see `instantiate`. `use "file"` is relative to the
    folder of the source's name.

    Raises PolicyError, which holds every diagnostic of the text.
    """
    source = text if isinstance(text, Source) else Source("<policy>", text.removeprefix("\ufeff"))
    return _policy(check_source(source, params))


def load_policy(path: str | Path, params: Mapping[str, object] | None = None) -> model.Policy:
    """The checked policy of a file, as `parse` gives it. Raises PolicyError, for a file that can't be read too."""
    return parse(read_source(Path(path)), params)


def instantiate(policy: model.Policy, params: Mapping[str, object] | None = None) -> model.Policy:
    """`policy` with its parameters given anew where `params` says so. Raises PolicyError for a wrong value, an unknown
    parameter, and a parameter that is still missing."""
    known = {name: value for name, value in policy.params.items() if not isinstance(value, Unset)}
    whole = parse(policy.source, {**known, **(params or {})}) if params else policy
    if whole.missing:
        names = quoted(whole.missing, "and")
        example = f'params={{"{whole.missing[0]}": ...}}'
        by_flag = f"`--param {whole.missing[0]}=...`; or write a default"
        if whole.missing[0] in {action.teacher for phase in whole.phases for action in phase.actions}:
            example, by_flag = "teacher=model", "`--teacher SPEC`"
        raise PolicyError([Diagnostic("FXC0133", f"policy `{whole.name}` needs a value for {names}", _head(whole),
                                      help=f"give it from Python, `{example}`, or by {by_flag}")])
    return whole


def _head(policy: model.Policy) -> Label | None:
    """The name of the policy in its text."""
    from . import ast

    file = check_source(policy.source).file
    return next((Label(item.name.span) for item in file.items if isinstance(item, ast.PolicyDecl)), None)


def parse_selector(text: str) -> selector.Selector:
    """The checked selector of a text such as `conv2d[out_channels >= 64]`, without any `let`. Raises PolicyError."""
    expr, problems = parse_expression(Source("<selector>", text))
    if expr is None:
        raise PolicyError(problems)
    scope = Scope(Sink())
    found = read_selector(expr, scope)
    if found is None:
        raise PolicyError(scope.sink.items)
    return found


def _policy(checked: Checked) -> model.Policy:
    if not checked.is_good:
        raise PolicyError(checked.diagnostics)
    if checked.policy is None:
        raise PolicyError([Diagnostic("FXC0140", f"there is no policy in `{checked.file.source.name}`",
                                      help="write `policy name { ... }`")])
    return checked.policy


