"""The reconciler: from a recorded job to its end, step by step, with real trainers and real stores.

What this machine cannot show (a machine that is taken away, an outage) is shown by `Cluster`, a second backend that
keeps attempts in memory and does what the test says.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hone import gpus
from hone.backends.base import Backend, ForeignJob, Observation, Owner, Phase
from hone.backends.local import LocalBackend
from hone.errors import NotFound, StorageUnavailable, Unavailable, WrongState
from hone.job import Event, EventType, Failure, FailureClass, Job, Plan, State
from hone.jobs import Jobs
from hone.machine import plan_here
from hone.plan import Hardware, Planned
from hone.reconcile import Reconciler
from hone.run import Run, TrainerExit, spec_hash
from hone.spec import JobSpec
from hone.storage import ArtifactStore, JobLayout, open_store, upload_directory
from hone.store import Store

HARDWARE = Hardware(profiles=gpus.load_profiles(), cpu_cores=2, memory_bytes=64 * 1024**3)
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
MakeSpec = Callable[..., JobSpec]


@dataclass
class Cluster:
    """A backend whose attempts go as the test says; `seen` is what is there, by attempt."""

    name: str = "cluster"
    max_waiting: int | None = None
    poll_s: float = 0.5
    keeps_ended: bool = True
    tails: dict[int, bytes] = field(default_factory=dict)
    people: list[ForeignJob] = field(default_factory=list)
    seen: dict[int, Observation] = field(default_factory=dict)
    events: dict[int, list[Event]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    is_down: bool = False
    unread: dict[int, list[Event]] = field(default_factory=dict)
    """Events of an attempt that go with it when it is asked to end, and its tails with them."""

    def close(self) -> None:
        """Nothing is held."""

    def subscribe(self, callback: Callable[[str, str], None]) -> Callable[[], None]:
        return lambda: None

    def manifest(self, planned: Planned, *, namespace: str) -> str:
        return ""

    def check(self, planned: Planned, *, namespace: str) -> None:
        """Everything runs here."""

    def ensure(self, run: Run, plan: Plan) -> Observation:
        self._called(f"ensure {run.attempt}")
        self.runs.append(run)
        return self.seen.setdefault(run.attempt, Observation(phase=Phase.WAITING, reason="No node is free."))

    def observe(self, run: Run, *, after_seq: int) -> Observation:
        self._called(f"observe {run.attempt}")
        events = tuple(event for event in self.events.get(run.attempt, []) if event.seq > after_seq)[:2]
        return replace(self.seen.get(run.attempt, Observation(phase=Phase.ABSENT)), events=events)

    def stop(self, run: Run, *, grace_s: float) -> Observation:
        self._called(f"stop {run.attempt}")
        return self.observe(run, after_seq=0)

    def remove(self, run: Run) -> None:
        self._called(f"remove {run.attempt}")
        if self.seen.get(run.attempt, Observation(phase=Phase.ABSENT)).phase == Phase.RUNNING and not self.keeps_ended:
            raise WrongState("It runs.")
        self.seen.pop(run.attempt, None)

    def logs(self, run: Run, *, rank: int, tail: int | None = None, offset: int = 0) -> Iterator[bytes]:
        return iter(())

    def rescue(self, run: Run, *, after_seq: int) -> tuple[Sequence[Event], Mapping[int, bytes]]:
        if f"stop {run.attempt}" in self.calls or run.attempt not in self.unread:
            return (), {}
        return [event for event in self.unread[run.attempt] if event.seq > after_seq], self.tails

    def tail_logs(self, run: Run) -> Mapping[int, bytes]:
        return self.tails

    def present(self) -> Sequence[Owner]:
        return ()

    def foreign(self) -> Sequence[ForeignJob]:
        return self.people

    def foreign_logs(self, uid: str, *, rank: int, tail: int | None = None, offset: int = 0) -> Iterator[bytes]:
        return iter((f"log of {uid}".encode(),))

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if self.is_down:
            raise Unavailable("The cluster does not answer.")


class House:
    """Store, artefacts, use cases and a reconciler around one backend, and a clock that the test moves."""

    def __init__(self, tmp_path: Path, backend: Backend) -> None:
        self.now = NOW
        self.store = Store(f"sqlite:///{tmp_path / 'hone.db'}")
        self.artifacts: ArtifactStore = open_store((tmp_path / "artifacts").as_uri())
        self.backend = backend
        self.jobs = Jobs(
            self.store, backend, self.artifacts, planner=lambda spec: plan_here(spec, HARDWARE), clock=self.clock
        )
        self.reconciler = self.new_reconciler()

    def clock(self) -> datetime:
        return self.now

    def new_reconciler(self, **changes: Any) -> Reconciler:
        return Reconciler(self.store, self.backend, self.artifacts, clock=self.clock, **changes)

    def step(self, job: Job, times: int = 1) -> Job:
        for _ in range(times):
            self.reconciler.step((job.namespace, job.id))
        return self.jobs.get(job.namespace, job.id)

    def step_until(self, job: Job, *states: State, timeout_s: float = 30) -> Job:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            pause = self.reconciler.step((job.namespace, job.id))
            found = self.jobs.get(job.namespace, job.id)
            if found.state in states:
                return found
            time.sleep(min(pause or 0.0, 0.05))
        raise AssertionError(f"still {found.state}: {found.state_reason}")

    def states(self, job: Job) -> list[str]:
        events = self.jobs.events(job.namespace, job_id=job.id)
        return [event.fields["state"] for event in events if event.type == EventType.STATE]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[House, Cluster]]:
    backend = Cluster()
    house = House(tmp_path, backend)
    yield house, backend
    house.store.close()


@pytest.fixture
def house(tmp_path: Path, quick_python: Path) -> Iterator[House]:
    backend = LocalBackend(tmp_path / "runs", hardware=HARDWARE, trainer_python=str(quick_python))
    house = House(tmp_path, backend)
    yield house
    for child in backend._children.values():
        child.kill()
        child.wait()
    backend.close()
    house.store.close()


def failed(failure_class: FailureClass, *, exit_code: int | None = None, **changes: Any) -> Observation:
    failure = Failure(failure_class=failure_class, message=f"It failed: {failure_class}.", exit_code=exit_code)
    return Observation(phase=Phase.FAILED, failure=failure, **changes)


def reported(seq: int, kind: EventType = EventType.PROGRESS, **changes: Any) -> Event:
    return Event(seq=seq, time=NOW, type=kind, message=f"line {seq}", **changes)


def adapter(house: House, job: Job, tmp_path: Path, *, seq: int, place: str = "adapter") -> Event:
    """Leave an adapter in the store, and tell of it as a trainer does."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    prefix = JobLayout(job.namespace, job.id).output(place)
    manifest = upload_directory(house.artifacts, tmp_path / "adapter", prefix)
    uri = house.artifacts.url(prefix)
    described = {"uri": uri, "size_bytes": str(manifest.size_bytes), "sha256": manifest.digest}
    return reported(seq, EventType.OUTPUT, fields={"kind": "adapter", "place": place, **described})


