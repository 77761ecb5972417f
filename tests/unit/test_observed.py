"""What people started past the service, and what a backend does not keep: shown, kept with the job, and let go."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from tests.unit.test_reconcile import HARDWARE, NOW, Cluster, House, adapter, failed, record, reported

from hone.backends.base import ForeignJob, Observation, Phase
from hone.errors import WrongState
from hone.job import FailureClass, State
from hone.machine import plan_here
from hone.observed import Observer
from hone.run import Run
from hone.spec import JobSpec

MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[tuple[House, Cluster, Observer]]:
    backend = Cluster()
    house = House(tmp_path, backend)
    planner = lambda spec: plan_here(spec, HARDWARE)  # noqa: E731
    yield house, backend, Observer(house.store, backend, house.artifacts, planner=planner, clock=house.clock)
    house.store.close()


def applied(
    spec: JobSpec,
    seen: Observation,
    *,
    uid: str = "5f2c8a4e-0000-4000-8000-000000000001",
    store: str = "s3://models",
) -> ForeignJob:
    planned = plan_here(spec, HARDWARE)
    run = Run(
        namespace="default", job="by-hand", attempt=1, nonce="", spec=planned.spec, launch=planned.plan.launch,
        store=store, inputs={},
    )  # fmt: skip
    return ForeignJob(
        namespace="default", uid=uid, name="by-hand", create_time=NOW, run=run, problem="", seen=seen
    )  # fmt: skip


def test_what_people_applied_is_shown_with_its_states_and_touched_by_nobody(
    house: tuple[House, Cluster, Observer], make_spec: MakeSpec
) -> None:
    home, backend, observer = house
    spec = make_spec()
    backend.people = [applied(spec, Observation(phase=Phase.WAITING, reason="0/2 nodes are available."))]
    observer.look()
    job = home.jobs.get("default", "by-hand")
    assert (job.state, job.state_reason) == (State.QUEUED, "0/2 nodes are available.")
    assert job.observed and job.creator == ""
    with pytest.raises(WrongState, match="kubectl delete job by-hand"):
        home.jobs.cancel("default", "by-hand")
    backend.people = [applied(spec, Observation(phase=Phase.RUNNING, start_time=NOW))]
    observer.look()
    assert b"log of 5f2c8a4e" in b"".join(home.jobs.logs("default", "by-hand"))
    ended = NOW + timedelta(seconds=9)
    backend.people = [applied(spec, Observation(phase=Phase.SUCCEEDED, start_time=NOW, end_time=ended))]
    observer.look()
    observer.look()
    job = home.jobs.get("default", "by-hand")
    assert (job.state, job.attempts[0].end_time) == (State.SUCCEEDED, ended)
    assert b"log of 5f2c8a4e" in b"".join(home.jobs.logs("default", "by-hand"))
    assert home.states(job) == ["PENDING", "QUEUED", "RUNNING", "SUCCEEDED"]
    assert home.store.unfinished() == [] and backend.calls == []


@pytest.mark.parametrize("is_same", [True, False])
def test_outputs_of_theirs_are_shown_wherever_they_lie_and_only_those_of_this_request(
    house: tuple[House, Cluster, Observer],
    make_spec: MakeSpec,
    tmp_path: Path,
    is_same: bool,
) -> None:
    home, backend, observer = house
    here = home.artifacts.uri
    backend.people = [applied(make_spec(), Observation(phase=Phase.RUNNING, start_time=NOW), store=here)]
    observer.look()
    job = home.jobs.get("default", "by-hand")
    told = adapter(home, job, tmp_path, seq=1, place="attempt-1/claim-3/adapter")
    record(home, job, told, spec=None if is_same else make_spec())
    backend.people = [applied(make_spec(), Observation(phase=Phase.SUCCEEDED, start_time=NOW), store=here)]
    observer.look()
    job = home.jobs.get("default", "by-hand")
    assert job.state == State.SUCCEEDED
    assert [output.uri for output in job.outputs] == [told.fields["uri"]] * is_same


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"spec_hash": "x", "outputs": 3}'])
def test_a_record_that_is_none_keeps_no_other_job_from_being_shown(
    house: tuple[House, Cluster, Observer], make_spec: MakeSpec, text: str
) -> None:
    home, backend, observer = house
    other = "5f2c8a4e-0000-4000-8000-000000000002"
    ended = Observation(phase=Phase.SUCCEEDED, start_time=NOW)
    backend.people = [
        applied(make_spec(), ended, store=home.artifacts.uri),
        replace(applied(make_spec(), Observation(phase=Phase.RUNNING), uid=other), name="second"),
    ]
    home.artifacts.put_bytes("default/by-hand/result.json", text.encode())
    observer.look()
    assert (home.jobs.get("default", "by-hand").state, home.jobs.get("default", "by-hand").outputs) == ("SUCCEEDED", ())
    assert home.jobs.get("default", "second").state == State.RUNNING


def test_the_reconciler_leaves_what_people_applied_alone_in_every_state(
    house: tuple[House, Cluster, Observer], make_spec: MakeSpec
) -> None:
    home, backend, observer = house
    for seen in (
        Observation(phase=Phase.WAITING),
        Observation(phase=Phase.RUNNING, start_time=NOW),
        failed(FailureClass.OOM),
    ):
        backend.people = [applied(make_spec(), seen)]
        observer.look()
        assert home.reconciler.step(("default", "by-hand")) is None
    home.jobs.delete("default", "by-hand")
    assert home.reconciler.step(("default", "by-hand")) is None
    assert home.store.find("default", "by-hand") is None and backend.calls == []


def test_a_failure_of_theirs_is_told_once_and_a_deleted_one_ends(
    house: tuple[House, Cluster, Observer], make_spec: MakeSpec
) -> None:
    home, backend, observer = house
    other = "5f2c8a4e-0000-4000-8000-000000000002"
    backend.people = [
        applied(make_spec(), failed(FailureClass.OOM)),
        replace(applied(make_spec(), Observation(phase=Phase.RUNNING), uid=other), name="second"),
    ]
    observer.look()
    backend.people = []
    observer.look()
    job = home.jobs.get("default", "by-hand")
    assert job.failure and job.failure.failure_class == FailureClass.OOM
    gone = home.jobs.get("default", "second")
    assert gone.failure and "deleted before it had ended" in gone.failure.message
    assert [event.attempt for event in home.jobs.events("default", job_id=job.id) if event.type == "failure"] == [1]


def test_an_id_that_is_taken_stays_its_owner_s(house: tuple[House, Cluster, Observer], make_spec: MakeSpec) -> None:
    home, backend, observer = house
    mine = home.jobs.create("default", make_spec(), job_id="by-hand")
    backend.people = [applied(make_spec(), Observation(phase=Phase.RUNNING))]
    observer.look()
    assert home.jobs.get("default", "by-hand").uid == mine.uid
    assert home.jobs.get("default", "by-hand-5f2c8").observed


def test_what_cannot_be_read_is_left_out_and_the_others_are_shown(
    house: tuple[House, Cluster, Observer], make_spec: MakeSpec, caplog: pytest.LogCaptureFixture
) -> None:
    home, backend, observer = house
    broken = replace(applied(make_spec(), Observation(phase=Phase.RUNNING), uid="x"), run=None, problem="Not YAML.")
    backend.people = [broken, applied(make_spec(), Observation(phase=Phase.RUNNING))]
    observer.look()
    observer.look()
    assert [job.id for job in home.jobs.list("default").jobs] == ["by-hand"]
    assert caplog.text.count("Not YAML.") == 1


def test_logs_are_kept_with_the_job_before_its_attempt_is_let_go(
    house: tuple[House, Cluster, Observer], make_spec: MakeSpec
) -> None:
    home, backend, _ = house
    backend.keeps_ended = False
    job = home.step(home.jobs.create("default", make_spec()), times=2)
    backend.tails = {0: b"one\ntwo\nthree\n"}
    backend.seen = {1: replace(failed(FailureClass.USER), start_time=NOW)}
    job = home.step(job)
    assert job.state == State.FAILED and "remove 1" not in backend.calls
    home.step(job)
    assert "remove 1" in backend.calls
    assert b"".join(home.jobs.logs("default", job.id, tail=2)) == b"two\nthree\n"
    assert b"".join(home.jobs.logs("default", job.id, offset=4)) == b"two\nthree\n"


def test_what_goes_with_an_attempt_that_is_asked_to_end_is_kept_before(
    house: tuple[House, Cluster, Observer], make_spec: MakeSpec
) -> None:
    home, backend, _ = house
    backend.keeps_ended = False
    job = home.step(home.jobs.create("default", make_spec()), times=2)
    backend.seen[1] = Observation(phase=Phase.RUNNING, start_time=NOW)
    job = home.step(job)
    backend.unread, backend.tails = {1: [reported(1), reported(2)]}, {0: b"one\ntwo\n"}
    home.jobs.cancel("default", job.id)
    home.step(job)
    backend.tails, backend.seen[1] = {}, replace(failed(FailureClass.PREEMPTED), final=True, start_time=NOW)
    job = home.step(job)
    assert job.state == State.CANCELLED
    told = home.store.events("default", job=job, attempt=1, types=("progress",))
    assert [event.message for event in told] == ["line 1", "line 2"]
    assert b"".join(home.jobs.logs("default", job.id)) == b"one\ntwo\n"
