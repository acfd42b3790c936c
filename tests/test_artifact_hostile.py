"""Artifacts that a stranger made: whatever is in them, loading gives a diagnostic or a plain graph and runs nothing."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hostile import DOCUMENT, FILES, assert_harmless, changed, index, load

import fxcompress
from fxcompress.backends.artifact_store import read, write
from fxcompress.diagnostics import ArtifactError
from fxcompress.inspect import explain, html_page, report


def refused(document: object, **files: bytes) -> str:
    with pytest.raises(ArtifactError) as error:
        load(document, **files)
    (found,) = error.value.diagnostics
    assert found.help and str(error.value).isprintable() is False  # newlines only; it renders
    return found.code


CONV = index("modules", path="conv")
CONV_WEIGHT = index("tensors", name="conv.weight")
RELU = index("nodes", target="relu")
HEAD = index("nodes", target="head")
NORM = index("modules", path="norm")
TIED = index("tensors", name="tied.weight")


def test_the_document_is_whole() -> None:
    assert torch.isfinite(load(DOCUMENT)(torch.randn(1, 3, 4, 4))["out"]).all()


INJECTIONS = ("x = __import__('os')", "x\nimport os", "a;b", "a b", "", "class", "1x", "é", "__class__", "self.x",
              "x" * 300,
              "None", "print(1)", 'x"', "x'", "x\\", "\x00", "\u202e", 7, None, ["x"], {"a": 1}, True)


@pytest.mark.parametrize("word", INJECTIONS, ids=repr)
@pytest.mark.parametrize("place", [f"{RELU}/name", "name", "nodes/0/target", f"{CONV}/path", f"{CONV_WEIGHT}/name",
                                   f"{HEAD}/target", f"{RELU}/target"])
def test_names_are_plain_names(place: str, word: object) -> None:
    if place == "nodes/0/target" and word == "__class__":
        assert refused(changed(place, word)) == "FXC0606"
    try:
        loaded = load(changed(place, word))
    except ArtifactError as error:
        assert error.diagnostics[0].code in ("FXC0604", "FXC0605", "FXC0606", "FXC0607", "FXC0608", "FXC0609")
    else:  # a name that is odd and harmless, such as a path with a blank
        assert_harmless(loaded)


@pytest.mark.parametrize("path", ["..", "a..b", ".", "a.", ".a", "__class__", "conv.__class__", "conv.__dict__",
    "/etc/passwd",
                                  "a.b.c", "forward", "training", "_parameters", "graph", "meta", "code",
                                  "conv.forward",
                                  "_modules.conv", "x." * 80 + "x"])
def test_attribute_paths_lead_nowhere_else(path: str) -> None:
    assert refused(changed(f"{CONV}/path", path)) in ("FXC0606", "FXC0608", "FXC0609")
    assert refused(changed(f"{CONV_WEIGHT}/name", path)) in ("FXC0606", "FXC0607", "FXC0608", "FXC0609")
    assert refused(changed(f"{HEAD}/target", path)) in ("FXC0606", "FXC0608", "FXC0609")
    parameter = index("nodes", op="parameter")
    assert refused(changed(f"{parameter}/target", path)) in ("FXC0606", "FXC0608", "FXC0609")


@pytest.mark.parametrize("target", [
    "eval", "exec", "open", "__import__", "builtins.eval", "os.system", "torch.load", "torch.ops.aten.relu",
    "operator.attrgetter",
    "aten.relu_.default", "aten.relu.out", "aten.from_file.default", "aten._linalg_svd.default",
    "aten.set_.source_Tensor",
    "aten.fbgemm_linear_fp16_weight.default", "aten.relu.op", "aten.relu.overloads", "aten.relu.__class__",
    "aten.name.default",
    "aten.__class__.default", "prims.add.default", "aten.bernoulli.p", "aten.convolution_backward.default",
    "aten.nothing.default",
    "aten.as_strided.default", "profiler._record_function_enter.default", "relu\n", "Tensor.tolist", "getattr ",
    "setattr", "",
])
def test_operators_outside_the_table(target: str) -> None:
    assert refused(changed(f"{RELU}/target", target)) == "FXC0605"


@pytest.mark.parametrize("name", ["torch.nn.Module", "torch.nn.Sequential", "os.system",
    "torch.nn.modules.conv.Conv2d", "builtins.eval",
                                  "torch.nn.Conv2d ", "", "fxcompress.nn.mask.Mask", "torch.nn.Module.__init__",
                                  "Container"])
def test_classes_outside_the_table(name: str) -> None:
    assert refused(changed(f"{CONV}/class", name)) == "FXC0605"


@pytest.mark.parametrize("name", ["__class__", "__dict__", "data", "grad_fn", "untyped_storage", "register_hook",
    "tolist", "_base", ""])
def test_getattr_reads_plain_facts_only(name: str) -> None:
    document = changed(f"{RELU}/target", "getattr")
    place = int(RELU.split("/")[1])
    argument = document["nodes"][place]["args"][0]
    document["nodes"][place]["args"] = [argument, name]
    document["nodes"][place].pop("kwargs", None)
    assert refused(document) == "FXC0606"
    document["nodes"][place]["args"] = [3, "shape"]
    assert refused(document) == "FXC0604"


@pytest.mark.parametrize("value", [
    {"node": "nobody"}, {"node": "output"}, {"node": DOCUMENT["nodes"][int(RELU.split("/")[1])]["name"]},
    {"node": 3}, {"code": "1"},
    {"python": "os"}, {"tuple": 3}, {"slice": [1]}, {"slice": ["a", 1, 2]}, {"dtype": "__class__"},
    {"dtype": "object"}, {"device": "cpu; x"},
    {"device": "cuda:99999999"}, {"memory_format": "x"}, {"float": "1"}, {"float": "__import__"}, {"complex": [1]},
    {"range": [0, 1]},
    {"range": [0, 1, "a"]}, {"tuple": [], "list": []}, {}, {"dict": [[{"a": 1}, 1]]}, {"dict": [["a", 1], ["a",
    2]]}, {"ellipsis": False},
    {"dict": {"a": 1}}, {"layout": "sparse"},
])
def test_constants_are_plain_constants(value: object) -> None:
    assert refused(changed(f"{RELU}/args", [value])) in ("FXC0604", "FXC0609")


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"tuple": [value]}
    return value


@pytest.mark.parametrize(("document", "codes"), [
    (changed(f"{RELU}/args", [deep(200)]), ("FXC0604",)),
    (changed(f"{RELU}/args", []), ("FXC0604",)),
    (changed(f"{RELU}/args", [1, 2, 3, 4, 5]), ("FXC0604",)),
    (changed(f"{RELU}/kwargs", {"out": 1}), ("FXC0604",)),
    (changed(f"{RELU}/kwargs", {"x=1); import os; (y": 1}), ("FXC0606",)),
    (changed(f"{RELU}/op", "call_method"), ("FXC0604",)),
    (changed(f"{RELU}/op", "output"), ("FXC0609",)),
    (changed(f"{RELU}/op", "module"), ("FXC0609",)),
    (changed("nodes", []), ("FXC0609",)),
    (changed("nodes", DOCUMENT["nodes"][:-1]), ("FXC0609",)),
    (changed("nodes", DOCUMENT["nodes"] * 2), ("FXC0609",)),
    (changed("nodes", DOCUMENT["nodes"][::-1]), ("FXC0609",)),
    (changed("nodes", {}), ("FXC0604",)),
    (changed("modules", []), ("FXC0609", "FXC0607")),
    (changed("modules", DOCUMENT["modules"] * 2), ("FXC0606",)),
    (changed("tensors", DOCUMENT["tensors"] * 2), ("FXC0609",)),
    (changed("tensors", []), ("FXC0607",)),
    (changed("evaluation", ["nobody"]), ("FXC0609",)),
    (changed(f"{CONV}/arguments/out_channels", 10**12), ("FXC0604", "FXC0607")),
    (changed(f"{CONV}/arguments/out_channels", 2**63), ("FXC0604",)),
    (changed(f"{CONV}/arguments/out_channels", 2**62), ("FXC0604", "FXC0607")),
    (changed(f"{CONV}/arguments/out_channels", -4), ("FXC0604",)),
    (changed(f"{CONV}/arguments/groups", 0), ("FXC0604",)),
    (changed(f"{CONV}/arguments/kernel_size", [3] * 10_000), ("FXC0608",)),
    (changed(f"{CONV}/arguments/kernel_size", [10**9, 10**9]), ("FXC0604", "FXC0607")),
    (changed(f"{CONV}/arguments/padding_mode", "os"), ("FXC0604",)),
    (changed(f"{CONV}/arguments", {}), ("FXC0604",)),
    (changed(f"{index('modules', path='rnn')}/arguments/num_layers", 10**6), ("FXC0604",)),
    (changed(f"{CONV_WEIGHT}/shape", [10**9, 10**9]), ("FXC0607",)),
    (changed(f"{CONV_WEIGHT}/shape", [1] * 100), ("FXC0608",)),
    (changed(f"{CONV_WEIGHT}/shape", [-1, 3]), ("FXC0604",)),
    (changed(f"{CONV_WEIGHT}/dtype", "float64"), ("FXC0607",)),
    (changed(f"{CONV_WEIGHT}/role", "buffer"), ("FXC0606", "FXC0607")),
    (changed(f"{CONV_WEIGHT}/memory_format", "channels_last_3d"), ("FXC0604",)),
    (changed(f"{index('tensors', name='norm.num_batches_tracked')}/requires_grad", True), ("FXC0604",)),
    (changed(f"{TIED}/same", "tied.weight"), ("FXC0609",)),
    (changed(f"{TIED}/same", "norm.running_mean"), ("FXC0609",)),
    (changed(f"{TIED}/same", "conv.weight"), ("FXC0607",)),
    ({**DOCUMENT, "extra": 1}, ("FXC0604",)),
    ([], ("FXC0604",)), ("x", ("FXC0604",)), (None, ("FXC0604",)), (1, ("FXC0604",)),
], ids=str)
def test_documents_that_do_not_hang_together(document: object, codes: tuple[str, ...]) -> None:
    assert refused(document) in codes


def modules_of(*entries: dict[str, Any]) -> dict[str, Any]:
    output = [{"name": "x", "op": "input", "target": "x"}, {"name": "output", "op": "output",
              "args": [{"node": "x"}]}]
    return {"name": "Net", "modules": list(entries), "tensors": [], "evaluation": [], "nodes": output}


def empty_weights() -> bytes:
    return safetensors.torch.save({})


def test_a_module_cannot_hold_itself() -> None:
    box = {"class": "container"}
    weights = {"weights.safetensors": empty_weights()}
    load(modules_of({"path": "a", **box}, {"path": "b", "same": "a"}), **weights)
    for entries in (
        [{"path": "a", **box}, {"path": "a.b", "same": "a"}],
        [{"path": "a", **box}, {"path": "b", **box}, {"path": "a.x", "same": "b"}, {"path": "b.y", "same": "a"}],
        [{"path": "a", "same": "a"}], [{"path": "a", "same": "b"}, {"path": "b", "same": "a"}], [{"path": "a",
        "same": ""}],
    ):
        assert refused(modules_of(*entries), **weights) in ("FXC0606", "FXC0609")


def test_shared_modules_cannot_make_paths_without_end() -> None:
    entries: list[dict[str, Any]] = [{"path": "m0", "class": "container"}]
    for level in range(1, 50):
        entries.append({"path": f"m{level}", "class": "container"})
        entries += [{"path": f"m{level}.{side}", "same": f"m{level - 1}"} for side in ("left", "right")]
    assert refused(modules_of(*entries), **{"weights.safetensors": empty_weights()}) == "FXC0608"


def header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("weights", [
    b"", b"\x00" * 8, b"\xff" * 16, struct.pack("<Q", 2**63) + b"{}", header(b"{"), header([]), header({"a": 1}),
    header({"conv.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}),
    header({"conv.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]}}, b"\x00" * 16),
    header({"conv.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\x00" * 16),
    header({"conv.weight": {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]}}, b"\x00" * 16),
    FILES["weights.safetensors"][:-1], FILES["weights.safetensors"] + b"\x00", FILES["weights.safetensors"][:100],
    safetensors.torch.save({"conv.weight": torch.zeros(1)}), safetensors.torch.save({}), b"PK\x03\x04",
                           b"\x80\x04\x95",
], ids=range(18))
def test_hostile_weights(weights: bytes) -> None:
    assert refused(DOCUMENT, **{"weights.safetensors": weights}) == "FXC0607"


def test_every_file_tampered_with_on_disk_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    folder = tmp_path / json.loads((tmp_path / "manifest.json").read_text())["data"]
    for name, whole in FILES.items():
        for place in {0, len(whole) // 2, len(whole) - 1}:
            (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 32]) + whole[place + 1 :])
            with pytest.raises(ArtifactError) as error:
                fxcompress.load(tmp_path)
            assert error.value.diagnostics[0].code == "FXC0603"
        (folder / name).write_bytes(whole)
    assert read(tmp_path) == FILES
    fxcompress.load(tmp_path)


def test_loading_imports_and_unpickles_nothing(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    events: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("pickle.find_class", "marshal.loads", "os.system", "subprocess.Popen",
                                  "socket.connect", "os.exec"):
            events.append(event)

    sys.addaudithook(watch)
    fxcompress.load(tmp_path)
    watching = False
    assert events == []


def test_texts_from_an_artifact_cannot_drive_the_terminal_or_the_page() -> None:
    document = changed(f"{HEAD}/meta/source", "\x1b[2J<script>alert(1)</script>")
    document["nodes"][int(HEAD.split("/")[1])]["meta"]["origins"] = [["<b>\x1b[31m", "p:1:1", "\x07", "x",
             "\x1b]0;t\x07", []]]
    loaded = load(document, **{"policy.fxc": b"\x1b[2J</pre><script>"})
    for text in (report(loaded).show(), explain(loaded, "head").show()):
        assert "\x1b" not in text and "\x07" not in text
    page = html_page(loaded, title="<script>")
    assert "<script>" not in page and "\x1b" not in page