def record(house: House, job: Job, told: Event, *, attempt: int = 1, spec: JobSpec | None = None) -> None:
    """Write result.json, as a trainer does after everything else."""
    described = {name: told.fields[name] for name in ("uri", "place", "sha256")}
    outputs = {told.fields["kind"]: {**described, "size_bytes": int(told.fields["size_bytes"])}}
    result = {"attempt": attempt, "spec_hash": spec_hash(spec or job.resolved_spec), "outputs": outputs}
    house.artifacts.put_bytes(JobLayout(job.namespace, job.id).result, json.dumps(result).encode())


def test_a_job_runs_to_its_end_and_its_outputs_are_read_back(house: House, make_spec: MakeSpec) -> None:
    job = house.step_until(house.jobs.create("default", make_spec()), State.SUCCEEDED)
    assert house.states(job) == ["PENDING", "RUNNING", "SUCCEEDED"]
    (output,) = job.outputs
    assert output.kind == "adapter" and output.attempt == 1
    (attempt,) = job.attempts
    assert attempt.state == State.SUCCEEDED and attempt.start_time and attempt.end_time and attempt.nonce
    assert job.progress and (job.progress.step, job.progress.max_steps) == (3, 3)
    steps = [event.step for event in house.jobs.events("default") if event.type == EventType.PROGRESS]
    assert steps == [1, 2, 3]
    version = job.version
    assert house.step(job).version == version


