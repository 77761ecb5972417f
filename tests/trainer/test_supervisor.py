"""The trainer as backends start it: real processes, killed and interrupted, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hone.run import RunDirectory, TrainerExit
from hone.storage import FileStore, verify_directory
from hone_trainer.publish import Publisher
from hone_trainer.report import EventLog
from hone_trainer.supervisor import supervise

from .conftest import Attempt, MakeAttempt, RunHere, write_rows

LONG = {"training": {"max_steps": 100_000}}
Start = Callable[[Attempt], "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `python -m hone_trainer run`, and kills what is left of it at the end."""
    children: list[subprocess.Popen[bytes]] = []

    def run(attempt: Attempt) -> "subprocess.Popen[bytes]":
        attempt.directory.trainer_log.parent.mkdir(exist_ok=True)
        with attempt.directory.trainer_log.open("wb") as log:
            command = [sys.executable, "-m", "hone_trainer", "run", str(attempt.directory.path)]
            children.append(subprocess.Popen(command, stdout=log, stderr=log))
        return children[-1]

    yield run
    for child in children:
        child.kill()
        child.wait()


def wait_for(found: Callable[[], Any], *, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def has_stepped(attempt: Attempt) -> bool:
    return attempt.directory.events.exists() and b'"progress"' in attempt.directory.events.read_bytes()


def worker_pid(attempt: Attempt, rank: int = 0) -> int:
    return int((attempt.directory.scratch / f"worker-{rank}.pid").read_text())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def outputs_of(attempt: Attempt) -> list[str]:
    found = [path.parent for path in attempt.store.rglob("MANIFEST.json")]
    return sorted(path.name for path in found if path.parent.name != "checkpoints")


def test_a_run_leaves_verified_outputs_and_says_so(make_attempt: MakeAttempt, start: Start) -> None:
    attempt = make_attempt({"output": {"merged": True}})
    assert start(attempt).wait(180) == TrainerExit.SUCCEEDED
    assert (attempt.exit()["exit_code"], attempt.exit()["failure"]) == (0, None)
    assert outputs_of(attempt) == ["adapter", "merged"]
    store = FileStore(attempt.store)
    for event in attempt.events("output"):
        manifest = verify_directory(store, event.fields["kind"], digest=event.fields["sha256"])
        assert manifest.size_bytes == int(event.fields["size_bytes"])
    result = attempt.result()
    assert result["outputs"]["adapter"]["sha256"] == attempt.events("output")[0].fields["sha256"]
    assert (result["job"], result["attempt"], result["steps"]["done"]) == ("tiny-1", 1, 4)
    assert json.loads((attempt.store / "current.json").read_text())["attempt"] == 1
    assert (attempt.store / "attempt-1" / "metrics.jsonl").read_bytes() == attempt.directory.events.read_bytes()
    page = (attempt.store / "report.html").read_text()
    assert ">SUCCEEDED</span>" in page and "Peak memory: " in page
    assert attempt.events("note")[-1].fields["report"] == f"file://{attempt.store / 'report.html'}"
    # The same lines stand in the trainer's own log, each with its number; the worker wrote to its rank's log.
    printed = [line for line in attempt.directory.trainer_log.read_bytes().splitlines() if line.startswith(b"{")]
    lines = attempt.directory.events.read_bytes().splitlines()
    assert [json.loads(line) for line in printed] == [
        {"seq": seq, **json.loads(line)} for seq, line in enumerate(lines, start=1)
    ]
    assert "trainable params: 8,192 ||" in attempt.directory.log(0).read_text()
    assert not attempt.directory.scratch.exists()
    # A second trainer of the same attempt gives up, and changes nothing.
    before = attempt.directory.exit.read_bytes()
    assert start(attempt).wait(120) == TrainerExit.ALREADY_RAN
    assert attempt.directory.exit.read_bytes() == before


def test_two_processes_train_as_one_with_the_whole_batch(
    make_attempt: MakeAttempt, start: Start, run_here: RunHere
) -> None:
    changes = {"dataset": {"eval_fraction": 0.125}, "training": {"eval": {"at_start": True}}}
    alone = run_here(make_attempt(changes, micro_batch_size=4))
    together = make_attempt(changes, processes=2, micro_batch_size=2, job="tiny-2")
    assert start(together).wait(180) == 0
    assert together.losses() == pytest.approx(alone.losses(), abs=1e-5)
    figures = [[event.metrics["eval_loss"] for event in run.events("eval")] for run in (alone, together)]
    assert figures[1] == pytest.approx(figures[0], abs=1e-5)
    tokens = [run.events("progress")[-1].metrics["tokens"] for run in (alone, together)]
    assert tokens[0] == tokens[1]
    assert together.directory.log(1).exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_the_run_as_interrupted_and_leaves_no_output(
    make_attempt: MakeAttempt, start: Start, processes: int
) -> None:
    attempt = make_attempt(LONG, processes=processes)
    child = start(attempt)
    wait_for(lambda: has_stepped(attempt))
    workers = [worker_pid(attempt, rank) for rank in range(processes)]
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == TrainerExit.INTERRUPTED
    assert attempt.exit()["failure"]["failure_class"] == "PREEMPTED"
    assert outputs_of(attempt) == []
    assert not any(is_alive(pid) for pid in workers)


def test_sigterm_before_training_is_heard_too(make_attempt: MakeAttempt, start: Start) -> None:
    attempt = make_attempt(LONG)
    child = start(attempt)
    wait_for(lambda: attempt.directory.process.exists())
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == TrainerExit.INTERRUPTED
    assert attempt.exit()["exit_code"] == TrainerExit.INTERRUPTED


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1)])
def test_a_worker_that_is_killed_is_told_with_its_signal_and_last_lines(
    make_attempt: MakeAttempt, start: Start, processes: int, rank: int
) -> None:
    attempt = make_attempt(LONG, processes=processes)
    child = start(attempt)
    wait_for(lambda: has_stepped(attempt))
    os.kill(worker_pid(attempt, rank), signal.SIGKILL)
    assert child.wait(120) == TrainerExit.WORKER_DIED
    failure = attempt.exit()["failure"]
    assert (failure["failure_class"], failure["rank"]) == ("INFRA", rank)
    assert f"rank {rank} was killed by SIGKILL" in failure["message"]
    assert any("trainable params" in line for line in failure["log_tail"])
    assert len(attempt.events("failure")) == 1
    assert not attempt.directory.scratch.exists()
    assert outputs_of(attempt) == []


