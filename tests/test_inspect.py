"""Report, diff, explain, page and graph table: golden texts, and figures against torch's own counts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from fxcompress.diagnostics import ArtifactError, PlanError
from fxcompress.inspect import diff, explain, html_page, removed, report, show_graph
from fxcompress.inspect.layers import Snapshot, layers_of, sizes_of
from fxcompress.inspect.text import Table, change, count, macs, ranges, size
from fxcompress.passes import Mask, Remove

Golden = Callable[[str, str], None]
POLICY = """policy small {
    input x: f32[N, 3, 32, 32]

    phase shrink over epochs 0..4 {
        remove channels(conv2d[name ~ "blocks.*.conv1"]) { ratio = 50% }
    }
    phase thin after shrink {
        mask linear { sparsity = 75% }
    }
    expect sparsity(linear) >= 70% else "too dense"
}
"""


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.norm1(self.conv1(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def dense() -> fxcompress.Captured:
    torch.manual_seed(0)
    return fxcompress.capture(Net().eval(), (torch.randn(2, 3, 32, 32),))


@pytest.fixture(scope="module")
def before() -> fxcompress.Captured:
    return dense()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a policy made of it, saved."""
    from fxcompress.commands import run_through
    from fxcompress.source import Source

    policy = fxcompress.parse(Source("small.fxc", POLICY))
    result = fxcompress.compile(policy, dense(), epochs=4, steps_per_epoch=1)
    run_through(result)
    folder = tmp_path_factory.mktemp("inspect") / "small"
    fxcompress.save(result.finalize(target="cpu"), folder)
    return folder


def normal(text: str, *paths: Path) -> str:
    """Without what differs from run to run: folders, rounding errors, line numbers of this file."""
    for path in paths:
        text = text.replace(str(path), path.name)
    text = re.sub(r"zeroed, to \S+", "zeroed, to <rounding>", text)
    return re.sub(r"(test_inspect\.py):\d+", r"\1:<line>", text)


def test_graph_table(before: fxcompress.Captured, golden: Golden) -> None:
    golden("inspect/graph.txt", normal(show_graph(before)))


def test_report(artifact: Path, golden: Golden) -> None:
    golden("inspect/report.txt", normal(report(artifact).show(), artifact))


def test_diff(before: fxcompress.Captured, artifact: Path, golden: Golden) -> None:
    found = diff(before, artifact, ("dense", "small"))
    assert found
    golden("inspect/diff.txt", normal(found.show()))
    golden("inspect/diff.json", normal(json.dumps(found.to_json(), indent=1) + "\n"))


def test_a_model_does_not_differ_from_itself(before: fxcompress.Captured, golden: Golden) -> None:
    found = diff(before, before.copy())
    assert not found and found.same == len(layers_of(before))
    golden("inspect/same.txt", found.show())


def test_layers_that_come_and_go(golden: Golden) -> None:
    x = torch.randn(2, 4)
    torch.manual_seed(0)
    one = fxcompress.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (x,))
    wider = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    two = fxcompress.capture(wider, (x,))
    golden("inspect/come_and_go.txt", diff(one, two).show())


@pytest.mark.parametrize("layer", ["blocks.0.conv1", "blocks.1.norm1", "head", "stem", "add"])
def test_explain(artifact: Path, layer: str, golden: Golden) -> None:
    found = explain(artifact, layer)
    golden(f"inspect/explain_{layer}.txt", normal(found.show()))
    data = json.loads(json.dumps(found.to_json()))
    assert [rule["detail"] for rule in data["rules"]] == [origin.detail for origin in found.origins]


