"""Pausing and resuming: what a job holds is freed after a checkpoint, and the next attempt is handed what is left."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.unit import test_kubernetes_observe as kubernetes
from tests.unit.test_reconcile import NOW, Cluster, House, adapter, cluster, failed, reported

from hone.backends.base import Observation, Phase
from hone.backends.kubernetes.backend import STOPPED as STOPPED_JOB
from hone.backends.kubernetes.endings import Ending
from hone.checkpoints import MAX_RESUME_POINTS, checkpoints
from hone.errors import WrongState
from hone.job import Event, EventType, FailureClass, Job, State
from hone.run import ResumePoint, TrainerExit
from hone.spec import JobSpec

MakeSpec = Callable[..., JobSpec]
RUNNING = Observation(phase=Phase.RUNNING, start_time=NOW)
STOPPED = failed(FailureClass.PREEMPTED, exit_code=TrainerExit.INTERRUPTED, final=True, start_time=NOW)
"""What both backends tell of an attempt that was asked to end."""
__all__ = ["cluster"]


def place(step: int, attempt: int = 1) -> str:
    return f"attempt-{attempt}/checkpoints/step-{step:06d}"


def saved(seq: int, step: int, *, attempt: int = 1, removes: str = "") -> Event:
    """What a trainer tells of a complete checkpoint."""
    where = place(step, attempt)
    fields = {"place": where, "uri": f"file:///{where}", "size_bytes": "7", "sha256": f"{step:064d}"}
    return reported(seq, EventType.CHECKPOINT, step=step, fields={**fields, "removes": removes})


def point(step: int, attempt: int = 1) -> ResumePoint:
    return ResumePoint(step=step, place=place(step, attempt), sha256=f"{step:064d}")


def running(house: House, backend: Cluster, make_spec: MakeSpec, **changes: Any) -> Job:
    job = house.step(house.jobs.create("default", make_spec(**changes)), times=2)
    backend.seen[1] = RUNNING
    return house.step(job)


def test_a_running_job_is_stopped_and_rests_when_its_trainer_has_ended(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec)
    assert house.jobs.pause("default", job.id).state == State.PAUSING
    assert house.step(job, times=3).state == State.PAUSING
    assert "stop 1" in backend.calls
    backend.events = {1: [saved(1, 10)]}
    backend.seen[1] = STOPPED
    job = house.step(job, times=2)
    assert (job.state, job.end_time, job.failure) == (State.PAUSED, None, None)
    assert job.state_reason == "It is paused, and goes on from step 10 when it is resumed."
    (attempt,) = job.attempts
    assert (attempt.state, attempt.counted, attempt.failure) == (State.CANCELLED, False, STOPPED.failure)
    assert house.states(job) == ["PENDING", "QUEUED", "RUNNING", "PAUSING", "PAUSED"]


def test_a_paused_job_is_left_alone(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    job = paused(house, backend, make_spec)
    backend.calls.clear()
    assert house.reconciler.step(("default", job.id)) is None
    assert backend.calls == [] and house.store.unfinished() == []


def test_a_paused_job_holds_nothing_in_the_backend(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    backend.keeps_ended, backend.tails = False, {0: b"the last line\n"}
    job = paused(house, backend, make_spec)
    assert house.reconciler.step(("default", job.id)) is None
    assert backend.seen == {} and backend.calls[-1] == "remove 1"
    assert b"".join(house.jobs.logs("default", job.id)) == b"the last line\n"


def test_a_resumed_job_goes_on_at_once_with_another_attempt_from_the_newest_checkpoint(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    backend.events = {1: [saved(1, 2), saved(2, 4), saved(3, 6, removes=place(2))]}
    job = paused(house, backend, make_spec, scheduling={"max_attempts": 1})
    assert house.jobs.resume("default", job.id).state == State.PENDING
    job = house.step(job, times=2)
    assert [run.attempt for run in backend.runs] == [1, 2]
    assert backend.runs[0].resume == () and backend.runs[1].resume == (point(6), point(4))
    assert job.state == State.QUEUED and job.attempts[1].nonce != job.attempts[0].nonce


def test_pausing_and_resuming_can_be_repeated(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec)
    assert house.jobs.resume("default", job.id) == job
    pausing = house.jobs.pause("default", job.id)
    assert house.jobs.pause("default", job.id) == pausing
    with pytest.raises(WrongState, match="when it is PAUSED"):
        house.jobs.resume("default", job.id)
    backend.seen[1] = STOPPED
    job = house.step(job)
    assert house.jobs.pause("default", job.id) == job
    resumed = house.jobs.resume("default", job.id)
    assert house.jobs.resume("default", job.id) == resumed


def test_what_no_attempt_was_made_for_is_paused_at_once_and_resumed(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    job = house.jobs.create("default", make_spec())
    assert house.jobs.pause("default", job.id).state == State.PAUSED
    assert house.step(job, times=2).attempts == () and backend.calls == []
    house.jobs.resume("default", job.id)
    assert house.step(job, times=2).state == State.QUEUED


def test_what_waits_for_room_gives_up_its_place(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    job = house.step(house.jobs.create("default", make_spec()), times=2)
    assert house.jobs.pause("default", job.id).state == State.PAUSING
    job = house.step(job)
    assert job.state == State.PAUSED and not job.attempts[0].counted and "stop 1" in backend.calls


def test_what_waits_between_two_attempts_is_paused_at_once(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    backend.seen = {1: failed(FailureClass.INFRA)}
    job = house.step(house.jobs.create("default", make_spec()), times=2)
    assert house.jobs.pause("default", job.id).state == State.PAUSED
    house.now += timedelta(hours=1)
    assert len(house.step(job, times=2).attempts) == 1


def test_a_job_that_had_finished_before_its_pause_has_succeeded(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec)
    house.jobs.pause("default", job.id)
    backend.events = {1: [adapter(house, job, tmp_path, seq=1)]}
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED, start_time=NOW)}
    assert house.step(job, times=2).state == State.SUCCEEDED


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (failed(FailureClass.OOM), State.FAILED),
        (failed(FailureClass.DATA), State.FAILED),
        (failed(FailureClass.INFRA, exit_code=TrainerExit.DISK_FULL), State.FAILED),
        (failed(FailureClass.INFRA, exit_code=TrainerExit.WORKER_DIED, final=True), State.PAUSED),
        (failed(FailureClass.PREEMPTED, disrupted=True), State.PAUSED),
        (Observation(phase=Phase.ABSENT), State.PAUSED),
    ],
    ids=["no memory", "bad data", "a full disk", "killed after the grace", "evicted meanwhile", "vanished"],
)
def test_only_what_going_on_would_not_mend_fails_a_job_that_is_being_paused(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, seen: Observation, state: State
) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec)
    house.jobs.pause("default", job.id)
    backend.seen = {1: seen}
    job = house.step(job)
    assert job.state == state
    assert job.failure == (seen.failure if state == State.FAILED else None)


@pytest.mark.parametrize("code", [TrainerExit.INTERRUPTED, 128 + 15, 128 + 9])
def test_what_kubernetes_tells_of_an_attempt_that_was_asked_to_end_pauses_its_job(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, code: int
) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec)
    house.jobs.pause("default", job.id)
    asked = kubernetes.job(("Failed", "DeadlineExceeded", ""), ending=Ending(failure=STOPPED_JOB, final=True))
    backend.seen[1] = kubernetes.look(asked, kubernetes.pod(phase="Failed", state=kubernetes.ended(code))).seen
    assert backend.seen[1].final
    job = house.step(job)
    assert job.state == State.PAUSED and job.attempts[0].failure and job.attempts[0].failure.exit_code == code


def test_a_deadline_that_was_over_before_the_pause_fails_the_job(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec, scheduling={"deadline": 60})
    house.now += timedelta(seconds=61)
    house.step(job)
    house.jobs.pause("default", job.id)
    backend.seen = {1: STOPPED}
    job = house.step(job)
    assert job.state == State.FAILED and job.failure and "deadline of 60 s" in job.failure.message


def test_an_end_that_was_seen_before_the_pause_was_asked_for_is_no_other_attempt(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec)
    backend.seen = {1: failed(FailureClass.INFRA)}
    pause_at_the_next_look(house, backend, job, monkeypatch)
    job = house.step(job)
    assert job.state == State.PAUSED and job.attempts[0].counted


def test_what_was_seen_before_the_pause_does_not_explain_it(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec)
    backend.events = {1: [reported(1, step=1)]}
    pause_at_the_next_look(house, backend, job, monkeypatch)
    assert house.step(job).state_reason == "A caller paused it; it is being stopped."


@pytest.mark.parametrize("how", ["pausing", "paused"])
def test_a_pause_does_not_stand_in_the_way_of_cancelling_and_deleting(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, how: str
) -> None:
    house, backend = cluster
    job = running(house, backend, make_spec)
    house.jobs.pause("default", job.id)
    if how == "paused":
        backend.seen[1] = STOPPED
        house.step(job)
    with pytest.raises(WrongState, match="Cancel it"):
        house.jobs.delete("default", job.id)
    assert house.jobs.cancel("default", job.id).state == State.CANCELLING
    with pytest.raises(WrongState, match="CANCELLING"):
        house.jobs.pause("default", job.id)
    backend.seen[1] = STOPPED
    job = house.step(job)
    assert job.state == State.CANCELLED and job.attempts[0].state == State.CANCELLED
    house.jobs.delete("default", job.id)
    assert house.reconciler.step(("default", job.id)) is None and backend.seen == {}


@pytest.mark.parametrize("call", ["pause", "resume"])
def test_what_has_ended_is_neither_paused_nor_resumed(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, call: str
) -> None:
    house, backend = cluster
    backend.seen = {1: failed(FailureClass.OOM)}
    job = house.step_until(house.jobs.create("default", make_spec()), State.FAILED)
    with pytest.raises(WrongState, match=r"FAILED.*Submit it again"):
        getattr(house.jobs, call)("default", job.id)


@pytest.mark.parametrize(
    "seen",
    [failed(FailureClass.PREEMPTED, disrupted=True), failed(FailureClass.INFRA), failed(FailureClass.PREEMPTED)],
    ids=["disrupted", "INFRA", "PREEMPTED"],
)
def test_an_attempt_after_one_that_the_machine_failed_goes_on_too(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, seen: Observation
) -> None:
    house, backend = cluster
    backend.seen = {1: seen}
    backend.events = {1: [saved(1, 10)]}
    job = house.step(house.jobs.create("default", make_spec()), times=3)
    house.now += timedelta(seconds=11)
    house.step(job, times=2)
    assert backend.runs[-1].attempt == 2 and backend.runs[-1].resume == (point(10),)


def test_what_an_attempt_is_handed_stays_the_same_whatever_it_tells_later(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    backend.events = {1: [saved(1, 10)]}
    job = paused(house, backend, make_spec)
    house.jobs.resume("default", job.id)
    house.step(job, times=2)
    with house.store.change("default", job.id, now=NOW) as change:
        change.store_events(2, [saved(1, 12, attempt=2, removes=place(10))])
        change.last_seqs[2] = 0  # as if it had been made, and the answer lost
    del backend.seen[2]
    house.step(job)
    assert [run.resume for run in backend.runs[1:]] == [(point(10),), (point(10),)]
    third = paused(house, backend, make_spec, job=job, number=2)
    house.jobs.resume("default", third.id)
    house.step(third, times=2)
    assert backend.runs[-1].resume == (point(12, 2),)


def test_no_more_is_handed_on_than_a_run_file_takes(cluster: tuple[House, Cluster], make_spec: MakeSpec) -> None:
    house, backend = cluster
    steps = range(1, MAX_RESUME_POINTS + 5)
    backend.events = {1: [saved(step, step) for step in steps]}
    job = paused(house, backend, make_spec)
    house.jobs.resume("default", job.id)
    house.step(job, times=2)
    assert [given.step for given in backend.runs[-1].resume] == list(steps)[: -MAX_RESUME_POINTS - 1 : -1]


def test_a_job_tells_its_checkpoints_with_those_that_were_removed(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, backend = cluster
    backend.events = {1: [saved(1, 2), saved(2, 4, removes=place(2))]}
    job = paused(house, backend, make_spec)
    first, second = house.jobs.checkpoints("default", job.id)
    assert (first.step, first.complete, second.step, second.complete) == (2, False, 4, True)
    assert (second.place, second.uri, second.size_bytes) == (place(4), f"file:///{place(4)}", 7)
    assert (second.sha256, second.attempt, second.time) == (f"{4:064d}", 1, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": None},
        {"fields": {}},
        {"fields": {**saved(1, 1).fields, "size_bytes": "large"}},
        {"fields": {**saved(1, 1).fields, "place": "../other/adapter"}},
    ],
    ids=["no step", "no fields", "no size", "another job's place"],
)
def test_an_event_that_tells_of_no_checkpoint_of_the_job_is_passed_over(changes: dict[str, Any]) -> None:
    assert [found.step for found in checkpoints([replace(saved(1, 1), **changes), saved(2, 2)])] == [2]


def pause_at_the_next_look(house: House, backend: Cluster, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller is quicker than the step that is under way."""
    look = backend.observe

    def observe(*arguments: Any, **options: Any) -> Observation:
        house.jobs.pause("default", job.id)
        return look(*arguments, **options)

    monkeypatch.setattr(backend, "observe", observe)


def paused(
    house: House, backend: Cluster, make_spec: MakeSpec, *, job: Job | None = None, number: int = 1, **changes: Any
) -> Job:
    """A job whose attempt was told to end, and has."""
    job = job or running(house, backend, make_spec, **changes)
    house.jobs.pause("default", job.id)
    backend.seen[number] = STOPPED
    return house.step_until(job, State.PAUSED)
