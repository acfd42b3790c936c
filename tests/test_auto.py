"""`finalize(target="auto", data=...)`: what is chosen, what is said of the others, and what is kept in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.backends import auto
from fxcompress.backends.auto import ENGINES, Deployed, Row, Table
from fxcompress.diagnostics import ArtifactError, FxcError, PlanError

POLICY = 'use "std/quant.fxc" { int8 }\npolicy small { target auto\n quantize conv2d | linear as int8 { } }'


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.second(F.relu(self.first(x))))
        return {"logits": self.last(x.mean((2, 3))), "features": x}


def compiled(policy: str = POLICY) -> tuple[fxcompress.Result, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    return fxcompress.compile(policy, Net().eval(), x, calibration=[x]), x


@pytest.fixture(scope="module")
def chosen() -> tuple[fxcompress.Result, Tensor, Deployed]:
    """With the times that the test says: what is fast on this machine is not for tests to say."""
    result, x = compiled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcompress.engine.auto.timed", lambda found, example: [
            {"openvino int8": 1e-3}.get(f"{one.engine} {one.precision}", 2e-3) for one in found])
        return result, x, result.finalize(data=x)


def test_all_engines_are_tried_and_the_fastest_is_given(chosen: tuple[fxcompress.Result, Tensor, Deployed]) -> None:
    result, x, deployed = chosen
    assert deployed.table is not None
    assert [row.name for row in deployed.table.rows] == [f"{engine} {precision}" for precision in ("int8", "fp32")
                                                         for engine in ENGINES]
    assert all(row.seconds is not None or row.why for row in deployed.table.rows)
    assert (deployed.engine, deployed.precision, deployed.module) == ("openvino", "int8", None)
    assert deployed.table.chosen.name == "openvino int8" and "chosen" in deployed.table.show()
    assert any("openvino" in note and "chosen" in note for note in result.notes)
    with torch.no_grad():
        expected = result.module.eval()(x)
    found = deployed(x)
    assert list(found) == ["logits", "features"]
    for name, tensor in found.items():
        step = float(expected[name].max() - expected[name].min()) / 127
        assert float((tensor - expected[name]).abs().max()) < step
    assert all(torch.equal(a, b) for a, b in zip(deployed(x=x).values(), found.values(), strict=True))
    with pytest.raises(TypeError, match="the model takes x"):
        deployed(x, x)


LOADS = """
import sys, pickle
from safetensors.torch import load_file, save_file
from fxcompress.backends.auto import Deployed
pickle.Unpickler = pickle.loads = pickle.load = None
deployed = Deployed.load(sys.argv[1])
save_file({name: x.clone() for name, x in deployed(**load_file(sys.argv[2])).items()}, sys.argv[3])
"""


def test_saved_and_loaded_in_a_fresh_process(
        chosen: tuple[fxcompress.Result, Tensor, Deployed], tmp_path: Path) -> None:
    _, x, deployed = chosen
    deployed.save(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["deployed.json", "model.bin", "model.xml"]
    save_file({"x": x}, tmp_path / "given")
    subprocess.run([sys.executable, "-P", "-c", LOADS, str(tmp_path / "out"), str(tmp_path / "given"),
                    str(tmp_path / "found")], check=True)
    for name, tensor in load_file(tmp_path / "found").items():
        assert torch.equal(tensor, deployed(x)[name])
    loaded = Deployed.load(tmp_path / "out")
    assert loaded.table == deployed.table
    with pytest.raises(ArtifactError):
        deployed.save(tmp_path / "out")


def test_a_deployment_of_this_graph_module(tmp_path: Path) -> None:
    result, x = compiled()
    module = result.finalize(target="cpu")
    deployed = Deployed("eager", "int8", module)
    deployed.save(tmp_path / "out")
    loaded = Deployed.load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(loaded(x).values(), module(x).values(), strict=True))
    assert not loaded(x)["logits"].requires_grad
    assert list(deployed.state_dict()) == [f"module.{name}" for name in module.state_dict()]


def test_folders_of_strangers(chosen: tuple[fxcompress.Result, Tensor, Deployed], tmp_path: Path) -> None:
    _, _, deployed = chosen
    deployed.save(tmp_path / "out")
    about = tmp_path / "out" / "deployed.json"
    document = json.loads(about.read_text())

    def refused(change: dict[str, Any]) -> str:
        about.write_text(json.dumps(document | change))
        with pytest.raises(ArtifactError) as error:
            Deployed.load(tmp_path / "out")
        return error.value.diagnostics[0].code

    files = document["files"]
    assert refused({"format": "other"}) == "FXC0645"
    assert refused({"version": 9}) == "FXC0602"
    assert refused({"engine": "os.system"}) == "FXC0604"
    assert refused({"files": {"../model.xml": files["model.xml"]}}) == "FXC0606"
    assert refused({"files": {"model.bin": files["model.bin"]}}) == "FXC0604"
    assert refused({"files": files | {"model.bin": {"size": 1, "sha256": "0"}}}) == "FXC0645"
    assert refused({"signature": {"inputs": {}, "outputs": ["a"], "result": {"at": 3}}}) == "FXC0604"
    assert refused({"table": {"rows": [{}], "threads": 1}}) == "FXC0604"


def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "ENGINES", ("eager", "onnxruntime"))


def test_expectations_are_kept_by_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that computes something else is refused by the drift it causes; so is a precision."""
    torch_alone(monkeypatch)
    monkeypatch.setitem(auto.RUNTIMES, "onnxruntime", lambda path: lambda inputs: [torch.zeros(4, 4), torch.zeros(1)])
    result, x = compiled(POLICY[:-1] + "\nexpect drift(output) < 30% }")
    deployed = result.finalize(data=x)
    assert deployed.engine == "eager" and deployed.table is not None
    broken = [row for row in deployed.table.rows if row.engine == "onnxruntime"]
    assert len(broken) == 2 and all(row.seconds is None and "drift" in row.why for row in broken)
    result, x = compiled(POLICY[:-1] + "\nexpect drift(output) < 0.0001% }")
    monkeypatch.undo()
    torch_alone(monkeypatch)
    deployed = result.finalize(data=x)
    assert deployed.precision == "fp32" and deployed.table is not None
    assert next(row for row in deployed.table.rows if row.precision == "int8").why.startswith("the result is not as")


