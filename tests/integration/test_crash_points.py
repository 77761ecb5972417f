"""SIGKILL of the service at every named point: what was acknowledged is not lost, nothing runs twice, no event is
missing or doubled.

Each case kills a real service process at its point, starts another on the same home, and then looks at everything that
is left: database, run directories, artefacts, and how often a trainer really began.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hone.backends.run_files import read_process
from hone.job import Event, EventType, Job, State
from hone.run import RunDirectory
from hone.spec import JobSpec
from hone.storage import JobLayout, open_store, verify_directory
from hone.store import Store, condition

SERVICE = Path(__file__).parent / "service_process.py"
# Every change of the record is cut short before and after its commit; further changes come with events, whose number
# varies, so the points after them have names of their own.
POINTS = [
    ("finish", "create-before-commit"),
    ("finish", "create-after-commit"),
    ("finish", "change-before-commit:1"),
    ("finish", "change-after-commit:1"),
    ("finish", "attempt-recorded"),
    ("finish", "observed:1"),
    ("finish", "ensure-before-start"),
    ("finish", "ensure-after-start"),
    ("finish", "change-before-commit:2"),
    ("finish", "change-after-commit:2"),
    ("finish", "observed:2"),
    ("finish", "change-before-commit:3"),
    ("finish", "change-after-commit:3"),
    ("finish", "change-before-commit:4"),
    ("finish", "events-stored:1"),
    ("finish", "events-stored:2"),
    ("finish", "outputs-read-back"),
    ("finish", "finished"),
    ("fail", "attempt-ended"),
    ("fail", "change-before-commit:4"),
    ("cancel", "stop-asked:1"),
    ("cancel", "stop-asked:2"),
    ("pause", "stop-asked:1"),
    ("pause", "stop-asked:2"),
    ("pause", "logs-read"),
    ("pause", "ended-on-request"),
    ("pause", "attempt-recorded:2"),
    ("pause", "ensure-before-start:2"),
    ("pause", "ensure-after-start:2"),
    ("delete", "runs-removed"),
    ("delete", "artifacts-deleted"),
    ("delete", "bury-before-commit"),
    ("delete", "bury-after-commit"),
]
ENDS = {"finish": "SUCCEEDED", "fail": "FAILED", "cancel": "CANCELLED", "pause": "SUCCEEDED", "delete": "DELETED"}
LABELS = {
    "finish": {"steps": "12", "pause_ms": "50"},
    "fail": {"steps": "5", "ending": "crash"},
    "cancel": {"steps": "1000", "pause_ms": "20"},
    "pause": {"steps": "40", "pause_ms": "50", "checkpoints": "1000"},
    "delete": {"steps": "2"},
}


@dataclass(frozen=True)
class Home:
    """One HONE_HOME and what is in it."""

    path: Path
    starts_file: Path
    environment: dict[str, str]

    def run(self, scenario: str, spec: Path, *, crash_at: str = "") -> "subprocess.CompletedProcess[str]":
        environment = {**self.environment, "HONE_CRASH_AT": crash_at}
        command = [sys.executable, str(SERVICE), scenario, str(spec)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    def jobs(self) -> list[Job]:
        store = Store(f"sqlite:///{self.path / 'hone.db'}")
        found = store.page("default", condition=condition(""), limit=10)
        store.close()
        return found

    def events(self) -> list[Event]:
        store = Store(f"sqlite:///{self.path / 'hone.db'}")
        found = list(store.events("default"))
        store.close()
        return found

    def starts(self) -> list[str]:
        return self.starts_file.read_text().splitlines() if self.starts_file.exists() else []


@pytest.fixture
def home(tmp_path: Path, quick_python: Path) -> Home:
    path = tmp_path / "home"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    starts = tmp_path / "starts"
    settings = {
        "HONE_HOME": str(path),
        "HONE_TRAINER_PYTHON": str(quick_python),
        "HONE_TEST_STARTS": str(starts),
        "HONE_GRACE_S": "20",
    }
    return Home(path, starts, {**kept, **settings})


@pytest.fixture
def write_spec(tmp_path: Path, make_spec: Callable[..., JobSpec]) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(make_spec(**changes).to_mapping()))
        return path

    return write


AGAIN = {
    ("finish", "change-before-commit:2"),
    ("finish", "change-after-commit:2"),
    ("finish", "change-before-commit:3"),
    ("finish", "change-after-commit:3"),
    ("finish", "observed:2"),
    ("finish", "events-stored:2"),
    ("cancel", "stop-asked:2"),
    ("pause", "stop-asked:2"),
}
"""Points whose like is cut elsewhere in the table: for `make soak`."""


@pytest.mark.parametrize(
    ("scenario", "point"),
    [pytest.param(*case, id="-".join(case), marks=[pytest.mark.slow] * (case in AGAIN)) for case in POINTS],
)
def test_a_service_killed_anywhere_is_taken_up_where_it_was(
    home: Home, write_spec: Callable[..., Path], scenario: str, point: str
) -> None:
    spec = write_spec(labels=LABELS[scenario])
    killed = home.run(scenario, spec, crash_at=point)
    assert killed.returncode == -signal.SIGKILL, f"the point was never reached: {killed.stderr}"
    acknowledged = [job.id for job in home.jobs()]
    answer = home.run(scenario, spec)
    assert (answer.returncode, answer.stdout) == (0, ENDS[scenario]), answer.stderr
    if scenario == "delete":
        assert_nothing_is_left(home)
    elif scenario == "pause":
        assert_gone_on(home)
    else:
        assert_told_once(home, acknowledged, State(ENDS[scenario]))


def assert_told_once(home: Home, acknowledged: list[str], state: State) -> None:
    """One job, one attempt, one training; the record holds every line of the trainer's, once and in order."""
    (job,) = home.jobs()
    assert acknowledged in ([], [job.id])
    assert job.state == state
    (attempt,) = job.attempts
    assert home.starts() == [f"{job.id} 1"]
    events = home.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    directory = RunDirectory(home.path / "runs" / "default" / job.id / "attempt-1")
    lines = [json.loads(line) for line in directory.events.read_text().splitlines()]
    told = [event for event in events if event.attempt == 1]
    assert [(event.type, event.message, event.step) for event in told] == [
        (line["type"], line["message"], line["step"]) for line in lines
    ]
    states = [event.fields["state"] for event in events if event.type == EventType.STATE]
    assert states[0] == "PENDING" and states[-1] == state and len(states) == len(set(states))
    assert_gone(directory)
    if state == State.SUCCEEDED:
        store = open_store((home.path / "artifacts").as_uri())
        verify_directory(store, JobLayout("default", job.id).adapter, digest=job.outputs[0].sha256)
    else:
        assert job.outputs == () and attempt.failure


