"""The files of a run directory, read from outside: does the trainer live, what did it say, how did it end.

Called by local.py. The trainer's lock says whether it lives (a process id alone could be another's by now).
"""

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hone.job import Event, EventType, Failure
from hone.run import RunDirectory

MAX_EVENTS = 1000
"""Events of one look."""
LOG_TAIL_LINES = 20
_TAIL_BYTES = 64 * 1024
_CHUNK_BYTES = 256 * 1024

_FAILURE = TypeAdapter(Failure)


@dataclass(frozen=True)
class TrainerProcess:
    """Who runs the attempt, as the trainer wrote it down once it held the lock."""

    pid: int
    start_ticks: int
    nonce: str
    time: datetime

    @property
    def is_alive(self) -> bool:
        """Whether the process of this id is still the one that wrote this."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return False
        state, *fields = stat.rpartition(")")[2].split()
        return state not in "ZX" and int(fields[18]) == self.start_ticks  # a zombie only waits for its parent


@dataclass(frozen=True)
class Ending:
    """What the trainer wrote last."""

    exit_code: int
    failure: Failure | None
    time: datetime


def read_process(directory: RunDirectory) -> TrainerProcess | None:
    """Who runs it, or ran it; None before the trainer came so far."""
    data = read_json(directory.process)
    if data is None:
        return None
    time = datetime.fromtimestamp(directory.process.stat().st_mtime, UTC)
    return TrainerProcess(int(data["pid"]), int(data["start_time"]), str(data["nonce"]), time)


def read_ending(directory: RunDirectory) -> Ending | None:
    """How it ended, when it could still say so."""
    data = read_json(directory.exit)
    if data is None:
        return None
    failure = _FAILURE.validate_python(data["failure"]) if data.get("failure") else None
    return Ending(int(data["exit_code"]), failure, datetime.fromisoformat(data["end_time"]))


def is_locked(directory: RunDirectory) -> bool:
    """Whether the trainer holds its lock. Asked only once process.json is there: before, asking could be in its way."""
    try:
        with directory.lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except FileNotFoundError:
        return False


def claim(directory: RunDirectory, nonce: str) -> bool:
    """Take an attempt's directory so that no trainer can start in it any more; False when one is there already."""
    with directory.lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if directory.process.exists():
            return False
        write_json(directory.process, {"pid": 0, "start_time": 0, "nonce": nonce})
        return True


class EventReader:
    """Reads event files on from a line; remembers where that line began, and is right without it."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[int, int]] = {}

    def read(self, path: Path, *, after_seq: int) -> tuple[Event, ...]:
        """The next events after that line, at most MAX_EVENTS. A line without its end is not one yet."""
        found: list[Event] = []
        try:
            with path.open("rb") as file:
                seq, offset = self._known.get(path, (0, 0))
                if seq > after_seq:
                    seq, offset = 0, 0
                file.seek(offset)
                while len(found) < MAX_EVENTS and (line := file.readline()).endswith(b"\n"):
                    seq, offset = seq + 1, offset + len(line)
                    if seq > after_seq:
                        found.append(parse_event(line, seq))
                    else:
                        self._known[path] = (seq, offset)
        except FileNotFoundError:
            return ()
        return tuple(found)

    def forget(self, path: Path) -> None:
        """The file is gone."""
        self._known.pop(path, None)


def parse_event(line: bytes, seq: int) -> Event:
    """One line as an event; one that cannot be read becomes a warning, so that the numbers stay those of the lines."""
    try:
        data = json.loads(line)
        return Event(
            seq=seq,
            time=datetime.fromisoformat(data["time"]),
            type=str(data["type"]),
            message=str(data.get("message", "")),
            step=None if data.get("step") is None else int(data["step"]),
            metrics={str(name): float(value) for name, value in data.get("metrics", {}).items()},
            fields={str(name): str(value) for name, value in data.get("fields", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        shown = line[:200].decode("utf-8", "replace").strip()
        message = f"Line {seq} of the trainer's events cannot be read: {shown}"
        return Event(seq=seq, time=datetime.now(UTC), type=EventType.WARNING, message=message)


def last_step(path: Path) -> tuple[int, int] | None:
    """(step, of how many) of the last progress that was reported; 0 for a total that nobody told."""
    for line in reversed(_last_lines(path)):
        event = parse_event(line, 0)
        if event.type == EventType.PROGRESS and event.step is not None:
            return event.step, int(event.metrics.get("max_steps", 0))
    return None


def log_tail(directory: RunDirectory) -> tuple[str, ...]:
    """The last lines that the first rank wrote, or the trainer where no rank wrote any."""
    for path in (directory.log(0), directory.trainer_log):
        if lines := _last_lines(path):
            return tuple(line.decode("utf-8", "replace").rstrip() for line in lines[-LOG_TAIL_LINES:])
    return ()


def read_log(path: Path, *, tail: int | None, offset: int) -> Iterator[bytes]:
    """A log in chunks, from a byte on; of that the last lines only, where asked. Nothing where there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        start = offset if tail is None else max(offset, _start_of_tail(file, tail, end))
        file.seek(start)
        while start < end and (chunk := file.read(min(_CHUNK_BYTES, end - start))):
            start += len(chunk)
            yield chunk


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def write_json(path: Path, data: Any) -> None:
    """Write a small file so that it is there whole or not at all."""
    write_text(path, json.dumps(data))


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _start_of_tail(file: Any, lines: int, end: int) -> int:
    """Where the last `lines` lines begin; a newline at the very end ends the last line."""
    position, wanted, data = end, lines + 1, b""
    while position > 0 and data.count(b"\n") < wanted:
        step = min(_TAIL_BYTES, position)
        position -= step
        file.seek(position)
        data = file.read(step) + data
    if lines <= 0:
        return end
    body = data[:-1] if data.endswith(b"\n") else data
    parts = body.split(b"\n")
    if len(parts) <= lines:
        return position
    kept = parts[-lines:]
    return end - (len(data) - len(body)) - sum(len(part) for part in kept) - (lines - 1)


def _last_lines(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().splitlines()
    except FileNotFoundError:
        return []