def test_a_trainer_that_fails_fails_the_job_with_its_own_words(house: House, make_spec: MakeSpec) -> None:
    job = house.step_until(house.jobs.create("default", make_spec(labels={"ending": "crash"})), State.FAILED)
    assert job.failure and "it was asked to fail" in job.failure.message
    assert job.failure == job.attempts[0].failure and job.outputs == ()
    failures = [event for event in house.jobs.events("default") if event.type == EventType.FAILURE]
    assert len(failures) == 1


def test_a_running_job_is_cancelled_in_the_end(house: House, make_spec: MakeSpec) -> None:
    job = house.jobs.create("default", make_spec(labels={"steps": "1000", "pause_ms": "20"}))
    house.step_until(job, State.RUNNING)
    house.jobs.cancel("default", job.id)
    job = house.step_until(job, State.CANCELLED)
    assert house.states(job) == ["PENDING", "RUNNING", "CANCELLING", "CANCELLED"]
    assert job.attempts[0].state == State.CANCELLED and job.end_time


def test_a_job_that_never_ran_is_cancelled_at_once(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    house.jobs.cancel("default", job.id)
    assert house.step(job).state == State.CANCELLED
    assert backend.calls == []


def test_the_deadline_ends_an_attempt(house: House, make_spec: MakeSpec) -> None:
    spec = make_spec(labels={"steps": "1000", "pause_ms": "20"}, scheduling={"deadline": 60})
    job = house.jobs.create("default", spec)
    house.now = datetime.now(UTC)
    house.step_until(job, State.RUNNING)
    while not (start := house.step(job).attempts[0].start_time):
        time.sleep(0.05)
    house.now = start + timedelta(seconds=61)
    job = house.step_until(job, State.FAILED)
    assert job.failure and job.failure.failure_class == FailureClass.USER
    assert "deadline of 60 s" in job.failure.message


def test_the_deadline_is_met_however_much_the_trainer_has_to_tell(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec(scheduling={"deadline": 60}))
    backend.seen = {1: Observation(phase=Phase.RUNNING, start_time=NOW)}
    backend.events = {1: [reported(seq, step=seq) for seq in range(1, 100)]}
    house.step(job, times=3)
    assert "stop 1" not in backend.calls
    house.now += timedelta(seconds=60)
    house.step(job)
    assert "stop 1" in backend.calls


def test_deletion_takes_the_run_and_leaves_the_outputs(house: House, make_spec: MakeSpec, tmp_path: Path) -> None:
    job = house.step_until(house.jobs.create("default", make_spec()), State.SUCCEEDED)
    house.jobs.delete("default", job.id)
    assert house.reconciler.step(("default", job.id)) is None
    with pytest.raises(NotFound):
        house.jobs.get("default", job.id)
    assert not (tmp_path / "runs" / "default" / job.id).exists()
    assert (tmp_path / "artifacts" / "default" / job.id / "adapter" / "MANIFEST.json").exists()


def test_deletion_takes_the_outputs_too_where_asked(house: House, make_spec: MakeSpec, tmp_path: Path) -> None:
    job = house.step_until(house.jobs.create("default", make_spec()), State.SUCCEEDED)
    house.jobs.delete("default", job.id, artifacts=True)
    house.reconciler.step(("default", job.id))
    assert not (tmp_path / "artifacts" / "default" / job.id).exists()


def test_what_waits_says_what_it_waits_for(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    job = house.step(house.jobs.create("default", make_spec()), times=2)
    assert (job.state, job.state_reason) == (State.QUEUED, "No node is free.")
    backend.seen[1] = Observation(phase=Phase.WAITING, reason="The image cannot be pulled.")
    assert house.step(job).state_reason == "The image cannot be pulled."
    assert house.states(job) == ["PENDING", "QUEUED", "QUEUED"]
    house.step(job, times=3)
    assert house.states(job) == ["PENDING", "QUEUED", "QUEUED"]


def test_what_runs_and_cannot_go_on_says_what_a_person_has_to_do(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    job = house.step(house.jobs.create("default", make_spec()), times=2)
    well = Observation(phase=Phase.RUNNING, start_time=NOW)
    backend.seen[1] = well
    assert house.step(job).state_reason == "Attempt 1 runs."
    backend.seen[1] = replace(well, reason="Node a does not answer.")
    assert house.step(job, times=2).state_reason == "Node a does not answer."
    backend.seen[1] = well
    assert house.step(job).state_reason == "Attempt 1 runs."
    assert house.states(job) == ["PENDING", "QUEUED", "RUNNING", "RUNNING", "RUNNING"]
    house.jobs.cancel("default", job.id)
    backend.seen[1] = replace(well, reason="Node a does not confirm its end.")
    assert house.step(job, times=2).state_reason == "Node a does not confirm its end."


def test_the_nonce_is_stored_before_anything_is_started(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    job = house.step(house.jobs.create("default", make_spec()))
    assert len(job.attempts[0].nonce) == 32 and backend.calls == []
    house.step(job)
    assert backend.calls == ["observe 1", "ensure 1"]


def test_an_attempt_that_the_machine_failed_is_followed_by_another_as_often_as_allowed(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec(scheduling={"max_attempts": 2}))
    backend.seen = {1: failed(FailureClass.INFRA), 2: failed(FailureClass.INFRA)}
    job = house.step(job, times=2)
    assert job.state == State.PENDING and "another follows" in job.state_reason
    assert len(house.step(job, times=3).attempts) == 1  # not at once
    house.now += timedelta(seconds=11)
    job = house.step(job, times=2)
    assert [attempt.state for attempt in job.attempts] == [State.FAILED, State.FAILED]
    assert job.state == State.FAILED and job.failure and job.failure.failure_class == FailureClass.INFRA


def test_a_disruption_does_not_count(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec(scheduling={"max_attempts": 1}))
    backend.seen = {1: failed(FailureClass.PREEMPTED, disrupted=True), 2: failed(FailureClass.PREEMPTED)}
    job = house.step(job, times=2)
    assert job.state == State.PENDING and not job.attempts[0].counted
    house.now += timedelta(seconds=11)
    assert house.step(job, times=2).state == State.FAILED


@pytest.mark.parametrize(
    "seen",
    [
        failed(FailureClass.USER),
        failed(FailureClass.OOM),
        failed(FailureClass.INFRA, final=True),
        failed(FailureClass.INFRA, exit_code=TrainerExit.DISK_FULL),
        failed(FailureClass.INFRA, exit_code=TrainerExit.STORAGE_REFUSED),
    ],
    ids=["the request's fault", "no memory", "ended on purpose", "a full disk", "a store that refuses"],
)
def test_what_another_attempt_cannot_mend_is_not_repeated(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, seen: Observation
) -> None:
    house, backend = cluster
    backend.seen = {1: seen}
    job = house.step(house.jobs.create("default", make_spec()), times=2)
    assert job.state == State.FAILED and len(job.attempts) == 1
    told = [event for event in house.jobs.events("default") if event.type == EventType.FAILURE]
    assert [event.message for event in told] == [seen.failure.message if seen.failure else ""]


def test_an_attempt_that_vanished_is_not_started_again_under_its_number(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    backend.seen = {1: Observation(phase=Phase.RUNNING, start_time=NOW)}
    job = house.step(house.jobs.create("default", make_spec()), times=2)
    assert job.state == State.RUNNING
    del backend.seen[1]
    job = house.step(job)
    assert job.state == State.PENDING and job.attempts[0].failure
    assert "ensure 1" not in backend.calls


def test_an_end_counts_only_after_every_event_was_stored(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    told = [reported(seq, step=seq) for seq in range(1, 5)]
    backend.events = {1: [*told, adapter(house, job, tmp_path, seq=5)]}
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED, start_time=NOW, end_time=NOW)}
    job = house.step(job, times=2)
    assert job.state != State.SUCCEEDED  # two events a look
    job = house.step(job, times=3)
    assert job.state == State.SUCCEEDED
    assert [event.step for event in house.jobs.events("default") if event.type == EventType.PROGRESS] == [1, 2, 3, 4]


def test_what_comes_about_after_the_end_was_recorded_is_stopped_and_removed(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    backend.keeps_ended = False
    job = house.step(house.jobs.create("default", make_spec()))
    house.jobs.cancel("default", job.id)
    job = house.step_until(job, State.CANCELLED)
    backend.seen[1] = Observation(phase=Phase.RUNNING)  # the answer to its creation was lost
    backend.calls.clear()
    assert house.reconciler.step(("default", job.id)) == 1.0
    assert backend.calls == ["remove 1", "stop 1", "observe 1"]
    backend.seen[1] = failed(FailureClass.PREEMPTED)
    assert house.reconciler.step(("default", job.id)) is None
    assert 1 not in backend.seen and house.jobs.get("default", job.id).state == State.CANCELLED


def test_outputs_of_a_later_writer_are_read_back_where_they_lie(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    backend.events = {1: [adapter(house, job, tmp_path, seq=1, place="attempt-1/claim-2/adapter")]}
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED)}
    job = house.step_until(job, State.SUCCEEDED)
    assert job.outputs[0].uri.endswith("/attempt-1/claim-2/adapter")


def test_an_output_that_nobody_heard_of_is_found_by_the_record_of_its_attempt(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    lost = adapter(house, job, tmp_path, seq=1, place="attempt-1/claim-2/adapter")
    record(house, job, lost)
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED)}
    job = house.step_until(job, State.SUCCEEDED)
    (output,) = job.outputs
    assert (output.kind, output.uri, output.sha256) == ("adapter", lost.fields["uri"], lost.fields["sha256"])


def test_the_record_of_another_attempt_proves_nothing(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    record(house, job, adapter(house, job, tmp_path, seq=1), attempt=2)
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED)}
    job = house.step_until(job, State.FAILED)
    assert job.failure and "without its output 'adapter'" in job.failure.message


@pytest.mark.parametrize(
    ("damage", "message"),
    [("gone", "There is nothing"), ("altered", "sha256"), ("untold", "'adapter'"), ("elsewhere", "storage key")],
)
def test_nothing_is_called_complete_that_cannot_be_read_back(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path, damage: str, message: str
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    event = adapter(house, job, tmp_path, seq=1)
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED)}
    if damage == "gone":
        house.artifacts.delete(JobLayout("default", job.id).adapter)
    elif damage == "altered":
        event = replace(event, fields={**event.fields, "sha256": "0" * 64})
    elif damage == "elsewhere":
        event = replace(event, fields={**event.fields, "place": "../other/adapter"})
    if damage != "untold":
        backend.events = {1: [event]}
    job = house.step_until(job, State.FAILED)
    assert job.failure and message.lower() in job.failure.message.lower() and job.outputs == ()


class Unreachable:
    """The artefact store of a house, while nobody answers at its address."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        if name in ("uri", "url"):
            return getattr(self._store, name)
        raise StorageUnavailable("The store did not answer.")


def test_an_end_waits_for_a_store_that_does_not_answer(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    backend.events = {1: [adapter(house, job, tmp_path, seq=1)]}
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED, start_time=NOW)}
    reachable = house.artifacts
    house.artifacts = Unreachable(reachable)
    house.reconciler = house.new_reconciler()
    house.step(job, times=2)
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            house.step(job)
    told = [event for event in house.jobs.events("default") if "cannot be read back yet" in event.message]
    assert len(told) == 1
    house.artifacts = reachable
    house.reconciler = house.new_reconciler()
    assert house.step(job).state == State.SUCCEEDED


def test_a_job_that_had_finished_before_its_cancellation_has_succeeded(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    backend.seen = {1: Observation(phase=Phase.RUNNING, start_time=NOW)}
    house.step(job, times=2)
    backend.events = {1: [adapter(house, job, tmp_path, seq=1)]}
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED, start_time=NOW)}
    house.jobs.cancel("default", job.id)
    assert house.step(job, times=2).state == State.SUCCEEDED


def test_an_outage_of_the_backend_delays_and_loses_nothing(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    job = house.step(house.jobs.create("default", make_spec()))
    backend.is_down = True
    with pytest.raises(Unavailable):
        house.step(job)
    assert house.jobs.get("default", job.id).state == State.PENDING
    backend.is_down = False
    assert house.step(job).state == State.QUEUED


def wait_for(question: Callable[[], bool], *, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def running(house: House) -> Iterator[House]:
    house.clock = lambda: datetime.now(UTC)  # type: ignore[method-assign]
    house.reconciler = house.new_reconciler()
    house.reconciler.start()
    yield house
    house.reconciler.stop()


def test_the_thread_sees_to_every_job_by_itself(running: House, make_spec: MakeSpec) -> None:
    jobs = [running.jobs.create("default", make_spec()) for _ in range(4)]
    wait_for(lambda: all(running.jobs.get("default", job.id).state.is_terminal for job in jobs))
    assert {running.jobs.get("default", job.id).state for job in jobs} == {State.SUCCEEDED}
    seqs = [event.seq for event in running.jobs.events("default")]
    assert seqs == list(range(1, len(seqs) + 1))
    running.jobs.delete("default", jobs[0].id)
    wait_for(lambda: len(running.jobs.list("default").jobs) == 3)


def test_a_cancellation_is_seen_at_once_though_the_next_look_is_far(running: House, make_spec: MakeSpec) -> None:
    full = [running.jobs.create("default", make_spec(labels={"steps": "500", "pause_ms": "20"})) for _ in range(2)]
    wait_for(lambda: all(running.jobs.get("default", job.id).state == State.RUNNING for job in full))
    waiting = running.jobs.create("default", make_spec())
    wait_for(lambda: running.jobs.get("default", waiting.id).state == State.QUEUED)
    begun = time.monotonic()
    running.jobs.cancel("default", waiting.id)
    wait_for(lambda: running.jobs.get("default", waiting.id).state == State.CANCELLED)
    assert time.monotonic() - begun < 2
    for job in full:
        running.jobs.cancel("default", job.id)
    wait_for(lambda: all(running.jobs.get("default", job.id).state == State.CANCELLED for job in full))


def test_jobs_behind_a_long_queue_stay_unasked_and_can_be_cancelled(tmp_path: Path, make_spec: MakeSpec) -> None:
    backend = Cluster(max_waiting=2)
    house = House(tmp_path, backend)
    house.reconciler.start()
    spec = make_spec()
    jobs = [house.jobs.create("default", spec, job_id=f"demo-{number}") for number in range(2)]
    wait_for(lambda: all(house.jobs.get("default", job.id).state == State.QUEUED for job in jobs))
    behind = [house.jobs.create("default", spec, job_id=f"late-{number}") for number in range(3)]
    time.sleep(0.3)
    assert {house.jobs.get("default", job.id).state for job in behind} == {State.PENDING}
    house.jobs.cancel("default", behind[2].id)
    wait_for(lambda: house.jobs.get("default", behind[2].id).state == State.CANCELLED)
    for job in (*jobs, *behind[:2]):  # who goes makes the way free for the next
        house.jobs.cancel("default", job.id)
        backend.seen = dict.fromkeys(backend.seen, failed(FailureClass.PREEMPTED))
    wait_for(lambda: all(job.state == State.CANCELLED for job in house.jobs.list("default").jobs))
    house.reconciler.stop()
    house.store.close()


def test_the_thread_does_nothing_while_there_is_nothing_to_do(running: House) -> None:
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_the_thread_slows_down_while_the_backend_is_away(tmp_path: Path, make_spec: MakeSpec) -> None:
    backend = Cluster(is_down=True)
    house = House(tmp_path, backend)
    house.reconciler.start()
    house.jobs.create("default", make_spec())
    wait_for(lambda: len(backend.calls) >= 2)
    time.sleep(0.5)
    assert len(backend.calls) <= 3
    house.reconciler.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hone-reconcile")]
    house.store.close()
