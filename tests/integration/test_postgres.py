"""What only a shared database can show: several processes, a server that goes away, a leader that was paused.

That the store keeps its promises on PostgreSQL is shown by tests/unit/test_store.py, which runs on both kinds.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from hone import gpus
from hone.errors import AlreadyExists, RequestIdReused, StorageError, Unavailable
from hone.job import EventType, Job, State
from hone.leader import Leader
from hone.machine import plan_here
from hone.plan import Hardware
from hone.rpc.client import Client
from hone.store import LeaseLost, Request, Store, postgresql

from .hone_server import MakeSpec, ServerProcess, end_runs, quick, running, wait_until
from .postgres import PostgresServer, find_postgres, run_postgres

WRITER = Path(__file__).parent / "store_writer.py"
HARDWARE = Hardware(profiles=gpus.load_profiles(), cpu_cores=4, memory_bytes=32 * 1024**3)
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
Start = Callable[..., "Writer"]


class Writer:
    """A process of store_writer.py."""

    def __init__(self, url: str, *arguments: object) -> None:
        command = [sys.executable, str(WRITER), url, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def until(self, start: str) -> str:
        """Its first line from here on that begins so."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(start):
                return line.strip()
        raise AssertionError(f"it ended with {self.process.wait(10)} and never said {start!r}")

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> int:
        return self.process.wait(30)


@pytest.fixture
def start(postgres_url: str) -> Iterator[Start]:
    """Start a writer on the database; none outlives the test."""
    started: list[Writer] = []

    def begin(*arguments: object) -> Writer:
        started.append(Writer(postgres_url, *arguments))
        return started[-1]

    yield begin
    for writer in started:
        with writer.process:
            writer.process.kill()


@pytest.fixture
def records(postgres_url: str) -> Iterator[Store]:
    store = Store(postgres_url)
    yield store
    store.close()


@pytest.fixture
def make_job(make_spec: MakeSpec) -> Callable[..., Job]:
    planned = plan_here(make_spec(), HARDWARE)

    def make(job_id: str) -> Job:
        return Job(
            namespace="default",
            id=job_id,
            uid=str(uuid4()),
            requested_spec=planned.spec,
            resolved_spec=planned.spec,
            plan=planned.plan,
            state=State.PENDING,
            state_reason="new",
            create_time=NOW,
            update_time=NOW,
            version=1,
            creator="",
        )

    return make


def told(records: Store) -> list[str]:
    """Messages of the writers, in order."""
    return [event.message for event in records.events("default", limit=100_000) if event.type == EventType.NOTE]


def test_services_that_start_at_once_make_the_schema_once(start: Start) -> None:
    writers = [start("no-job", "open") for _ in range(3)]
    assert [writer.end() for writer in writers] == [0, 0, 0]


def test_events_of_two_processes_are_numbered_in_order_of_commit(
    records: Store, start: Start, make_job: Callable[..., Job]
) -> None:
    """Whoever reads while both write, and remembers the last number, misses none: no smaller number comes later."""
    for job_id in ("one", "two"):
        records.create(make_job(job_id))
    writers = [start(job_id, "tell", 150, job_id) for job_id in ("one", "two")]
    seen: list[int] = []
    while len(seen) < 302:
        seen += [event.seq for event in records.events("default", after_seq=seen[-1] if seen else 0, limit=7)]
        assert any(writer.process.poll() in (None, 0) for writer in writers)
    assert [writer.end() for writer in writers] == [0, 0]
    assert seen == list(range(1, 303)) and records.last_seq("default") == 302
    assert all(
        [m for m in told(records) if m.startswith(j)] == [f"{j} {n}" for n in range(150)] for j in ("one", "two")
    )


