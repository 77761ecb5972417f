"""Trackers get what a run tells, each through its own library, and nothing that they do is the run's.

What they wrote is read back by their own libraries, in a process of their own: workers, and so these tests, hide them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hone.run import TrainerExit
from hone_trainer import trackers
from hone_trainer.failure import RunFailed
from hone_trainer.trackers import Tracking, environment_of

from .conftest import Attempt, MakeAttempt, write_rows
from .test_supervisor import Start, start

__all__ = ["start"]

READ = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
read = EventAccumulator(path)
read.Reload()
print(json.dumps({tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}))
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient(f"file://{path}")
[experiment] = [one for one in client.search_experiments() if one.name == "hone"]
[run] = client.search_runs([experiment.experiment_id])
series = {name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
          for name in run.data.metrics}
print(json.dumps({**series, "status": run.info.status, "parameters": run.data.params, "name": run.info.run_name}))
""",
    "wandb": """
import glob, struct
from wandb.proto.wandb_internal_pb2 import Record
series, status, name = {}, None, None

def records(data):
    # LevelDB's log format: blocks of 32 KiB, of records of crc, length, type (whole, first, middle, last), bytes
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place:place + 7])
        parts += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""

for file in sorted(glob.glob(path + "/wandb/offline-run-*/*.wandb")):
    for data in records(open(file, "rb").read()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            row = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in record.history.item}
            for key in row.keys() - {"step"}:
                if "step" in row and not key.startswith("_"):
                    series.setdefault(key, []).append((row["step"], row[key]))
        elif record.HasField("exit"):
            status = record.exit.exit_code
        elif record.HasField("run"):
            name = record.run.run_id
print(json.dumps({**series, "status": status, "name": name}))
""",
}


def read_back(name: str, path: Path) -> dict[str, Any]:
    environment = {**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true", "DO_NOT_TRACK": "1"}
    script = f"import json\npath = {str(path / name)!r}\n{READ[name]}"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def told(attempt: Attempt, kind: str, name: str) -> list[list[float]]:
    """What the run itself said, as a tracker should have it."""
    return [[event.step or 0, event.metrics[name]] for event in attempt.events(kind) if name in event.metrics]


def test_every_tracker_has_what_the_run_told(make_attempt: MakeAttempt, start: Start) -> None:
    changes = {
        "dataset": {"eval_fraction": 0.25},
        "training": {"eval": {"at_start": True}},
        "reporting": {"trackers": ["tensorboard", "mlflow", "wandb"], "samples": {"prompts": 1, "max_new_tokens": 4}},
    }
    attempt = make_attempt(changes)
    assert start(attempt).wait(240) == TrainerExit.SUCCEEDED
    [note] = [event for event in attempt.events("note") if "trackers" in event.fields]
    stored = Path(note.fields["trackers"].removeprefix("file://"))
    assert stored == attempt.store / "attempt-1" / "trackers"
    assert [event.message for event in attempt.events("warning") if "tracker" in event.fields] == []
    for name in READ:
        found = read_back(name, stored)
        for tracked, kind, metric in (("train/loss", "progress", "loss"), ("eval/loss", "eval", "eval_loss")):
            expected = told(attempt, kind, metric)
            assert len(found[tracked]) == len(expected) > 0, name
            for (step, value), (expected_step, expected_value) in zip(found[tracked], expected, strict=True):
                assert step == expected_step and value == pytest.approx(expected_value, rel=1e-6), (name, tracked)
        assert "train/max_steps" not in found
    mlflow = read_back("mlflow", stored)
    assert (mlflow["status"], mlflow["name"]) == ("FINISHED", "tiny-1")
    assert mlflow["parameters"]["adapter.lora.rank"] == str(attempt.run.spec.adapter.lora.rank)  # type: ignore[union-attr]
    assert read_back("wandb", stored)["status"] == 0


def test_a_tracker_that_cannot_be_reached_costs_the_run_a_warning(
    make_attempt: MakeAttempt, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    attempt = make_attempt({"reporting": {"trackers": ["mlflow", "tensorboard"]}})
    assert start(attempt).wait(240) == TrainerExit.SUCCEEDED
    [warning] = [event.message for event in attempt.events("warning") if "tracker" in event.fields]
    assert warning.startswith("mlflow takes no more of this run: ")
    stored = attempt.store / "attempt-1" / "trackers"
    assert len(read_back("tensorboard", stored)["train/loss"]) == len(attempt.losses()) > 0


def test_a_run_that_failed_is_a_failed_one_there_too(make_attempt: MakeAttempt, start: Start, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    attempt = make_attempt({"dataset": {"source": f"file://{rows}"}, "reporting": {"trackers": ["mlflow"]}})
    assert start(attempt).wait(240) == TrainerExit.DATA
    assert read_back("mlflow", attempt.store / "attempt-1" / "trackers")["status"] == "FAILED"


def test_a_library_that_is_not_installed_is_a_fault_of_the_request(
    make_attempt: MakeAttempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    attempt = make_attempt({"reporting": {"trackers": ["wandb"]}})
    with pytest.raises(RunFailed, match="names wandb, which this trainer has not installed") as caught:
        Tracking(attempt.run, attempt.directory, {})
    assert caught.value.code == TrainerExit.USER


def test_trackers_have_their_own_secrets_and_no_others() -> None:
    given = {
        "WANDB_API_KEY": "own-1", "MLFLOW_TRACKING_PASSWORD": "own-2", "https_proxy": "http://u:own-3@proxy",
        "HF_TOKEN": "canary-1", "AWS_SECRET_ACCESS_KEY": "canary-2", "PATH": "/bin",
    }  # fmt: skip
    found = environment_of(given)
    assert {"WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "https_proxy", "PATH"} <= found.keys()
    assert "canary" not in str(found)