def assert_gone_on(home: Home) -> None:
    """Two attempts, each begun once; every step was made once, and none is missing."""
    (job,) = home.jobs()
    assert [(attempt.state, attempt.counted) for attempt in job.attempts] == [
        (State.CANCELLED, False),
        (State.SUCCEEDED, True),
    ]
    assert home.starts() == [f"{job.id} 1", f"{job.id} 2"]
    events = home.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.step for event in events if event.type == EventType.PROGRESS] == list(range(1, 41))
    (saved,) = [event for event in events if event.type == EventType.CHECKPOINT]
    for number in (1, 2):
        assert_gone(RunDirectory(home.path / "runs" / "default" / job.id / f"attempt-{number}"))
    store = open_store((home.path / "artifacts").as_uri())
    verify_directory(store, JobLayout("default", job.id).output(saved.fields["place"]), digest=saved.fields["sha256"])


def assert_gone(directory: RunDirectory) -> None:
    """The trainer has told its end, so its process goes within moments."""
    process = read_process(directory)
    deadline = time.monotonic() + 10
    while process and process.is_alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process and not process.is_alive


def assert_nothing_is_left(home: Home) -> None:
    assert home.jobs() == []
    assert list((home.path / "runs").glob("*/*")) == []
    assert [path for path in (home.path / "artifacts").glob("*/*") if not path.name.startswith(".")] == []
    assert home.starts() and len(home.starts()) == 1
    assert [event.fields.get("deleted") for event in home.events()] == ["true"]


def test_a_trainer_killed_while_no_service_runs_is_told_as_killed(home: Home, write_spec: Callable[..., Path]) -> None:
    spec = write_spec(labels={"steps": "1000", "pause_ms": "20"})
    assert home.run("finish", spec, crash_at="events-stored:2").returncode == -signal.SIGKILL
    (job,) = home.jobs()
    process = read_process(RunDirectory(home.path / "runs" / "default" / job.id / "attempt-1"))
    assert process and process.is_alive
    os.kill(process.pid, signal.SIGKILL)
    answer = home.run("finish", spec)
    assert answer.stdout == "FAILED", answer.stderr
    (job,) = home.jobs()
    assert job.failure and "signal 9 or power loss" in job.failure.message and "of 1000" in job.failure.message
    assert len(home.starts()) == 1 and job.outputs == ()
    assert len([event for event in home.events() if event.type == EventType.FAILURE]) == 1


def test_what_was_trained_while_no_service_ran_is_found_finished(home: Home, write_spec: Callable[..., Path]) -> None:
    spec = write_spec(labels={"steps": "20", "pause_ms": "50"})
    assert home.run("finish", spec, crash_at="ensure-after-start").returncode == -signal.SIGKILL
    (job,) = home.jobs()
    directory = RunDirectory(home.path / "runs" / "default" / job.id / "attempt-1")
    deadline = time.monotonic() + 60
    while not directory.exit.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert home.run("finish", spec).stdout == "SUCCEEDED"
    assert_told_once(home, [job.id], State.SUCCEEDED)
