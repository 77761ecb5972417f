"""The use cases, on a real store, a real artefact directory and the local backend; nothing is started here."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hone import gpus
from hone.backends.local import LocalBackend
from hone.errors import (
    AlreadyExists,
    HoneError,
    InvalidRequest,
    NotFound,
    NotServed,
    Refused,
    RequestIdReused,
    StorageError,
    WrongState,
)
from hone.job import Attempt, Event, EventType, State
from hone.jobs import Jobs
from hone.machine import plan_here
from hone.paging import MAX_PAGE_SIZE
from hone.plan import Hardware
from hone.spec import JobSpec
from hone.storage import open_store
from hone.store import Store

HARDWARE = Hardware(profiles=gpus.load_profiles(), cpu_cores=4, memory_bytes=32 * 1024**3)
START = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
MakeSpec = Callable[..., JobSpec]


class Clock:
    """A clock that goes on by a second each time it is asked."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 'hone.db'}")
    yield opened
    opened.close()


@pytest.fixture
def make_jobs(store: Store, tmp_path: Path) -> Callable[..., Jobs]:
    def make(*, artifacts: Path | None = None, **changes: Any) -> Jobs:
        backend = LocalBackend(tmp_path / "runs", hardware=HARDWARE)
        place = open_store((artifacts or tmp_path / "artifacts").as_uri())
        return Jobs(store, backend, place, planner=lambda spec: plan_here(spec, HARDWARE), clock=Clock(), **changes)

    return make


@pytest.fixture
def jobs(make_jobs: Callable[..., Jobs]) -> Jobs:
    return make_jobs()


def end(store: Store, job_id: str, state: State = State.FAILED) -> None:
    with store.change("default", job_id, now=START) as change:
        change.to_state(state, "over")


def begin(store: Store, job_id: str, number: int = 1) -> None:
    with store.change("default", job_id, now=START) as change:
        change.add_attempt(Attempt(number=number, nonce="secret", state=State.RUNNING, create_time=START))


def step(seq: int, **metrics: float) -> Event:
    return Event(seq=seq, time=START, type=EventType.PROGRESS, step=seq, metrics=metrics)


def test_what_create_answers_is_what_get_finds(jobs: Jobs, make_spec: MakeSpec) -> None:
    job = jobs.create("default", make_spec(), creator="me")
    assert jobs.get("default", job.id) == job
    assert (job.state, job.creator, job.version) == (State.PENDING, "me", 1)
    assert job.requested_spec.training.micro_batch_size is None
    assert job.resolved_spec.training.micro_batch_size is not None


def test_an_id_is_the_name_and_five_characters(jobs: Jobs, make_spec: MakeSpec) -> None:
    ids = {jobs.create("default", make_spec()).id for _ in range(5)}
    assert len(ids) == 5
    for job_id in ids:
        name, _, suffix = job_id.rpartition("-")
        assert name == "demo" and len(suffix) == 5 and suffix.isalnum()


def test_an_id_that_is_taken_by_chance_is_drawn_again(make_jobs: Callable[..., Jobs], make_spec: MakeSpec) -> None:
    drawn = iter(["aaaaa", "aaaaa", "bbbbb"])
    jobs = make_jobs(new_suffix=lambda: next(drawn))
    assert [jobs.create("default", make_spec()).id for _ in range(2)] == ["demo-aaaaa", "demo-bbbbb"]


def test_a_callers_own_id_is_kept_or_refused(jobs: Jobs, make_spec: MakeSpec) -> None:
    assert jobs.create("default", make_spec(), job_id="mine").id == "mine"
    with pytest.raises(AlreadyExists):
        jobs.create("default", make_spec(), job_id="mine")
    assert jobs.create("other", make_spec(), job_id="mine").id == "mine"


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"job_id": "Not-One"}, "job_id"),
        ({"job_id": "a" * 51}, "job_id"),
        ({"job_id": "../../etc"}, "job_id"),
        ({"namespace": "a/b"}, "namespace"),
        ({"namespace": ""}, "namespace"),
        ({"request_id": "r" * 129}, "request_id"),
    ],
)
def test_names_that_are_none_are_refused(jobs: Jobs, make_spec: MakeSpec, arguments: dict[str, str], path: str) -> None:
    namespace = arguments.pop("namespace", "default")
    with pytest.raises(InvalidRequest) as caught:
        jobs.create(namespace, make_spec(), **arguments)  # type: ignore[arg-type]
    assert caught.value.violations[0].path == path


def test_a_request_sent_twice_makes_one_job(jobs: Jobs, make_spec: MakeSpec, inputs: Path) -> None:
    spec = make_spec()
    job = jobs.create("default", spec, request_id="r")
    (inputs / "rows.jsonl").unlink()  # the answer to the same request is the same, whatever happened since
    assert jobs.create("default", spec, request_id="r") == job
    for changes in ({"spec": make_spec(name="another")}, {"spec": spec, "job_id": "mine"}):
        with pytest.raises(RequestIdReused):
            jobs.create("default", request_id="r", **changes)
    assert len(jobs.list("default").jobs) == 1


