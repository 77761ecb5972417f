"""`hone backup`: one moment of a database that others go on writing to."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hone.cli import app as application
from hone.errors import StorageError, UserError
from hone.store import Store
from hone.store.backup import copy_database


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home whose database is open, as under a running service."""
    monkeypatch.setenv("HONE_HOME", str(tmp_path))
    monkeypatch.delenv("HONE_DATABASE", raising=False)
    with closing(Store(f"sqlite:///{tmp_path / 'hone.db'}")):
        yield tmp_path


def _tables(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def test_a_copy_holds_what_was_committed_before_and_leaves_out_what_was_not(home: Path) -> None:
    with closing(sqlite3.connect(home / "hone.db", isolation_level=None)) as writer:
        writer.execute("INSERT INTO namespaces (name, seq) VALUES ('committed', 1)")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO namespaces (name, seq) VALUES ('open', 1)")
        copy_database(f"sqlite:///{home / 'hone.db'}", home / "copy.db")
        writer.execute("ROLLBACK")
    with closing(sqlite3.connect(home / "copy.db")) as copy:
        assert copy.execute("SELECT name FROM namespaces").fetchall() == [("committed",)]
    assert _tables(home / "copy.db") == _tables(home / "hone.db")


def test_a_copy_is_a_database_that_the_service_opens(home: Path) -> None:
    copy_database(f"sqlite:///{home / 'hone.db'}", home / "copy.db")
    with closing(Store(f"sqlite:///{home / 'copy.db'}")):
        pass


def test_nobody_but_its_owner_reads_a_copy(home: Path) -> None:
    assert application.run(["backup", str(home / "copy.db")]) == 0
    assert (home / "copy.db").stat().st_mode & 0o777 == 0o600


def test_a_copy_comes_through_a_pipe(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from hone.cli import main; main()", "backup", "-"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    (home / "piped.db").write_bytes(done.stdout)
    assert _tables(home / "piped.db") == _tables(home / "hone.db")


def test_a_file_that_exists_is_not_written_over(home: Path) -> None:
    (home / "copy.db").write_text("precious")
    with pytest.raises(UserError, match="exists"):
        copy_database(f"sqlite:///{home / 'hone.db'}", home / "copy.db")
    assert (home / "copy.db").read_text() == "precious"


@pytest.mark.parametrize("url", ["postgresql://user@host/hone", "sqlite:///nowhere/hone.db", "sqlite://", "what"])
def test_what_is_no_sqlite_database_is_refused_with_the_way_to_go(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        copy_database(url, tmp_path / "copy.db")
    assert refusal.value.fix
    assert not (tmp_path / "copy.db").exists()


def test_a_file_that_is_no_database_leaves_no_copy(tmp_path: Path) -> None:
    (tmp_path / "hone.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StorageError):
        copy_database(f"sqlite:///{tmp_path / 'hone.db'}", tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()
