"""`hone calibrate` on this machine: real steps of a model of random weights, kept and used by the next plan."""

import json
from pathlib import Path

import pytest

from hone.cli import app, calibrate
from hone.settings import Settings


def test_a_machine_is_measured_and_its_plans_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    monkeypatch.setenv("HONE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(calibrate, "CPU_GRID", calibrate.CPU_GRID[:1])
    assert app.run(["calibrate", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [measured] = told["measured"]
    assert told["gpu"] == "" and measured["case"] == "lora 2 × 256"
    assert told["coefficients"]["flops_low"] == pytest.approx(measured["flops_per_second"])
    assert [path.name for path in (tmp_path / "home").iterdir()] == [Settings().calibration_path.name]
    request = {
        "name": "x",
        "model": {"source": f"file://{tiny_model}"},
        "dataset": {"source": "hf://org/data"},
        "method": {"sft": {}},
        "training": {"max_steps": 10},
    }
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    assert app.run(["plan", "--offline", "--json", str(tmp_path / "request.json")]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    expected = 10 * plan["step_flops"] / measured["flops_per_second"]
    assert plan["seconds_low"] == pytest.approx(expected)
    assert any("measured on 20" in note for note in plan["notes"])
