"""A real PostgreSQL that tests start on loopback and always stop."""

import contextlib
import ctypes
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg

from .servers import free_port

_PR_SET_PDEATHSIG = 1
_READY_S = 30.0
_STOP_S = 10.0


class PostgresServer:
    """A PostgreSQL over one data directory; stopped and started again on its port."""

    def __init__(self, programs: Path, data: Path, password: str, who: Mapping[str, Any]) -> None:
        """`who` are the arguments of Popen that say as whom it runs."""
        self.port = free_port()
        self.password = password
        self._programs, self._data, self._who = programs, data, who
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres") -> str:
        """Address of one of its databases, as HONE_DATABASE takes it."""
        return f"postgresql://hone:{self.password}@127.0.0.1:{self.port}/{database}"

    def make_database(self, name: str) -> str:
        """A new, empty database; its address."""
        self.run(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def run(self, statement: str) -> None:
        """One statement outside any transaction."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[arg-type]  # a test's own text

    def start(self) -> None:
        """Start it; returns when it answers."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self._data.parent,
            "max_connections": 200,
            "fsync": "off",  # nobody pulls the plug on a test
            "deadlock_timeout": "200ms",
        }
        arguments = [text for name, value in options.items() for text in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", self._data, *arguments]
        log = self._data.parent / "postgres.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=self._data.parent, preexec_fn=_end_with_parent, **self._who
            )
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url()):
                return
            time.sleep(0.05)
        raise RuntimeError(f"PostgreSQL is not ready: {log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """End it at once, without waiting for clients."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        self._process = None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Away for the length of the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()


def find_postgres() -> Path | None:
    """Directory of the newest PostgreSQL's programs; None when there is none."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    found = str(debian[-1]) if debian else shutil.which("postgres")
    return Path(found).parent if found else None


@contextlib.contextmanager
def run_postgres(programs: Path) -> Iterator[PostgresServer]:
    """Run a server over a new data directory until the block ends."""
    # Not below pytest's directory, which only this user may enter: the server refuses to be root.
    place = Path(tempfile.mkdtemp(prefix="hone-postgres-"))
    data, password = place / "data", secrets.token_hex(8)
    (place / "password").write_text(password)
    who = _unprivileged(place)
    try:
        subprocess.run(
            [programs / "initdb", "--pgdata", data, "--username=hone", "--auth=scram-sha-256", "--encoding=UTF8",
             "--locale=C", "--no-sync", f"--pwfile={place / 'password'}"],
            check=True, capture_output=True, cwd=place, **who,
        )  # fmt: skip
        server = PostgresServer(programs, data, password, who)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _end_with_parent() -> None:
    """Stop at once when the tests are killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def _unprivileged(place: Path) -> Mapping[str, Any]:
    """Arguments of Popen that make root somebody else, who then owns the place."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    found = names.get("postgres") or names["nobody"]
    for path in (place, *place.iterdir()):
        os.chown(path, found.pw_uid, found.pw_gid)
    return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