def test_writers_of_the_same_jobs_in_two_processes_never_wait_for_each_other_for_ever(
    records: Store, postgres_url: str, make_job: Callable[..., Job]
) -> None:
    other = Store(postgres_url)
    for number in range(4):
        records.create(make_job(f"job-{number}"))

    def write(store: Store, order: list[int]) -> None:
        for _ in range(10):
            for number in order:
                with store.change("default", f"job-{number}", now=NOW) as change:
                    change.tell(EventType.NOTE, "x")

    threads = [
        threading.Thread(target=write, args=(store, order))
        for store in (records, other)
        for order in ([0, 1, 2, 3], [3, 2, 1, 0])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    other.close()
    assert len(told(records)) == 160


def test_one_request_of_two_replicas_at_once_makes_one_job(
    records: Store, postgres_url: str, make_job: Callable[..., Job]
) -> None:
    other = Store(postgres_url)
    for turn in range(10):
        barrier = threading.Barrier(2)
        answers: list[str] = []

        def create(store: Store, job: Job, turn: int = turn, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(10)
            answers.append(store.create(job, Request(f"request-{turn}", "body")).id)  # noqa: B023

        jobs = [make_job(f"demo-{turn}-{replica}") for replica in "ab"]
        threads = [threading.Thread(target=create, args=pair) for pair in zip((records, other), jobs, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(answers) == 2 and len(set(answers)) == 1, answers
        with pytest.raises(RequestIdReused):
            other.create(make_job("another"), Request(f"request-{turn}", "another body"))
    with pytest.raises(AlreadyExists):
        other.create(make_job(answers[0]))
    other.close()


def test_one_leads_at_a_time_and_the_next_one_when_it_falls_silent(records: Store) -> None:
    first, second = records.lease("first", ttl_s=0.3), records.lease("second", ttl_s=30)
    assert first.take() == 1
    assert second.take() is None and second.current_holder() == "first"
    assert first.renew(1)
    time.sleep(0.4)
    assert second.current_holder() is None
    assert second.take() == 2
    assert not first.renew(1) and first.take() is None
    assert second.take() == 3  # started again under its name: at once, and what it left behind is fenced
    second.give_back(3)
    assert first.take() == 4


def test_a_leader_writes_nothing_once_another_one_leads(records: Store, make_job: Callable[..., Job]) -> None:
    records.create(make_job("demo"))
    lease = records.lease("first", ttl_s=0.0)
    first, second = lease.take(), records.lease("second").take()
    assert (first, second) == (1, 2)
    with pytest.raises(LeaseLost), records.fenced(lease.check(1)).change("default", "demo", now=NOW) as change:
        change.tell(EventType.NOTE, "too late")
    with pytest.raises(LeaseLost):
        records.fenced(lease.check(1)).bury("default", "demo", now=NOW)
    with pytest.raises(LeaseLost):
        records.fenced(lease.check(1)).create(make_job("observed"))
    assert records.find("default", "observed") is None
    with records.fenced(lease.check(2)).change("default", "demo", now=NOW) as change:
        change.tell(EventType.NOTE, "in time")
    assert told(records) == ["in time"]


def test_a_leader_that_was_paused_past_its_lease_writes_nothing(
    records: Store, start: Start, make_job: Callable[..., Job]
) -> None:
    records.create(make_job("demo"))
    first = start("demo", "lead", "first", 1.0)
    first.until("told 5")
    first.pause()
    second = start("demo", "lead", "second", 60.0)
    assert second.until("epoch") == "epoch 2"
    second.until("told 5")
    first.go_on()
    assert first.end() == 3
    second.until("told")
    messages = told(records)
    turn = next(index for index, message in enumerate(messages) if message.startswith("second"))
    assert all(message.startswith("second") for message in messages[turn:]), "the first one wrote after the second"


def test_a_leader_that_was_paused_inside_a_transaction_loses_it_and_holds_nobody_up(
    records: Store, start: Start, make_job: Callable[..., Job]
) -> None:
    records.create(make_job("demo"))
    first = start("demo", "hold", "first", 0.5)
    first.until("inside")
    first.pause()
    begun = time.monotonic()
    second = start("demo", "lead", "second", 60.0)
    second.until("told 3")
    limit_s = postgresql.LIMITS_MS["idle_in_transaction_session_timeout"] / 1000
    assert time.monotonic() - begun < limit_s + 5
    first.process.kill()
    first.end()
    assert all(message.startswith("second") for message in told(records))


class Work:
    """What a leader does in the next test: it writes its name until it is stopped."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            with self._store.change("default", "demo", now=NOW) as change:
                change.tell(EventType.NOTE, self._name)


def test_a_leader_that_stops_leaves_its_work_to_the_next_at_once(
    records: Store, postgres_url: str, make_job: Callable[..., Job]
) -> None:
    records.create(make_job("demo"))
    other = Store(postgres_url)
    first = Leader(records, records.lease("first", ttl_s=0.9), lambda store: Work(store, "first"))
    second = Leader(other, other.lease("second", ttl_s=0.9), lambda store: Work(store, "second"))
    first.start()
    second.start()
    assert (first.is_leading, second.is_leading) == (True, False)
    wait_until(lambda: len(told(records)) > 50)  # for longer than a lease lasts that nobody renews
    first.stop()
    wait_until(lambda: second.is_leading, timeout_s=1.0)
    wait_until(lambda: told(records)[-1] == "second")
    second.stop()
    other.close()
    messages = told(records)
    assert messages == sorted(messages), "one wrote while the other led"


def test_a_job_runs_to_its_end_on_a_service_that_is_killed_meanwhile(
    tmp_path: Path, quick_python: Path, postgres_url: str, make_spec: MakeSpec
) -> None:
    server = ServerProcess(tmp_path / "home", quick_python, HONE_DATABASE=postgres_url)
    with running(server), Client(server.address) as client:
        job = client.submit(quick(make_spec, steps=60, pause_ms=50))
        wait_until(lambda: client.get(job.id).progress is not None)
        server.end(signal.SIGKILL)
        begun = time.monotonic()
        server.start()
        after = max(event.seq for event in client.events(job.id))
        wait_until(lambda: max(event.seq for event in client.events(job.id)) > after)
        assert time.monotonic() - begun < 10
        events = list(client.watch(job.id))
        assert client.get(job.id).state is State.SUCCEEDED
        assert [event.step for event in events if event.type == EventType.PROGRESS] == list(range(1, 61))
        assert [event.seq for event in client.events()] == list(range(1, len(events) + 1))
        end_runs(client)


def test_a_server_that_is_away_is_unavailable_and_serves_again_when_it_is_back(
    records: Store, postgres: PostgresServer, postgres_url: str, make_job: Callable[..., Job]
) -> None:
    records.create(make_job("demo"))
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hone'")
    assert records.job_version("default", "demo")  # asked once more on a new connection
    with pytest.raises(Unavailable), records.change("default", "demo", now=NOW) as change:
        with psycopg.connect(postgres.url(), autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hone'")
        change.tell(EventType.NOTE, "lost")
    with records.change("default", "demo", now=NOW) as change:
        change.tell(EventType.NOTE, "kept")
    assert told(records) == ["kept"]


def test_a_server_that_stops_is_told_by_its_address_without_the_password(make_job: Callable[..., Job]) -> None:
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with run_postgres(programs) as server:
        store = Store(server.make_database("hone"))
    with pytest.raises(Unavailable, match=r"hone:\*\*\*@127.0.0.1") as caught:
        store.create(make_job("demo"))
    assert server.password not in str(caught.value)
    store.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url: url.replace("hone:", "hone:wrong"), "user and password"),
        (lambda url: url.replace("//hone:", "//nobody:"), "user and password"),
        (lambda url: f"{url}_missing", "CREATE DATABASE"),
    ],
    ids=["password", "user", "database"],
)
def test_an_address_that_cannot_work_says_what_to_do(
    postgres_url: str, change: Callable[[str], str], message: str
) -> None:
    with pytest.raises(StorageError, match=message):
        Store(change(postgres_url))
