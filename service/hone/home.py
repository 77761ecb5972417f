"""Who owns a HONE_HOME: the one process whose service works in it. The lock ends with its holder: it is the kernel's.

Called by service.py, which takes it, and by clients, which look for the address. Imports nothing heavy: a client
must not load the service to find one.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hone.errors import StorageError, WrongState

_LOCK_PATIENCE_S = 0.5
"""Whoever asks for the owner holds the lock for a moment, too."""


@dataclass(frozen=True)
class Owner:
    """Who owns a home."""

    pid: int
    address: str
    """Where it listens; empty as long as it does not."""


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
def own(home: Path) -> Iterator[IO[str]]:
    """Own a home until the end of the block. Raises WrongState when another does, StorageError when it cannot be."""
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
        write_owner(file, "")
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


def write_owner(file: IO[str], address: str) -> None:
    """Put down this process and where it listens."""
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