def test_a_request_sent_by_many_at_once_makes_one_job(jobs: Jobs, make_spec: MakeSpec) -> None:
    spec, ids = make_spec(), []

    def send() -> None:
        ids.append(jobs.create("default", spec, request_id="r").id)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8 and len(set(ids)) == 1


def test_validate_only_answers_and_records_nothing(jobs: Jobs, make_spec: MakeSpec) -> None:
    job = jobs.create("default", make_spec(), validate_only=True)
    assert job.state == State.PENDING and job.plan.fits
    assert jobs.list("default").jobs == () and jobs.events("default") == []


def test_what_is_not_served_is_planned_and_not_created(jobs: Jobs, make_spec: MakeSpec) -> None:
    spec = make_spec(compute={"strategy": "zero3", "processes_per_node": 2}, quantization="nf4", adapter={"lora": {}})
    assert jobs.plan("default", spec).plan.peak_bytes > 0
    with pytest.raises(NotServed, match="Splitting 4-bit weights"):
        jobs.create("default", spec)


def test_nothing_is_recorded_of_a_job_whose_data_is_not_there(jobs: Jobs, make_spec: MakeSpec, inputs: Path) -> None:
    (inputs / "rows.jsonl").unlink()
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl is no file or directory"):
        jobs.create("default", make_spec(), request_id="r")
    assert jobs.list("default").jobs == ()