def test_a_missing_engine_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_alone(monkeypatch)
    monkeypatch.setattr("fxcompress.backends.libraries.find_spec", lambda name: None)
    result, x = compiled("policy p { target auto }")
    table = result.finalize(data=x).table
    assert table is not None and [row.name for row in table.rows] == ["eager fp32", "onnxruntime fp32"]
    assert table.rows[1].why.startswith("onnxruntime is not installed") and table.chosen is table.rows[0]


def test_a_budget_of_time_is_judged_by_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "ENGINES", ("eager",))
    result, x = compiled("policy p { target auto\n budget latency <= 0.0001 ms }")
    with pytest.raises(PlanError) as error:
        result.finalize(data=x)
    diagnostic, = error.value.diagnostics
    assert diagnostic.code == "FXC0722" and "isn't met" in diagnostic.notes[0]


def test_data_have_to_fit_and_be_wanted() -> None:
    result, x = compiled()
    for arguments, code in (({"data": x[:, :2]}, "FXC0570"), ({"target": "cpu", "data": x}, "FXC0723")):
        with pytest.raises(FxcError) as error:
            result.finalize(**arguments)
        assert [item.code for item in error.value.diagnostics] == [code]


def test_without_data_auto_is_the_device() -> None:
    result, _ = compiled()
    assert isinstance(result.finalize(), torch.fx.GraphModule)


def test_timing_goes_in_turns_and_gives_medians() -> None:
    class Sleeper(Deployed):
        def __init__(self, seconds: float) -> None:
            nn.Module.__init__(self)
            self.seconds, self.calls = seconds, 0

        def forward(self) -> None:
            import time

            self.calls += 1
            time.sleep(self.seconds)

    fast, close, slow = Sleeper(0.001), Sleeper(0.002), Sleeper(0.2)
    seconds = auto.timed([slow, fast, close], auto.Example(()))
    assert slow.calls == 2 and fast.calls > 7 and close.calls > 7, "what is far too slow isn't timed further"
    assert all(found >= one.seconds for found, one in zip(seconds, (slow, fast, close), strict=True))


def test_table() -> None:
    table = Table((Row("eager", "int8", 0.002), Row("compiled", "int8", None, "no compiler"),
                   Row("openvino", "fp32", 0.001, "", True)), 2)
    assert table.show() == (
        "engine                        ms  of the slowest\n"
        "eager            int8      2.000  1.00x\n"
        "compiled         int8          -  no compiler\n"
        "openvino         fp32      1.000  2.00x  chosen\n"
        "2 threads; medians of interleaved rounds")
    assert Table.of(json.loads(json.dumps(table.to_json()))) == table
