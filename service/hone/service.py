"""The service, put together: store, artefacts, local backend, use cases, reconciler; one for each HONE_HOME.

`hone serve` and `hone run` both open it. Who is first owns the home until the process ends, however it ends: the lock
is the kernel's.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hone.backends.local import LocalBackend
from hone.errors import StorageError, WrongState
from hone.jobs import Jobs
from hone.machine import look, plan_here
from hone.reconcile import Reconciler
from hone.settings import Settings
from hone.storage import open_store
from hone.store import Store

_LOCK_PATIENCE_S = 0.5
"""Whoever asks for the owner holds the lock for a moment, too."""


@dataclass(frozen=True)
class Owner:
    """Who owns a home."""

    pid: int
    address: str
    """Where it listens; empty as long as it does not."""


class Service:
    """What `open_service` gives: everything that rpc/ needs."""

    def __init__(self, *, jobs: Jobs, store: Store, reconciler: Reconciler, lock: IO[str]) -> None:
        self.jobs = jobs
        self.store = store
        self.reconciler = reconciler
        self._lock = lock

    def announce(self, address: str) -> None:
        """Tell who looks at the home where this service listens."""
        _write_owner(self._lock, address)


@contextmanager
def open_service(settings: Settings) -> Iterator[Service]:
    """Own the home, and run the service in it until the end of the block. Runs that it started go on after that.

    Raises WrongState when another process owns the home, StorageError when it cannot be written, and what is wrong
    with the database or the address of the artefact store.
    """
    with ExitStack() as stack:
        lock = stack.enter_context(_own(settings.home))
        artifacts = open_store(settings.store_uri, endpoint=settings.store_endpoint or None)
        stack.callback(artifacts.close)
        store = Store(settings.database_url)
        stack.callback(store.close)
        hardware = look(settings.gpu_profiles)
        backend = LocalBackend(
            settings.home / "runs",
            hardware=hardware,
            trainer_python=settings.trainer_python,
            environment={"AWS_ENDPOINT_URL_S3": settings.store_endpoint} if settings.store_endpoint else {},
        )
        stack.callback(backend.close)
        jobs = Jobs(store, backend, artifacts, planner=lambda spec: plan_here(spec, hardware))
        reconciler = Reconciler(store, backend, artifacts, grace_s=settings.grace_s)
        reconciler.start()
        stack.callback(reconciler.stop)
        yield Service(jobs=jobs, store=store, reconciler=reconciler, lock=lock)


def owner(home: Path) -> Owner | None:
    """Who owns a home now; None when nobody does."""
    try:
        with (home / "hone.lock").open(encoding="utf-8") as file:
            if _try_lock(file, fcntl.LOCK_SH):
                return None
            return _read_owner(file)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def _own(home: Path) -> Iterator[IO[str]]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(home / "hone.lock", os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{home} cannot be written: {error.strerror}.", fix="Set HONE_HOME to a directory of your own."
        ) from error
    with file:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while not _try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise _owned(home, _read_owner(file))
            time.sleep(0.02)
        _write_owner(file, "")
        yield file
        file.truncate(0)


def _owned(home: Path, other: Owner) -> WrongState:
    where = f" and listens on {other.address}" if other.address else ""
    fix = f"Send requests there (HONE_SERVER={other.address})" if other.address else "Stop that one"
    return WrongState(
        f"Another Hone service (process {other.pid}) owns {home}{where}.", fix=f"{fix}, or use another HONE_HOME."
    )


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_owner(file: IO[str], address: str) -> None:
    text = json.dumps({"pid": os.getpid(), "address": address})
    # One write, always of the same length: a reader sees this or what was there before.
    os.pwrite(file.fileno(), text.ljust(512).encode(), 0)


def _read_owner(file: IO[str]) -> Owner:
    file.seek(0)
    try:
        data = json.loads(file.read())
        return Owner(pid=int(data["pid"]), address=str(data["address"]))
    except (ValueError, KeyError):
        return Owner(pid=0, address="")