def test_which_indices_left_and_why(before: fxcompress.Captured, tmp_path: Path) -> None:
    """Two removals after one another, and a save between: the channels that stay are those of the dense model that the
    record says, and those that left had the smallest norms."""
    first = Remove(ratio=0.25, by="l1").apply(before, "conv2d", what="channels")
    fxcompress.save(first.module, tmp_path / "first")
    again = fxcompress.capture(fxcompress.load(tmp_path / "first"), before.example.args)
    second = Remove(ratio=0.5, by="l1").apply(again, "conv2d", what="channels")
    assert [left.size for left in removed(second, "stem")] == [8, 8]
    for layer, reads in (("blocks.0.conv1", "stem"), ("blocks.1.conv2", "blocks.1.conv1")):
        kept = []
        for name, what in ((layer, "out_channels"), (layer, "in_channels"), (reads, "out_channels")):
            gone = [index for left in removed(second, name) if left.what == what for index in left.indices]
            kept.append(np.setdiff1d(np.arange(8), gone))
        dense = before.module.get_parameter(f"{layer}.weight")
        assert torch.equal(second.module.get_parameter(f"{layer}.weight"), dense[kept[0]][:, kept[1]])
        assert kept[1].tolist() == kept[2].tolist() and len(kept[0]) == 3
    conv1 = removed(first, "blocks.0.conv1")[0]
    norms = before.module.get_parameter("blocks.0.conv1.weight").detach().abs().sum((1, 2, 3))
    assert conv1.why == "selected" and sorted(norms.argsort()[:2].tolist()) == list(conv1.indices)
    assert conv1.scores == pytest.approx(norms[list(conv1.indices)].tolist(), rel=1e-4)
    assert conv1.least_kept == pytest.approx(float(norms.sort().values[2]), rel=1e-4)


def test_ranges() -> None:
    assert ranges([0, 2, 3, 4, 9]) == "0, 2-4, 9"
    assert ranges(range(0, 100, 2), 3) == "0, 2, 4 and 47 more"


@pytest.mark.parametrize(("layer", "help_"), [
    ("blocks.0.conv3", "did you mean `blocks.0.conv"), ("blocks.0", "holds 3 layers"), ("zzz", "inspect"),
    ("", "inspect")])
def test_unknown_layers(artifact: Path, layer: str, help_: str) -> None:
    with pytest.raises(ArtifactError) as error:
        explain(artifact, layer)
    (found,) = error.value.diagnostics
    assert found.code == "FXC0613" and found.help is not None and help_ in found.help


def test_a_layer_by_its_nodes_name_too(artifact: Path) -> None:
    assert explain(artifact, "blocks_0_conv1").label == "blocks.0.conv1"


def test_python_passes_are_explained(before: fxcompress.Captured) -> None:
    masked = Mask(sparsity=0.5).apply(before, "linear")
    found = explain(masked, "head")
    assert [(o.verb, o.place) for o in found.origins] == [("mask", "python")]
    shown = report(masked, before=before)
    (row,) = [row for row in shown.rows() if row.label == "head"]
    assert row.after is not None and (row.after.zeros, row.after.weights) == (40, 80)


def test_figures_are_those_of_torch() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(x)
    found = Snapshot.of(fxcompress.capture(model, (x,)))
    assert found.sizes.macs == counter.get_total_flops() // 2 // 2  # two operations each, two samples
    assert sum(layer.macs for layer in found.layers) == found.sizes.macs
    assert found.sizes.params == sum(p.numel() for p in model.parameters()) == sum(row.params for row in found.layers)
    tensors = [*model.parameters(), *model.buffers()]
    assert found.sizes.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert found.sizes.weights == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert found.sizes.zeros == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


def test_masked_zeros_count_as_zeros_and_tied_weights_once() -> None:
    linear = nn.Linear(8, 8, bias=False)
    tied = nn.Linear(8, 8, bias=False)
    tied.weight = linear.weight
    captured = fxcompress.capture(nn.Sequential(linear, tied), (torch.randn(2, 8),))
    assert sizes_of(captured).params == 64
    assert [layer.params for layer in layers_of(captured)] == [64, 64]
    untied = fxcompress.capture(nn.Sequential(nn.Linear(8, 8, bias=False)), (torch.randn(2, 8),))
    masked = Mask(sparsity=0.25).apply(untied, "linear")
    assert (sizes_of(masked).zeros, sizes_of(masked).bytes) == (16, 64 * 4)


