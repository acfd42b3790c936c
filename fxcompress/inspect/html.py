"""One self-contained HTML page of an artifact: totals, layers, plan and policy. No scripts, no links, all escaped."""

from __future__ import annotations

from html import escape

from ..render import clean
from .report import report
from .rows import Model, open_model, plan_of

_STYLE = """body{font:14px system-ui,sans-serif;margin:2em auto;max-width:80em;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0}th,td{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}
.n{text-align:right;font-variant-numeric:tabular-nums}pre{background:#f6f6f6;padding:1em;overflow:auto}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}pre{background:#242424}th,td{border-color:#444}}"""


def html_page(model: Model, title: str | None = None) -> str:
    """The page for a captured or loaded graph or an artifact's folder. Raises ArtifactError for a damaged folder."""
    opened = open_model(model)
    shown = report(opened, name=title or (str(model) if opened is not model else None))
    plan = plan_of(opened)
    sections = [shown._repr_html_()]
    if plan is not None:
        sections.append(f"<h4>plan</h4>{plan._repr_html_()}")
    if shown.policy:
        sections.append(f"<h4>policy</h4><pre>{escape(clean(shown.policy, keep_newlines=True))}</pre>")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(shown.name)}</title>'
            f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>\n")
