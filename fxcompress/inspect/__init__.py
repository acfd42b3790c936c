"""What became of a model, for people and tools: report, diff, explain, an HTML page, the graph as a table, how it is
quantized."""

from __future__ import annotations

from .diff import Diff as Diff
from .diff import diff as diff
from .explain import Explanation as Explanation
from .explain import explain as explain
from .explain import removed as removed
from .graphs import show_graph as show_graph
from .html import html_page as html_page
from .quantization import quantization_of as quantization_of
from .quantization_plots import plots as plots
from .report import Report as Report
from .report import report as report