def test_weights_that_are_not_known_have_no_sparsity(before: fxcompress.Captured) -> None:
    assert sizes_of(before.skeleton()).zeros is None
    assert "-" in report(before.skeleton()).show()


def test_a_removed_layer_is_gone() -> None:
    """The plan knows the layers that were; the graph those that are."""
    policy = "policy p { mask linear { sparsity = 50% } }"
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    result = fxcompress.compile(policy, model, (torch.randn(2, 4),))
    deployed = result.finalize(target="cpu")
    last = next(node for node in deployed.graph.nodes if node.op == "output")
    relu = last.all_input_nodes[0].all_input_nodes[0]
    last.all_input_nodes[0].replace_all_uses_with(relu)
    deployed.graph.eliminate_dead_code()
    deployed.recompile()
    shown = report(deployed).show()
    assert re.search(r"^2 +linear .* gone$", shown, re.MULTILINE)
    gone = explain(deployed, "2")
    assert gone.layer is None and gone.show().startswith("2: linear, gone")


class Tags(HTMLParser):
    """Checks that tags nest, and collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_whole_document(artifact: Path) -> None:
    page = html_page(artifact)
    parser = Tags()
    parser.feed(page)
    assert parser.open == [] and {"table", "pre", "style"} <= parser.seen
    assert not parser.seen & {"script", "link", "img"}
    assert "remove channels(conv2d[name ~ &quot;blocks.*.conv1&quot;])" in page  # the policy, escaped
    assert "http" not in page


def test_notebooks_get_tables(before: fxcompress.Captured, artifact: Path) -> None:
    for thing in (report(artifact), diff(before, artifact), explain(artifact, "head")):
        parser = Tags()
        parser.feed(thing._repr_html_())
        assert parser.open == []
        assert str(thing) == thing.show()


def test_json_says_what_the_text_says(artifact: Path) -> None:
    data = json.loads(json.dumps(report(artifact).to_json()))
    assert data["policy"] == POLICY and data["run"]["steps"] == 0
    row = next(row for row in data["layers"] if row["label"] == "blocks.0.conv1")
    assert row["before"]["params"] == 8 * 8 * 9 and row["after"]["params"] == 4 * 8 * 9
    assert row["after"]["settings"]["out_channels"] == "4"


def test_a_plan_that_cannot_be_read_is_a_diagnostic(artifact: Path) -> None:
    module = fxcompress.load(artifact)
    module.meta["fxcompress"]["plan"] = {"fxcompress_plan": 99}
    with pytest.raises(PlanError):
        report(module)
    module.meta["fxcompress"].update(plan=None, report={"trained": {"steps": "many"}})
    with pytest.raises(ArtifactError, match="FXC0604"):
        report(module)


def test_numbers() -> None:
    assert [count(1234567), macs(1814073344), size(1536)] == ["1,234,567", "1.814 G", "1.5 KiB"]
    assert [change(200, 50), change(3, 3), change(0, 5), change(100, 110)] == ["-75.0%", "=", "", "+10.0%"]


def test_tables_make_control_characters_visible() -> None:
    table = Table(("a", "b"), (("x\x1b[31m", "<b>"),), frozenset({1}))
    assert "\x1b" not in table.text() and "&lt;b&gt;" in table.html()
    assert Table(("", ""), ()).text() == ""


def test_remove_from_python_reads_well(before: fxcompress.Captured, golden: Golden) -> None:
    cut = Remove(ratio=0.5).apply(before, 'conv2d[name ~ "blocks.0.conv1"]', what="channels")
    golden("inspect/removed.txt", normal(diff(before, cut).show()))
