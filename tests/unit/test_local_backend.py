"""The local backend: a trainer is started once, found again, stopped, and its end is told as it was."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hone import gpus
from hone.backends import run_files
from hone.backends.base import Observation, Phase
from hone.backends.inputs import check_inputs, sources
from hone.backends.local import LocalBackend
from hone.backends.room import Needs, Room, Share
from hone.errors import InvalidRequest, StorageError, WrongState
from hone.job import Event, EventType, FailureClass, Plan
from hone.machine import plan_here
from hone.plan import Hardware, Planned
from hone.run import Run, RunDirectory
from hone.spec import JobSpec

GIB = 1024**3
PROFILES = gpus.load_profiles()
HARDWARE = Hardware(profiles=PROFILES, cpu_cores=2, memory_bytes=64 * GIB)
Plans = Callable[..., tuple[Run, Plan]]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def make_backend(runs: Path, quick_python: Path) -> Iterator[Callable[..., LocalBackend]]:
    made = []

    def make(**changes: Any) -> LocalBackend:
        made.append(LocalBackend(runs, **{"hardware": HARDWARE, "trainer_python": str(quick_python), **changes}))
        return made[-1]

    yield make
    for process in (run_files.read_process(RunDirectory(path)) for path in runs.glob("*/*/attempt-*")):
        if process and process.is_alive:
            os.killpg(process.pid, signal.SIGKILL)
    for backend in made:
        for child in backend._children.values():
            child.wait(10)
        backend.close()


@pytest.fixture
def backend(make_backend: Callable[..., LocalBackend]) -> LocalBackend:
    return make_backend()


@pytest.fixture
def make_run(tmp_path: Path, make_spec: Callable[..., JobSpec]) -> Plans:
    def make(job: str = "demo-1", *, attempt: int = 1, **labels: str) -> tuple[Run, Plan]:
        planned = plan_here(make_spec(labels=labels), HARDWARE)
        run = Run(
            namespace="default",
            job=job,
            attempt=attempt,
            nonce=f"nonce of {job}",
            spec=planned.spec,
            launch=planned.plan.launch,
            store=(tmp_path / "artifacts").as_uri(),
            inputs={},
        )
        return run, planned.plan

    return make


def look_until(
    backend: LocalBackend, run: Run, *phases: Phase, until: Callable[[Observation], bool] | None = None
) -> Observation:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        seen = backend.observe(run, after_seq=0)
        if seen.phase in phases and (until is None or until(seen)):
            return seen
        time.sleep(0.02)
    raise AssertionError(f"still {seen}")


def trains(seen: Observation) -> bool:
    return any(event.type == EventType.PROGRESS for event in seen.events)


def starts(tmp_path: Path) -> list[str]:
    path = tmp_path / "starts"
    return path.read_text().splitlines() if path.exists() else []


def directory_of(runs: Path, run: Run) -> RunDirectory:
    return RunDirectory(runs / "default" / run.job / f"attempt-{run.attempt}")


def test_a_run_goes_from_absent_to_succeeded_and_reports_every_line(
    backend: LocalBackend, make_run: Plans, runs: Path
) -> None:
    run, plan = make_run()
    assert backend.observe(run, after_seq=0).phase == Phase.ABSENT
    assert backend.ensure(run, plan).phase == Phase.RUNNING
    seen = look_until(backend, run, Phase.SUCCEEDED)
    lines = directory_of(runs, run).events.read_text().splitlines()
    assert [event.seq for event in seen.events] == list(range(1, len(lines) + 1))
    assert [event.step for event in seen.events if event.type == EventType.PROGRESS] == [1, 2, 3]
    assert seen.start_time and seen.end_time and seen.start_time <= seen.end_time
    assert backend.observe(run, after_seq=len(lines)).events == ()
    assert backend.observe(run, after_seq=2).events == seen.events[2:]  # back again, without the remembered place


def test_ensure_starts_one_trainer_however_often_it_is_called(
    backend: LocalBackend, make_run: Plans, tmp_path: Path
) -> None:
    run, plan = make_run()
    for _ in range(5):
        backend.ensure(run, plan)
    look_until(backend, run, Phase.SUCCEEDED)
    assert backend.ensure(run, plan).phase == Phase.SUCCEEDED
    assert starts(tmp_path) == ["demo-1 1"]


def test_a_second_service_that_knows_of_nothing_starts_no_second_trainer(
    make_backend: Callable[..., LocalBackend], make_run: Plans, tmp_path: Path
) -> None:
    run, plan = make_run(steps="20", pause_ms="50")
    first, second = make_backend(), make_backend()
    first.ensure(run, plan)
    second.ensure(run, plan)  # no process.json yet: it starts one too, and one of the two gives up
    look_until(second, run, Phase.SUCCEEDED)
    assert starts(tmp_path) == ["demo-1 1"]


def test_a_service_started_later_finds_the_run_and_its_end(
    make_backend: Callable[..., LocalBackend], make_run: Plans, tmp_path: Path
) -> None:
    run, plan = make_run(steps="10", pause_ms="50")
    first = make_backend()
    first.ensure(run, plan)
    look_until(first, run, Phase.RUNNING, until=trains)
    later = make_backend()
    assert later.observe(run, after_seq=0).phase == Phase.RUNNING
    seen = look_until(later, run, Phase.SUCCEEDED)
    assert [event.seq for event in seen.events] == list(range(1, len(seen.events) + 1))
    assert starts(tmp_path) == ["demo-1 1"]


def test_a_killed_trainer_is_told_with_its_step_and_last_lines_and_is_final(
    backend: LocalBackend, make_run: Plans, runs: Path
) -> None:
    run, plan = make_run(steps="1000", pause_ms="20")
    backend.ensure(run, plan)
    look_until(backend, run, Phase.RUNNING, until=trains)
    process = run_files.read_process(directory_of(runs, run))
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    seen = look_until(backend, run, Phase.FAILED)
    assert seen.failure and seen.final
    assert seen.failure.failure_class == FailureClass.INFRA
    assert "was killed (signal 9)" in seen.failure.message and "of 1000" in seen.failure.message
    assert seen.failure.next_step and seen.failure.log_tail
    later = LocalBackend(runs, hardware=HARDWARE)
    found = later.observe(run, after_seq=0)
    assert found.phase == Phase.FAILED and found.failure
    assert "signal 9 or power loss" in found.failure.message


def test_a_trainer_that_fails_says_why_itself(backend: LocalBackend, make_run: Plans) -> None:
    run, plan = make_run(ending="crash")
    backend.ensure(run, plan)
    seen = look_until(backend, run, Phase.FAILED)
    assert seen.failure and not seen.final
    assert seen.failure.failure_class == FailureClass.INTERNAL
    assert "it was asked to fail" in seen.failure.message
    assert "the last line before the end" in seen.failure.log_tail
    assert [event.type for event in seen.events].count(EventType.FAILURE) == 1


def test_stop_lets_a_trainer_end_by_itself(backend: LocalBackend, make_run: Plans) -> None:
    run, plan = make_run(steps="1000", pause_ms="20")
    backend.ensure(run, plan)
    look_until(backend, run, Phase.RUNNING, until=trains)
    backend.stop(run, grace_s=30)
    seen = look_until(backend, run, Phase.FAILED)
    assert seen.failure and seen.failure.failure_class == FailureClass.PREEMPTED and seen.final


def test_stop_kills_a_trainer_that_does_not_listen(backend: LocalBackend, make_run: Plans, runs: Path) -> None:
    run, plan = make_run(steps="1000", pause_ms="20", ending="deaf")
    backend.ensure(run, plan)
    look_until(backend, run, Phase.RUNNING, until=trains)
    process = run_files.read_process(directory_of(runs, run))
    assert backend.stop(run, grace_s=0.2).phase == Phase.RUNNING
    time.sleep(0.3)
    backend.stop(run, grace_s=0.2)
    seen = look_until(backend, run, Phase.FAILED)
    assert seen.failure and "signal 9" in seen.failure.message
    assert process and not process.is_alive


def test_stop_before_the_trainer_came_up_keeps_it_from_ever_starting(
    make_backend: Callable[..., LocalBackend], make_run: Plans, tmp_path: Path, runs: Path
) -> None:
    run, plan = make_run()
    first = make_backend()
    first.ensure(run, plan)
    later = make_backend()  # knows nothing of the child that is on its way
    assert later.stop(run, grace_s=1).phase in (Phase.FAILED, Phase.ABSENT)
    look_until(later, run, Phase.FAILED)
    first._children[f"default/{run.job}/attempt-1"].wait(20)
    assert starts(tmp_path) == []
    assert later.ensure(run, plan).phase == Phase.FAILED


def test_stop_of_what_never_started_leaves_nothing(backend: LocalBackend, make_run: Plans, runs: Path) -> None:
    run, _ = make_run()
    assert backend.stop(run, grace_s=1).phase == Phase.ABSENT
    assert not runs.exists()


def test_a_python_without_the_trainer_is_told_with_the_fix(
    make_backend: Callable[..., LocalBackend], make_run: Plans, tmp_path: Path
) -> None:
    script = tmp_path / "no-trainer"
    script.write_text("#!/bin/sh\necho No module named hone_trainer >&2\nexit 1\n")
    script.chmod(0o755)
    run, plan = make_run()
    backend = make_backend(trainer_python=str(script))
    backend.ensure(run, plan)
    seen = look_until(backend, run, Phase.FAILED)
    assert seen.failure and "ended with code 1 before it came up" in seen.failure.message
    assert "HONE_TRAINER_PYTHON" in seen.failure.next_step
    assert seen.failure.log_tail == ("No module named hone_trainer",)


def test_a_python_that_is_not_there_is_told_at_once(
    make_backend: Callable[..., LocalBackend], make_run: Plans, tmp_path: Path
) -> None:
    run, plan = make_run()
    seen = make_backend(trainer_python=str(tmp_path / "nothing")).ensure(run, plan)
    assert seen.phase == Phase.FAILED and seen.failure and "nothing" in seen.failure.message


def test_a_directory_of_another_attempt_is_not_taken_for_this_one(
    backend: LocalBackend, make_run: Plans, runs: Path
) -> None:
    run, _ = make_run()
    directory = directory_of(runs, run)
    directory.path.mkdir(parents=True)
    record = {"pid": os.getpid(), "start_time": 1, "nonce": "another"}
    directory.process.write_text(json.dumps(record))
    seen = backend.observe(run, after_seq=0)
    assert seen.phase == Phase.FAILED and seen.failure and "another attempt" in seen.failure.message


def test_a_process_that_has_the_number_of_a_dead_trainer_is_never_signalled(
    backend: LocalBackend, make_run: Plans, runs: Path
) -> None:
    run, _ = make_run()
    directory = directory_of(runs, run)
    directory.path.mkdir(parents=True)
    directory.lock.touch()
    directory.process.write_text(json.dumps({"pid": os.getpid(), "start_time": 1, "nonce": run.nonce}))
    seen = backend.stop(run, grace_s=0)  # had it been sent, this test would not be here any more
    assert seen.phase == Phase.FAILED and seen.failure and "was killed" in seen.failure.message


def test_remove_takes_an_ended_run_away_and_refuses_one_that_runs(
    backend: LocalBackend, make_run: Plans, runs: Path
) -> None:
    run, plan = make_run(steps="1000", pause_ms="20")
    backend.ensure(run, plan)
    look_until(backend, run, Phase.RUNNING, until=trains)
    with pytest.raises(WrongState):
        backend.remove(run)
    backend.stop(run, grace_s=30)
    look_until(backend, run, Phase.FAILED)
    backend.remove(run)
    backend.remove(run)
    assert not (runs / "default" / run.job).exists()


def test_logs_are_what_the_first_rank_wrote(backend: LocalBackend, make_run: Plans) -> None:
    run, plan = make_run(ending="crash")
    backend.ensure(run, plan)
    look_until(backend, run, Phase.FAILED)
    whole = b"".join(backend.logs(run, rank=0))
    assert b"the last line before the end\n" in whole and b"Traceback" in whole
    lines = whole.splitlines(keepends=True)
    assert b"".join(backend.logs(run, rank=0, tail=2)) == b"".join(lines[-2:])
    assert b"".join(backend.logs(run, rank=0, offset=10)) == whole[10:]
    assert b"".join(backend.logs(run, rank=0, offset=len(whole))) == b""
    assert b"".join(backend.logs(run, rank=0, tail=0)) == b""
    assert b"".join(backend.logs(run, rank=0, tail=10_000)) == whole


@pytest.mark.parametrize(
    "text", [b"", b"a", b"a\n", b"a\nb", b"a\nb\n", b"\n\n", b"a\n\nb\n", b"x" * 200_000 + b"\ny\n"]
)
@pytest.mark.parametrize("tail", [0, 1, 2, 3, 9])
def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path, text: bytes, tail: int) -> None:
    (tmp_path / "log").write_bytes(text)
    lines = text.splitlines(keepends=True)
    expected = b"".join(lines[len(lines) - min(tail, len(lines)) :])
    assert b"".join(run_files.read_log(tmp_path / "log", tail=tail, offset=0)) == expected


def line(step: int) -> bytes:
    record = {"time": "2026-11-24T12:00:00+00:00", "type": "progress", "message": "", "step": step, "metrics": {}}
    return json.dumps(record).encode() + b"\n"


def test_a_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    path, reader = tmp_path / "events.jsonl", run_files.EventReader()
    assert reader.read(path, after_seq=0) == ()
    path.write_bytes(line(1) + line(2)[:20])
    assert [event.step for event in reader.read(path, after_seq=0)] == [1]
    assert reader.read(path, after_seq=1) == ()
    path.write_bytes(line(1) + line(2) + line(3))
    assert [(event.seq, event.step) for event in reader.read(path, after_seq=1)] == [(2, 2), (3, 3)]


def test_a_line_that_cannot_be_read_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line(1) + b"{\xff broken\n" + b'{"time": 3}\n' + line(4))
    events = run_files.EventReader().read(path, after_seq=0)
    assert [event.seq for event in events] == [1, 2, 3, 4]
    assert [event.type for event in events] == ["progress", "warning", "warning", "progress"]


def test_many_events_come_in_parts_and_none_is_missing(tmp_path: Path) -> None:
    path, reader = tmp_path / "events.jsonl", run_files.EventReader()
    found: list[Event] = []
    path.write_bytes(b"".join(line(step) for step in range(1, 2502)))
    while part := reader.read(path, after_seq=len(found)):
        assert len(part) <= run_files.MAX_EVENTS
        found += part
    assert [event.step for event in found] == list(range(1, 2502))


def needs(*, gib: int = 1, processes: int = 1, gpus: int = 0) -> Needs:
    return Needs(memory_bytes=gib * GIB, processes=processes, gpus=gpus)


def test_room_is_given_while_there_is_some() -> None:
    room = Room(memory_bytes=8 * GIB, cores=2, gpus=())
    assert isinstance(room.take("a", "a", needs()), Share)
    assert isinstance(room.take("b", "b", needs()), Share)
    why = room.take("c", "c", needs())
    assert why == "It waits for 1 of 2 cores: jobs a, b, running or waiting longer, hold 2."
    room.give_back("a")
    assert isinstance(room.take("c", "c", needs()), Share)


def test_memory_is_room_too() -> None:
    room = Room(memory_bytes=8 * GIB, cores=8, gpus=())
    room.take("a", "a", needs(gib=6))
    assert "3.0 GiB of 8.0 GiB of memory: job a," in str(room.take("b", "b", needs(gib=3)))
    assert isinstance(room.take("c", "c", needs(gib=1)), str)  # b waits longer, and c would be in its way


def test_what_asks_for_more_than_there_is_runs_alone() -> None:
    room = Room(memory_bytes=GIB, cores=1, gpus=())
    assert isinstance(room.take("a", "a", needs(gib=2, processes=2)), Share)


def test_no_gpu_is_given_twice() -> None:
    room = Room(memory_bytes=64 * GIB, cores=16, gpus=("0", "1", "2"))
    first, second = room.take("a", "a", needs(gpus=2)), room.take("b", "b", needs(gpus=1))
    assert isinstance(first, Share) and isinstance(second, Share)
    assert sorted(first.gpus + second.gpus) == ["0", "1", "2"]
    assert "1 of 3 GPUs" in str(room.take("c", "c", needs(gpus=1)))


def test_who_waits_longer_goes_first() -> None:
    room = Room(memory_bytes=64 * GIB, cores=4, gpus=())
    room.take("a", "a", needs(processes=3))
    assert isinstance(room.take("big", "big", needs(processes=4)), str)
    assert isinstance(room.take("small", "small", needs(processes=1)), str)
    room.give_back("a")
    assert isinstance(room.take("small", "small", needs(processes=1)), str)
    assert isinstance(room.take("big", "big", needs(processes=4)), Share)


def test_a_run_waits_while_another_holds_the_cores_even_for_a_new_service(
    make_backend: Callable[..., LocalBackend], make_run: Plans
) -> None:
    one_core = replace(HARDWARE, cpu_cores=1)
    first, plan = make_run("demo-1", steps="1000", pause_ms="20")
    second, _ = make_run("demo-2")
    backend = make_backend(hardware=one_core)
    backend.ensure(first, plan)
    assert "job demo-1" in backend.ensure(second, plan).reason
    look_until(backend, first, Phase.RUNNING, until=trains)
    later = make_backend(hardware=one_core)
    assert "job demo-1" in later.ensure(second, plan).reason
    later.stop(first, grace_s=30)
    look_until(later, first, Phase.FAILED)
    assert later.ensure(second, plan).phase == Phase.RUNNING
    look_until(later, second, Phase.SUCCEEDED)


def test_trainers_see_their_gpus_only(
    make_backend: Callable[..., LocalBackend],
    make_run: Plans,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    script = tmp_path / "tell"
    script.write_text('#!/bin/sh\necho "gpus=$CUDA_VISIBLE_DEVICES endpoint=$AWS_ENDPOINT_URL_S3"\nsleep 1\nexit 1\n')
    script.chmod(0o755)
    card = PROFILES["H100-80GB"]
    backend = make_backend(
        hardware=replace(HARDWARE, installed=(card, card)),
        trainer_python=str(script),
        environment={"AWS_ENDPOINT_URL_S3": "http://s3"},
    )
    run, plan = make_run()
    wants = replace(plan, launch=replace(plan.launch, gpus_per_node=1))
    for job in ("demo-1", "demo-2"):
        backend.ensure(replace(run, job=job), wants)
    for job, expected in (("demo-1", "gpus=5"), ("demo-2", "gpus=7")):
        look_until(backend, replace(run, job=job), Phase.FAILED)
        log = runs / "default" / job / "attempt-1" / "logs" / "trainer.log"
        assert log.read_text() == f"{expected} endpoint=http://s3\n"


BAD_INPUTS = [
    ("a model that is not there", "model.source", "no directory on the machine that the service runs on"),
    ("pickle weights", "model.source", "holds pickle weights (pytorch_model.bin)"),
    ("no weights", "model.source", "holds no weights"),
    ("a data set that is not there", "dataset.source", "is no file or directory"),
    ("an empty data set", "dataset.source", "is empty"),
    ("a data set of another kind", "dataset.source", "is not a data file"),
    ("a directory without data", "dataset.source", "holds no data file"),
    ("an evaluation set that is not there", "dataset.eval_source", "is no file or directory"),
    ("a tokenizer that is not there", "model.tokenizer", "is no file or directory"),
]


@pytest.mark.parametrize(("case", "path", "message"), BAD_INPUTS, ids=[case for case, _, _ in BAD_INPUTS])
def test_inputs_that_cannot_be_read_are_refused_before_anything_runs(
    inputs: Path, make_spec: Callable[..., JobSpec], case: str, path: str, message: str
) -> None:
    spec = make_spec(**_broken(case, inputs))
    with pytest.raises(InvalidRequest) as caught:
        check_inputs(sources(spec))
    assert [violation.path for violation in caught.value.violations] == [path]
    assert message in caught.value.violations[0].message


def test_patterns_and_mixed_data_sets_are_looked_at_too(inputs: Path, make_spec: Callable[..., JobSpec]) -> None:
    mix = [{"source": f"file://{inputs / 'none'}"}]
    spec = make_spec(dataset={"source": f"file://{inputs / 'part-*.jsonl'}", "mix": mix})
    with pytest.raises(InvalidRequest) as caught:
        check_inputs(sources(spec))
    found = {violation.path: violation.message for violation in caught.value.violations}
    assert found["dataset.source"] == f"no file in {inputs} matches part-*.jsonl."
    assert "is no file or directory" in found["dataset.mix.0.source"]
    check_inputs(sources(make_spec(dataset={"source": f"file://{inputs / 'r*.jsonl'}"})))


def _broken(case: str, inputs: Path) -> dict[str, Any]:
    weights, rows = inputs / "model" / "model.safetensors", inputs / "rows.jsonl"
    dataset = {"source": f"file://{rows}"}
    if case == "a model that is not there":
        return {"model": {"source": "file:///nowhere"}}
    if case == "pickle weights":
        weights.rename(inputs / "model" / "pytorch_model.bin")
    elif case == "no weights":
        weights.unlink()
    elif case == "a data set that is not there":
        rows.unlink()
    elif case == "an empty data set":
        rows.write_text("")
    elif case == "a data set of another kind":
        rows.rename(inputs / "rows.docx")
        return {"dataset": {"source": f"file://{inputs / 'rows.docx'}"}}
    elif case == "a directory without data":
        (inputs / "notes").mkdir()
        (inputs / "notes" / "README.md").write_text("no rows")
        return {"dataset": {"source": f"file://{inputs / 'notes'}"}}
    elif case == "an evaluation set that is not there":
        return {"dataset": {**dataset, "eval_source": "file:///nowhere.jsonl"}}
    elif case == "a tokenizer that is not there":
        return {"model": {"source": f"file://{inputs / 'model'}", "tokenizer": "file:///nowhere"}}
    return {}


def test_every_bad_input_is_told_at_once(make_spec: Callable[..., JobSpec]) -> None:
    spec = make_spec(model={"source": "file:///nowhere"}, dataset={"source": "file:///nothing.jsonl"})
    with pytest.raises(InvalidRequest) as caught:
        check_inputs(sources(spec))
    assert [violation.path for violation in caught.value.violations] == ["model.source", "dataset.source"]


def test_a_path_with_escapes_is_the_path_it_stands_for(inputs: Path, make_spec: Callable[..., JobSpec]) -> None:
    (inputs / "my rows#1.jsonl").write_text('{"text": "a"}\n')
    check_inputs(sources(make_spec(dataset={"source": f"file://{inputs}/my%20rows#1.jsonl"})))


def test_what_cannot_run_here_is_refused_with_the_reason(backend: LocalBackend, make_run: Plans) -> None:
    run, plan = make_run()
    planned = Planned(spec=run.spec, plan=plan, runs_here=False, why_not_here="It needs 8 × H100-80GB.")
    with pytest.raises(InvalidRequest, match="It needs 8 × H100-80GB") as caught:
        backend.check(planned, namespace="default")
    assert caught.value.violations[0].path == "compute"


def test_functions_of_a_request_run_where_the_machine_allows_it(
    make_backend: Callable[..., LocalBackend], make_run: Plans, make_spec: Callable[..., JobSpec], tmp_path: Path
) -> None:
    _, plan = make_run()
    python = {"file": f"file://{tmp_path}/mine.py"}
    spec = make_spec(method={"ppo": {"rewards": [{"regex": {"pattern": "x"}}, {"python": python}]}})
    planned = Planned(spec=spec, plan=plan, runs_here=True)
    with pytest.raises(InvalidRequest, match="HONE_PYTHON_REWARDS=1 on a machine") as caught:
        make_backend().check(planned, namespace="default")
    assert [violation.path for violation in caught.value.violations] == ["method.ppo.rewards.1.python"]
    allowed = make_backend(python_rewards=True)
    with pytest.raises(InvalidRequest, match=r"mine\.py is no file") as caught:
        allowed.check(planned, namespace="default")
    assert [violation.path for violation in caught.value.violations] == ["method.ppo.rewards.1.python.file"]
    (tmp_path / "mine.py").write_text("def reward(completions): return [0 for _ in completions]")
    allowed = make_backend(python_rewards=True)  # what lies on the disk is remembered for a second
    allowed.check(planned, namespace="default")


def test_a_disk_without_room_is_refused_before_anything_runs(backend: LocalBackend, make_run: Plans) -> None:
    run, plan = make_run()
    with pytest.raises(StorageError, match="GiB free") as caught:
        backend.check(Planned(spec=run.spec, plan=replace(plan, disk_bytes=2**60), runs_here=True), namespace="default")
    assert "HONE_HOME" in caught.value.fix


def test_the_default_python_is_the_one_that_runs_this(runs: Path) -> None:
    assert LocalBackend(runs, hardware=HARDWARE)._python == sys.executable
