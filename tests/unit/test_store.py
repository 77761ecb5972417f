"""The store: what it keeps, what it refuses, and that its history has neither gaps nor doubles."""

import ast
import inspect as python_inspect
import itertools
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from hone import gpus
from hone.backends.kubernetes.logs import _with_gaps_told
from hone.errors import (
    AlreadyExists,
    InternalError,
    InvalidRequest,
    NotFound,
    PermanentError,
    RequestIdReused,
    Unavailable,
)
from hone.job import TRANSITIONS, Attempt, Event, EventType, Failure, FailureClass, Job, Output, State
from hone.machine import plan_here
from hone.plan import Hardware
from hone.spec import JobSpec
from hone.store import Change, Request, Store, condition, sqlite, store
from hone.store.migrate import HEAD, MIGRATIONS
from hone.store.tables import metadata

NOW = datetime(2026, 11, 24, 12, 0, 0, 123456, tzinfo=UTC)
HARDWARE = Hardware(profiles=gpus.load_profiles(), cpu_cores=4, memory_bytes=32 * 1024**3)
MakeJob = Callable[..., Job]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind: what the store promises, it promises on both."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'hone.db'}"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'hone.db'}"


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read here comes from the database, unless a test is about what is kept."""
    monkeypatch.setattr(store, "KEPT_JOBS", 0)


@pytest.fixture
def records(url: str) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()


@pytest.fixture
def make_job(make_spec: Callable[..., JobSpec]) -> MakeJob:
    def make(job_id: str = "demo-1", *, namespace: str = "default", state: State = State.PENDING, **spec: Any) -> Job:
        requested = make_spec(**spec)
        planned = plan_here(requested, HARDWARE)
        return Job(
            namespace=namespace,
            id=job_id,
            uid=str(uuid4()),
            requested_spec=requested,
            resolved_spec=planned.spec,
            plan=planned.plan,
            state=state,
            state_reason="new",
            creator="me",
            create_time=NOW,
            update_time=NOW,
            version=1,
        )

    return make


def an_attempt(number: int = 1) -> Attempt:
    return Attempt(number=number, nonce="secret", state=State.PENDING, create_time=NOW)


def reported(seq: int, kind: EventType = EventType.PROGRESS, **fields: Any) -> Event:
    return Event(seq=seq, time=NOW, type=kind, message=f"line {seq}", **fields)


def test_a_job_comes_back_as_it_went_in(records: Store, make_job: MakeJob) -> None:
    job = make_job(labels={"team": "a"}, training={"epochs": 2})
    records.create(job)
    assert records.get("default", "demo-1") == job
    assert records.get("default", "demo-1").requested_spec.model_fields_set == job.requested_spec.model_fields_set


def test_everything_that_changes_comes_back_too(records: Store, make_job: MakeJob) -> None:
    records.create(make_job())
    failure = Failure(failure_class=FailureClass.OOM, message="no", next_step="less", rank=1, log_tail=("a", "b"))
    output = Output(kind="adapter", uri="file:///a", size_bytes=5, sha256="0" * 64, attempt=1)
    with records.change("default", "demo-1", now=NOW) as change:
        change.add_attempt(an_attempt())
        change.update_attempt(1, state=State.FAILED, failure=failure, end_time=NOW, counted=False)
        change.set(outputs=(output,), start_time=NOW)
        change.to_state(State.FAILED, "no", failure=failure)
    job = records.get("default", "demo-1")
    assert job == change.written
    assert (job.version, job.failure, job.outputs, job.end_time) == (2, failure, (output,), NOW)
    assert job.attempts[0].failure == failure and not job.attempts[0].counted


def test_a_job_is_read_again_when_it_has_changed_and_only_then(
    url: str, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "KEPT_JOBS", 2)
    with closing(Store(url)) as ours, closing(Store(url)) as another:
        ours.create(make_job())
        kept = ours.find("default", "demo-1")
        assert kept is ours.find("default", "demo-1") and kept == another.find("default", "demo-1")
        with another.change("default", "demo-1", now=NOW) as change:
            change.to_state(State.QUEUED, "waits")
        assert ours.get("default", "demo-1").state == State.QUEUED
        with ours.change("default", "demo-1", now=NOW) as change:
            change.to_state(State.QUEUED, "half a character: \ud800")
        assert ours.get("default", "demo-1").state_reason == "half a character: ?"
        for number in range(2, 5):
            ours.create(make_job(f"demo-{number}"))
        assert len(ours._kept) == 2
        another.bury("default", "demo-4", now=NOW)
        assert ours.find("default", "demo-4") is None


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(State, 2)))
def test_only_the_listed_transitions_happen(make_job: MakeJob, old: State, new: State) -> None:
    change = Change(make_job(state=old), last_seqs={}, now=NOW)
    if (old, new) in TRANSITIONS:
        change.to_state(new, "because")
        assert change.job.state == new and change.events[0][0].fields["state"] == new
    else:
        with pytest.raises(InternalError):
            change.to_state(new, "because")


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELLED])
def test_a_terminal_state_keeps_its_reason_too(make_job: MakeJob, state: State) -> None:
    with pytest.raises(InternalError):
        Change(make_job(state=state), last_seqs={}, now=NOW).to_state(state, "another reason")


def test_a_change_that_raises_leaves_nothing(records: Store, make_job: MakeJob) -> None:
    records.create(make_job())
    with pytest.raises(InternalError), records.change("default", "demo-1", now=NOW) as change:
        change.to_state(State.RUNNING, "runs")
        change.to_state(State.PAUSED, "cannot be")
    assert records.get("default", "demo-1").state == State.PENDING
    assert records.last_seq("default") == 1


def test_a_change_of_nothing_raises_no_version(records: Store, make_job: MakeJob) -> None:
    records.create(make_job())
    with records.change("default", "demo-1", now=NOW) as change:
        change.to_state(State.PENDING, "new")
    assert records.job_version("default", "demo-1") == (change.job.uid, 1)


def test_events_of_several_writers_are_numbered_without_gap_or_double(records: Store, make_job: MakeJob) -> None:
    for number in range(4):
        records.create(make_job(f"demo-{number}"))

    def write(job_id: str) -> None:
        for turn in range(25):
            with records.change("default", job_id, now=NOW) as change:
                change.tell(EventType.NOTE, f"{job_id} {turn}")

    threads = [threading.Thread(target=write, args=(f"demo-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.seq for event in records.events("default")] == list(range(1, 105))
    assert records.last_seq("default") == 104 and records.last_seq("other") == 0


def test_reading_on_from_any_number_gives_exactly_the_rest(records: Store, make_job: MakeJob) -> None:
    records.create(make_job("demo-1"))
    records.create(make_job("demo-2"))
    records.create(make_job("demo-3", namespace="other"))
    whole = records.events("default")
    assert [event.job for event in whole] == ["demo-1", "demo-2"]
    for seq in range(3):
        assert records.events("default", after_seq=seq) == whole[seq:]
    assert records.events("default", job=records.get("default", "demo-2")) == whole[1:]
    assert records.events("default", limit=1) == whole[:1]


def test_what_an_attempt_reports_twice_is_stored_once(records: Store, make_job: MakeJob) -> None:
    records.create(make_job())
    with records.change("default", "demo-1", now=NOW) as change:
        change.add_attempt(an_attempt())
    batches = [[1, 2, 3], [2, 3, 4], [1], [6, 7], [5, 6]]
    answers = []
    for batch in batches:
        with records.change("default", "demo-1", now=NOW) as change:
            answers.append(change.store_events(1, [reported(seq) for seq in batch]))
    assert answers == [3, 4, 4, 4, 6]  # 6 came before 5: after a gap nothing is taken
    stored = [event.message for event in records.events("default") if event.attempt == 1]
    assert stored == [f"line {seq}" for seq in range(1, 7)]
    assert records.last_seqs(records.get("default", "demo-1")) == {1: 6}


def test_events_that_are_told_as_lost_hold_nothing_up(records: Store, make_job: MakeJob) -> None:
    """As the backend reads them from a log that begins too late: it would be asked for the same events for ever."""
    records.create(make_job())
    with records.change("default", "demo-1", now=NOW) as change:
        change.add_attempt(an_attempt())
        change.store_events(1, [reported(1), reported(2)])
    told = list(_with_gaps_told([reported(7), reported(8), reported(10)], 2))
    with records.change("default", "demo-1", now=NOW) as change:
        assert change.store_events(1, told) == 10
    assert records.last_seqs(records.get("default", "demo-1")) == {1: 10}
    stored = [event.message for event in records.events("default") if event.attempt == 1]
    assert stored[2:] == [told[0].message, "line 7", "line 8", told[3].message, "line 10"]


def test_progress_follows_the_events_of_the_newest_attempt(records: Store, make_job: MakeJob) -> None:
    records.create(make_job())
    phase = reported(1, EventType.PHASE, fields={"phase": "training"})
    step = reported(2, step=7, metrics={"loss": 0.5, "max_steps": 10.0, "eta_s": 3.0})
    with records.change("default", "demo-1", now=NOW) as change:
        change.add_attempt(an_attempt(1))
        change.store_events(1, [phase, step])
    progress = records.get("default", "demo-1").progress
    assert progress and (progress.step, progress.max_steps, progress.loss, progress.phase) == (7, 10, 0.5, "training")
    with records.change("default", "demo-1", now=NOW) as change:
        change.add_attempt(an_attempt(2))
        change.store_events(1, [reported(3, step=8)])
    assert records.get("default", "demo-1").progress is None


def test_a_loss_that_is_no_number_is_kept_as_such(records: Store, make_job: MakeJob) -> None:
    records.create(make_job())
    with records.change("default", "demo-1", now=NOW) as change:
        change.add_attempt(an_attempt())
        change.store_events(1, [reported(1, step=1, metrics={"loss": float("nan")})])
    event = records.events("default")[-1]
    assert event.metrics["loss"] != event.metrics["loss"]
    assert records.get("default", "demo-1").progress is not None


def test_whatever_a_trainer_prints_can_be_stored(records: Store, make_job: MakeJob) -> None:
    records.create(make_job())
    odd = "a zero \0 and half of a character \ud83d"
    with records.change("default", "demo-1", now=NOW) as change:
        change.add_attempt(an_attempt())
        change.store_events(1, [Event(seq=1, time=NOW, type="x" * 40, message=odd, fields={"log": odd})])
        change.to_state(
            State.FAILED, odd, failure=Failure(failure_class=FailureClass.DATA, message=odd, log_tail=(odd,))
        )
    event, job = records.events("default")[1], records.get("default", "demo-1")
    assert event.type == "x" * 32
    assert event.message == job.state_reason == "a zero \ufffd and half of a character ?"
    assert event.fields["log"].startswith("a zero ") and job.failure and job.failure.log_tail[0].startswith("a zero ")


def test_one_request_makes_one_job(records: Store, make_job: MakeJob) -> None:
    first = records.create(make_job("demo-1"), Request("r", "body"))
    again = records.create(make_job("demo-2"), Request("r", "body"))
    assert again == first
    with pytest.raises(RequestIdReused):
        records.create(make_job("demo-3"), Request("r", "another body"))
    assert records.create(make_job("demo-2", namespace="other"), Request("r", "body")).id == "demo-2"


def test_an_id_is_never_used_again(records: Store, make_job: MakeJob) -> None:
    records.create(make_job(), Request("r", "body"))
    with pytest.raises(AlreadyExists):
        records.create(make_job())
    records.bury("default", "demo-1", now=NOW)
    with pytest.raises(AlreadyExists):
        records.create(make_job())
    with pytest.raises(NotFound):
        records.get("default", "demo-1")
    with pytest.raises(NotFound, match="was deleted"):
        records.create(make_job("demo-2"), Request("r", "body"))
    assert records.job_version("default", "demo-1") is None
    assert records.ids_of_name("default", "demo") == [] and records.unfinished() == []
    assert [event.fields for event in records.events("default")] == [{"deleted": "true"}]


def test_a_request_id_is_forgotten_with_its_job_after_a_day(records: Store, make_job: MakeJob) -> None:
    records.create(make_job(), Request("r", "body"))
    records.bury("default", "demo-1", now=NOW + store.REQUEST_IDS_KEPT + timedelta(seconds=1))
    assert records.create(make_job("demo-2"), Request("r", "body")).id == "demo-2"


def test_subscribers_hear_of_each_commit_and_of_nothing_else(records: Store, make_job: MakeJob) -> None:
    heard: list[tuple[str, int]] = []
    unsubscribe = records.subscribe(lambda job: heard.append((job.id, job.version)))
    records.create(make_job())
    with records.change("default", "demo-1", now=NOW) as change:
        change.to_state(State.PENDING, "new")
    assert heard == [("demo-1", 1)]
    with records.change("default", "demo-1", now=NOW) as change:
        change.to_state(State.RUNNING, "runs")
    assert heard == [("demo-1", 1), ("demo-1", 2)]
    unsubscribe()
    records.bury("default", "demo-1", now=NOW)
    assert len(heard) == 2


def test_unfinished_is_what_neither_ended_nor_is_paused_or_is_to_be_deleted(records: Store, make_job: MakeJob) -> None:
    for number, state in enumerate(State):
        records.create(make_job(f"demo-{number}", state=state))
    at_rest = {f"demo-{n}" for n, state in enumerate(State) if state.is_terminal or state == State.PAUSED}
    assert {job_id for _, job_id, _ in records.unfinished()} == {f"demo-{n}" for n in range(len(State))} - at_rest
    deleted = max(at_rest)
    with records.change("default", deleted, now=NOW) as change:
        change.set(delete_time=NOW)
        change.delete_artifacts = True
    assert deleted in {job_id for _, job_id, _ in records.unfinished()}
    assert records.deletes_artifacts(records.get("default", deleted))


FILTERED = [
    ("", "abc"),
    ("state = RUNNING", "b"),
    ("state != RUNNING", "ac"),
    ("method = sft AND state = PENDING", "ac"),
    ('labels.team = "red"', "a"),
    ("labels.team != red", "bc"),
    ("labels.team:*", "ab"),
    ("labels.team : re", "a"),
    ("name : prod", "c"),
    ("NOT name : prod", "ab"),
    ("creator = me", "abc"),
    ('id = "a" OR id = c', "ac"),
    ("state = PENDING AND id = a OR id = b", "a"),
    ("(state = PENDING AND id = a) OR id = b", "ab"),
    ('create_time >= "2026-11-24T12:00:00.123456Z"', "abc"),
    ("create_time < 2026-11-24", ""),
    ("name : %", ""),
]


@pytest.mark.parametrize(("text", "expected"), FILTERED)
def test_a_filter_lets_through_what_it_says(records: Store, make_job: MakeJob, text: str, expected: str) -> None:
    records.create(make_job("a", labels={"team": "red"}))
    records.create(make_job("b", labels={"team": "blue"}, state=State.RUNNING))
    records.create(make_job("c", name="production"))
    found = records.page("default", condition=condition(text), limit=10)
    assert "".join(sorted(job.id for job in found)) == expected


BAD_FILTERS = [
    ("colour = red", "position 1: 'colour' is not a field"),
    ("state = BUSY", "position 9: 'BUSY' is not a state; use one of PENDING"),
    ("state < RUNNING", "position 7: state is compared by"),
    ("state RUNNING", "position 7: 'RUNNING' stands where one of ="),
    ("state =", "position 8: the filter ends where a value"),
    ("(state = RUNNING", "where a closing parenthesis"),
    ("state = RUNNING state = RUNNING", "position 17: 'state' stands where AND"),
    ('name = "a', "position 8: '\"' is not understood"),
    ("create_time > yesterday", "position 15: 'yesterday' is not a time"),
    ("create_time : 2026", "position 13: create_time is a time"),
    ("= 3", "position 1: '=' stands where the name of a field"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILTERS)
def test_a_filter_that_is_not_understood_is_refused_with_its_position(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        condition(text)
    assert caught.value.violations[0].path == "filter"
    assert message in caught.value.violations[0].message


def test_pages_hold_every_job_once_newest_first(records: Store, make_job: MakeJob) -> None:
    for number in range(7):
        records.create(make_job(f"demo-{number}"))  # all of one microsecond: the uid decides
    found: list[Job] = []
    after = None
    while page := records.page("default", condition=condition(""), limit=3, after=after):
        found += page
        after = (page[-1].create_time, page[-1].uid)
    assert sorted(job.id for job in found) == [f"demo-{number}" for number in range(7)]
    assert found == sorted(found, key=lambda job: job.uid, reverse=True)


def test_migrations_make_exactly_the_tables(records: Store) -> None:
    with records._database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_newest_migration_is_the_one_that_opening_asks_for() -> None:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_opening_a_current_database_loads_no_migrations(records: Store, url: str) -> None:
    code = f"import sys; from hone.store import Store; Store({url!r}).close(); print('alembic' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"


def test_a_database_of_a_newer_version_is_used_as_it_is(records: Store, url: str, make_job: MakeJob) -> None:
    with records._database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    again = Store(url)
    again.create(make_job())
    again.close()


def test_a_record_survives_the_process(records: Store, url: str, make_job: MakeJob) -> None:
    job = records.create(make_job())
    again = Store(url)
    assert again.get("default", job.id) == job
    again.close()


def test_sqlite_is_durable_and_shared_as_promised(sqlite_url: str) -> None:
    records = Store(sqlite_url)
    with records._database.read() as connection:
        asked = ("journal_mode", "synchronous", "foreign_keys")
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in asked]
    records.close()
    assert values == ["wal", 2, 1]


def test_a_locked_database_is_unavailable_and_says_why(
    sqlite_url: str, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(sqlite_url).close()
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 10)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    mine = Store(sqlite_url)  # readers are let in
    with pytest.raises(Unavailable, match="locked by another process"):
        mine.create(make_job())
    mine.close()
    other.close()


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "hone.db"
    path.write_text("these are my notes, and they are longer than a header of SQLite is")
    with pytest.raises(PermanentError, match="not a database"):
        Store(f"sqlite:///{path}")
    assert path.read_text().startswith("these are my notes")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("sqlite:////dev/null/hone.db", "cannot be written"),
        ("not an address", "not the address of a database"),
        ("oracle://db/hone", "no driver"),
    ],
)
def test_a_database_that_cannot_be_opened_says_what_to_do(address: str, message: str) -> None:
    with pytest.raises(PermanentError, match=message) as caught:
        Store(address)
    assert caught.value.fix


def test_no_password_is_ever_said() -> None:
    with pytest.raises(PermanentError) as caught:
        Store("oracle://hone:hunter2@db/hone")
    assert "hunter2" not in str(caught.value)


def test_the_store_speaks_no_dialect() -> None:
    """A database's own words stand in its module only, so that another kind needs nothing but a URL."""
    for node in ast.walk(ast.parse(python_inspect.getsource(store))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "PRAGMA" not in node.value and "json_extract" not in node.value