def test_no_worker_outlives_a_trainer_that_is_killed(make_attempt: MakeAttempt, start: Start) -> None:
    attempt = make_attempt(LONG, processes=2)
    child = start(attempt)
    wait_for(lambda: has_stepped(attempt))
    workers = [worker_pid(attempt, rank) for rank in range(2)]
    child.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in workers), timeout_s=10)
    assert not attempt.directory.exit.exists()
    assert outputs_of(attempt) == []
    assert start(attempt).wait(120) == TrainerExit.ALREADY_RAN


def test_a_world_that_is_not_the_planned_one_is_refused_at_once(make_attempt: MakeAttempt) -> None:
    attempt = make_attempt(processes=2, launcher="direct")
    assert supervise(attempt.directory.path) == TrainerExit.WRONG_WORLD
    assert "1 processes were started, the plan says 2 (ddp)" in attempt.exit()["failure"]["message"]


def test_a_fault_of_the_data_is_said_before_the_model_is_loaded(make_attempt: MakeAttempt, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    attempt = make_attempt({"dataset": {"source": f"file://{rows}"}})
    assert supervise(attempt.directory.path) == TrainerExit.DATA
    assert "row 2 (bad.jsonl line 2): has no column completion" in attempt.exit()["failure"]["message"]
    assert [event.fields["phase"] for event in attempt.events("phase")] == ["loading", "data"]
    page = (attempt.store / "report.html").read_text()
    assert ">FAILED</span>" in page and "DATA: " in page and "has no column completion" in page


def test_a_scorer_that_the_request_names_may_be_asked_and_nobody_else() -> None:
    script = (
        "import socket\n"
        "from hone_trainer.guard import forbid_network, hosts\n"
        "allowed = hosts(['http://192.0.2.1:8099/score', 'https://localhost/x', 'http://no.such.host.invalid/'])\n"
        "print(sorted(allowed - {'::1'}))\n"
        "forbid_network(allowed)\n"
        "for address in ('192.0.2.1', '192.0.2.2'):\n"
        "    try:\n"
        "        socket.create_connection((address, 8099), timeout=0.2)\n"
        "    except BaseException as error:\n"
        "        print(type(error).__name__)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names, named, other = ended.stdout.splitlines()
    assert names == "['127.0.0.1', '192.0.2.1', 'localhost', 'no.such.host.invalid']"
    assert named != "RunFailed" and other == "RunFailed"


def test_a_connection_that_was_not_asked_for_is_refused_with_its_address() -> None:
    script = (
        "import socket, urllib.request\n"
        "from hone_trainer.guard import forbid_network\n"
        "forbid_network()\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()\n"
        "for attempt in (lambda: socket.create_connection(('192.0.2.1', 443)),\n"
        "                lambda: urllib.request.urlopen('https://huggingface.co')):\n"
        "    try:\n"
        "        attempt()\n"
        "    except BaseException as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = ended.stdout.splitlines()
    assert first.startswith("RunFailed A library tried to connect to 192.0.2.1")
    assert second.startswith("RunFailed A library tried to connect to huggingface.co")


FAULTS: dict[str, tuple[dict[str, Any], TrainerExit, str]] = {
    "missing model": (
        {"model": {"source": "file:///no/such/model"}},
        TrainerExit.USER,
        "/no/such/model does not exist",
    ),
    "model is a file": ({"model": {"source": "file:///etc/hostname"}}, TrainerExit.USER, "is a file"),
    "missing data": (
        {"dataset": {"source": "file:///no.jsonl"}},
        TrainerExit.USER,
        "dataset.source: /no.jsonl does not",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_input_is_named_before_a_worker_starts(make_attempt: MakeAttempt, name: str) -> None:
    changes, code, expected = FAULTS[name]
    attempt = make_attempt(changes)
    assert supervise(attempt.directory.path) == code
    assert expected in attempt.exit()["failure"]["message"]
    assert not attempt.directory.log(0).exists()


def test_a_store_that_cannot_be_written_is_told_before_a_worker_starts(
    make_attempt: MakeAttempt, tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("a file where a directory should be")
    attempt = make_attempt()
    assert supervise(attempt.directory.path) == TrainerExit.STORAGE_REFUSED
    assert "store" in attempt.exit()["failure"]["message"]
    assert not attempt.directory.log(0).exists()


def test_an_older_attempt_is_fenced_off(make_attempt: MakeAttempt) -> None:
    newer, older = make_attempt(attempt=2), make_attempt(attempt=1)
    events = EventLog(newer.directory.events)
    Publisher(newer.run, events, environment={}).claim()
    assert supervise(older.directory.path) == TrainerExit.FENCED
    assert older.exit()["failure"]["message"].startswith("Attempt 2 owns job tiny-1 now; attempt 1 stops")
    assert not (older.store / "attempt-1").exists()


def test_complete_results_of_the_same_request_are_not_made_again(
    make_attempt: MakeAttempt, capfd: pytest.CaptureFixture[str]
) -> None:
    first, again = make_attempt(), make_attempt(attempt=2)
    assert supervise(first.directory.path) == 0
    before = {path: path.read_bytes() for path in first.store.rglob("*") if path.is_file()}
    assert supervise(again.directory.path) == 0
    assert {path: path.read_bytes() for path in first.store.rglob("*") if path.is_file()} == before
    assert [event.type for event in again.events()] == ["note", "output"]
    told = [run.events("output")[0].fields for run in (first, again)]
    assert told[0] == told[1]
    assert "Complete results of this request are in the store already" in capfd.readouterr().err


def test_a_run_file_that_is_none_is_a_fault_of_the_request(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("launch: 7")
    assert supervise(tmp_path) == TrainerExit.USER
    assert RunDirectory(tmp_path).exit.exists()


def test_the_supervisor_starts_without_the_heavy_libraries() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'boto3', 'grpc'}"
    script = f"import sys, hone_trainer.supervisor; print(sorted({heavy} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_a_worker_that_does_not_hear_is_ended_in_time_to_tell_it(
    make_attempt: MakeAttempt, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is stopped (SIGSTOP) stands for one that hangs in a library."""
    monkeypatch.setenv("HONE_GRACE_S", "4")
    attempt = make_attempt(LONG)
    child = start(attempt)
    wait_for(lambda: has_stepped(attempt))
    os.kill(worker_pid(attempt), signal.SIGSTOP)
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == TrainerExit.INTERRUPTED
    assert time.monotonic() - began < 30
    assert attempt.exit()["failure"]["failure_class"] == "PREEMPTED"
