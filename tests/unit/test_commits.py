"""hone.store.commits: writers that share a commit cannot tell, except by the time it takes."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import OperationalError

from hone.store.commits import LARGEST_GROUP, SharedCommits


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'rows.db'}")

    def on_connect(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE rows (id INTEGER PRIMARY KEY)")
    yield engine
    engine.dispose()


def insert(connection: Connection, number: int) -> None:
    connection.exec_driver_sql(f"INSERT INTO rows VALUES ({number})")


def raw(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


def stored(engine: Engine) -> list[int]:
    with engine.begin() as connection:
        return [row[0] for row in connection.exec_driver_sql("SELECT id FROM rows ORDER BY id")]


def commits_of(engine: Engine) -> list[int]:
    found: list[int] = []
    event.listen(engine, "commit", lambda _: found.append(1))
    return found


def together(engine: Engine, shared: SharedCommits, work: list[Any]) -> list[BaseException | None]:
    """Every piece of work in a thread of its own, all of them waiting when the first is under way."""
    answers: list[BaseException | None] = [None] * len(work)
    inside, go_on = threading.Event(), threading.Event()

    def one(index: int) -> None:
        try:
            with shared.write() as connection:
                if index == 0:
                    inside.set()
                    assert go_on.wait(10)
                work[index](connection)
        except BaseException as error:
            answers[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(work))]
    threads[0].start()
    assert inside.wait(10)
    for thread in threads[1:]:
        thread.start()
    while shared._num_waiting < len(work) - 1:
        pass
    go_on.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return answers


def test_what_one_writer_wrote_is_there_when_its_block_has_ended(engine: Engine) -> None:
    with SharedCommits(engine).write() as connection:
        insert(connection, 1)
    assert stored(engine) == [1]


def test_writers_that_wait_share_one_commit(engine: Engine) -> None:
    commits = commits_of(engine)
    answers = together(engine, SharedCommits(engine), [lambda c, n=n: insert(c, n) for n in range(20)])
    assert answers == [None] * 20
    assert len(commits) == 1
    assert stored(engine) == list(range(20))


def test_a_group_has_an_end(engine: Engine) -> None:
    commits = commits_of(engine)
    count = LARGEST_GROUP + 5
    together(engine, SharedCommits(engine), [lambda c, n=n: insert(c, n) for n in range(count)])
    assert len(commits) == 2
    assert stored(engine) == list(range(count))


@pytest.mark.parametrize("faulty", [0, 3, 5], ids=["first", "middle", "last"])
def test_what_a_writer_raises_undoes_its_own_part_only(engine: Engine, faulty: int) -> None:
    def fail(connection: Connection) -> None:
        insert(connection, 99)
        raise KeyError("mine")

    work = [fail if n == faulty else (lambda c, n=n: insert(c, n)) for n in range(6)]
    answers = together(engine, SharedCommits(engine), work)
    assert [n for n, answer in enumerate(answers) if answer is not None] == [faulty]
    assert isinstance(answers[faulty], KeyError)
    assert stored(engine) == [n for n in range(6) if n != faulty]


def test_where_the_database_undoes_the_group_nobody_is_told_that_it_is_stored(engine: Engine) -> None:
    def undone(connection: Connection) -> None:
        raw(connection).execute("ROLLBACK")  # as SQLite does when the disk is full
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    shared = SharedCommits(engine)
    answers = together(engine, shared, [lambda c: insert(c, 1), undone])
    assert all(isinstance(answer, Exception) for answer in answers), answers
    assert stored(engine) == []
    with shared.write() as connection:
        insert(connection, 7)
    assert stored(engine) == [7]


def test_a_database_that_is_locked_leaves_the_turn_to_the_next(engine: Engine) -> None:
    shared = SharedCommits(engine)
    with sqlite3.connect(engine.url.database or "", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with engine.connect() as connection:
            raw(connection).execute("PRAGMA busy_timeout=10")  # the pool hands out the same
        with pytest.raises(OperationalError, match="locked"), shared.write():
            pass
        other.execute("ROLLBACK")
    other.close()
    with shared.write() as connection:
        insert(connection, 1)
    assert stored(engine) == [1]