def test_nothing_is_recorded_while_the_artefact_store_cannot_be_written(
    make_jobs: Callable[..., Jobs], make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no directory")
    jobs = make_jobs(artifacts=tmp_path / "file" / "artifacts")
    with pytest.raises(StorageError):
        jobs.create("default", make_spec())
    assert jobs.list("default").jobs == ()


def test_a_job_is_found_by_its_name_while_that_is_unambiguous(jobs: Jobs, make_spec: MakeSpec) -> None:
    first = jobs.create("default", make_spec())
    assert jobs.get("default", "demo") == first
    second = jobs.create("default", make_spec())
    with pytest.raises(InvalidRequest) as caught:
        jobs.get("default", "demo")
    assert f"{second.id}, {first.id}" in str(caught.value)
    named_like = jobs.create("default", make_spec(), job_id="demo")
    assert jobs.get("default", "demo") == named_like
    with pytest.raises(NotFound):
        jobs.get("default", "nothing")
    with pytest.raises(NotFound):
        jobs.get("other", first.id)


def test_pages_follow_one_another_newest_first(jobs: Jobs, make_spec: MakeSpec) -> None:
    ids = [jobs.create("default", make_spec()).id for _ in range(5)]
    found: list[str] = []
    token, pages = "", 0
    while True:
        page = jobs.list("default", page_size=2, page_token=token)
        found += [job.id for job in page.jobs]
        pages += 1
        if not (token := page.next_page_token):
            break
    assert found == ids[::-1] and pages == 3


def test_a_job_made_between_two_pages_changes_neither(jobs: Jobs, make_spec: MakeSpec) -> None:
    ids = [jobs.create("default", make_spec()).id for _ in range(4)]
    first = jobs.list("default", page_size=2)
    jobs.create("default", make_spec())
    second = jobs.list("default", page_size=2, page_token=first.next_page_token)
    assert [job.id for job in (*first.jobs, *second.jobs)] == ids[::-1]


def test_a_token_belongs_to_its_listing(jobs: Jobs, make_spec: MakeSpec) -> None:
    for _ in range(3):
        jobs.create("default", make_spec())
    token = jobs.list("default", page_size=1).next_page_token
    changed: list[dict[str, str]] = [
        {"namespace": "other", "page_token": token},
        {"namespace": "default", "page_token": token, "filter": "state = PENDING"},
        {"namespace": "default", "page_token": "rubbish"},
        {"namespace": "default", "page_token": "WzFd"},
        {"namespace": "default", "page_token": "é"},
    ]
    for arguments in changed:
        with pytest.raises(InvalidRequest) as caught:
            jobs.list(**arguments)  # type: ignore[arg-type]
        assert caught.value.violations[0].path == "page_token"


def test_page_sizes_have_limits(jobs: Jobs) -> None:
    with pytest.raises(InvalidRequest) as caught:
        jobs.list("default", page_size=-1)
    assert caught.value.violations[0].path == "page_size"
    assert jobs.list("default", page_size=10 * MAX_PAGE_SIZE).jobs == ()


def test_a_filter_chooses(jobs: Jobs, make_spec: MakeSpec) -> None:
    red = jobs.create("default", make_spec(labels={"team": "red"}))
    jobs.create("default", make_spec())
    assert jobs.list("default", filter='labels.team = "red" AND state = PENDING').jobs == (red,)


def test_cancel_is_told_once_and_can_be_repeated(jobs: Jobs, store: Store, make_spec: MakeSpec) -> None:
    job = jobs.create("default", make_spec())
    cancelled = jobs.cancel("default", job.id)
    assert cancelled.state == State.CANCELLING
    assert jobs.cancel("default", job.id) == cancelled == jobs.get("default", job.id)
    end(store, job.id, State.CANCELLED)
    assert jobs.cancel("default", job.id).state == State.CANCELLED
    assert [event.fields["state"] for event in jobs.events("default")] == ["PENDING", "CANCELLING", "CANCELLED"]


def test_only_what_has_ended_is_deleted(jobs: Jobs, store: Store, make_spec: MakeSpec) -> None:
    job = jobs.create("default", make_spec())
    with pytest.raises(WrongState):
        jobs.delete("default", job.id)
    end(store, job.id)
    deleted = jobs.delete("default", job.id)
    assert deleted.delete_time and deleted == jobs.get("default", job.id)
    assert not store.deletes_artifacts(deleted)
    again = jobs.delete("default", job.id, artifacts=True)
    assert again.delete_time == deleted.delete_time and store.deletes_artifacts(again)


def test_events_are_read_on_from_a_number(jobs: Jobs, make_spec: MakeSpec) -> None:
    first, second = jobs.create("default", make_spec()), jobs.create("default", make_spec())
    assert [event.job for event in jobs.events("default")] == [first.id, second.id]
    assert [event.seq for event in jobs.events("default", after_seq=1)] == [2]
    assert [event.seq for event in jobs.events("default", job_id=second.id)] == [2]
    with pytest.raises(InvalidRequest):
        jobs.events("default", after_seq=-1)
    with pytest.raises(NotFound):
        jobs.events("default", job_id="nothing")


def test_metrics_are_series_by_name(jobs: Jobs, store: Store, make_spec: MakeSpec) -> None:
    job = jobs.create("default", make_spec())
    begin(store, job.id)
    jobs.report("default", job.id, 1, "secret", [step(1, loss=3.0), step(2, loss=2.0, eta_s=1.0), step(3, loss=1.0)])
    series = {found.name: found for found in jobs.metrics("default", job.id)}
    assert [(point.step, point.value, point.attempt) for point in series["loss"].points] == [
        (1, 3.0, 1),
        (2, 2.0, 1),
        (3, 1.0, 1),
    ]
    assert [point.step for point in series["eta_s"].points] == [2]
    chosen = jobs.metrics("default", job.id, names=["loss", "unknown"], min_step=2, max_step=2)
    assert [(found.name, len(found.points)) for found in chosen] == [("loss", 1), ("unknown", 0)]


def test_reports_are_taken_from_the_attempt_itself_only(jobs: Jobs, store: Store, make_spec: MakeSpec) -> None:
    job = jobs.create("default", make_spec())
    begin(store, job.id)
    assert jobs.report("default", job.id, 1, "secret", [step(1), step(2)]) == 2
    assert jobs.report("default", job.id, 1, "secret", [step(2), step(3)]) == 3
    assert jobs.report("default", job.id, 1, "secret", []) == 3
    for attempt, nonce in ((1, "guessed"), (1, ""), (2, "secret")):
        with pytest.raises(Refused):
            jobs.report("default", job.id, attempt, nonce, [step(4)])
    with store.change("default", job.id, now=START) as change:
        change.update_attempt(1, state=State.FAILED)
    with pytest.raises(Refused, match="has ended"):
        jobs.report("default", job.id, 1, "secret", [step(4)])
    assert len(jobs.events("default", job_id=job.id)) == 4


def test_logs_are_those_of_an_attempt_and_a_rank_that_are_there(
    jobs: Jobs, store: Store, make_spec: MakeSpec, tmp_path: Path
) -> None:
    job = jobs.create("default", make_spec())
    assert list(jobs.logs("default", job.id)) == []
    begin(store, job.id)
    begin(store, job.id, 2)
    for number in (1, 2):
        log = tmp_path / "runs" / "default" / job.id / f"attempt-{number}" / "logs" / "rank-0.log"
        log.parent.mkdir(parents=True)
        log.write_text(f"of attempt {number}\n")
    assert b"".join(jobs.logs("default", job.id)) == b"of attempt 2\n"
    assert b"".join(jobs.logs("default", job.id, attempt=1, offset=3)) == b"attempt 1\n"
    with pytest.raises(NotFound):
        jobs.logs("default", job.id, attempt=3)
    with pytest.raises(InvalidRequest):
        jobs.logs("default", job.id, rank=1)


def test_every_error_says_what_to_do(jobs: Jobs, store: Store, make_spec: MakeSpec) -> None:
    job = jobs.create("default", make_spec(), job_id="mine")
    calls: list[Callable[[], object]] = [
        lambda: jobs.get("default", "nothing"),
        lambda: jobs.delete("default", job.id),
        lambda: jobs.create("default", make_spec(), job_id="mine"),
    ]
    for call in calls:
        with pytest.raises(HoneError) as caught:
            call()
        assert caught.value.fix


def test_a_job_is_replaced_by_nobody(jobs: Jobs, make_spec: MakeSpec) -> None:
    job = jobs.create("default", make_spec())
    with pytest.raises(AlreadyExists):
        jobs.create("default", make_spec(name="another"), job_id=job.id)
    assert jobs.get("default", job.id) == replace(job)
