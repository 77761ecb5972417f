"""Reporting: events to the run's file, and from there to whoever listens.

Workers and supervisor append to one file, each event by one write. The supervisor's Relay follows that file: to its own
stdout (which is what `kubectl logs` shows), and to the service where HONE_REPORT_ADDRESS names one. Nothing here can
stop
or slow a training run.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from hone.errors import HoneError
from hone.job import Event, EventType
from hone.run import Run

POLL_S = 0.2
MAX_BATCH = 500
_LONGEST_PAUSE_S = 30.0


class EventLog:
    """The append-only file of one attempt. Any process of the run may write; a line is whole or absent."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(
        self,
        kind: EventType,
        message: str = "",
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        """Append one event, stamped with the time."""
        record = {
            "time": datetime.now(UTC).isoformat(),
            "type": str(kind),
            "message": message,
            "step": step,
            "metrics": dict(metrics or {}),
            "fields": dict(fields or {}),
        }
        os.write(self._descriptor, (json.dumps(record, ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)


def parse_event(line: bytes, seq: int) -> Event:
    """One line of the file as the record that everybody shares."""
    data = json.loads(line)
    return Event(
        seq=seq,
        time=datetime.fromisoformat(data["time"]),
        type=data["type"],
        message=data["message"],
        step=data["step"],
        metrics=data["metrics"],
        fields=data["fields"],
    )


Send = Callable[[Sequence[Event]], int]
"""Hands events to the service; the answer is the last seq that it has. Raises HoneError when it cannot be reached."""


def sender(address: str | None, run: Run) -> Send | None:
    """How to reach the service that listens at this address; None where nobody does."""
    if not address:
        return None

    def send(events: Sequence[Event]) -> int:
        from hone.rpc.report import send  # late: grpc is needed only where a service listens

        return int(send(address, run, events))

    return send


class Relay:
    """Follows the event file in a thread of the supervisor; `close` hands on what is left."""

    def __init__(self, path: Path, *, send: Send | None) -> None:
        self._path = path
        self._send = send
        self._stop = threading.Event()
        self._printed = 0
        self._unacknowledged: list[Event] = []
        self._rest = b""
        self._offset = 0
        self._next_try = 0.0
        self._pause_s = 1.0
        self._thread = threading.Thread(target=self._follow, name="relay", daemon=True)
        self._thread.start()

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Read to the end, send for at most `timeout_s`, and stop."""
        self._stop.set()
        self._thread.join()
        deadline = time.monotonic() + timeout_s
        self._read()
        while self._unacknowledged and time.monotonic() < deadline:
            self._next_try = 0.0
            if not self._send_batch():
                time.sleep(POLL_S)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._read()
            if self._unacknowledged and time.monotonic() >= self._next_try:
                self._send_batch()

    def _read(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._printed += 1
            sys.stdout.write(line.decode() + "\n")
            if self._send:
                self._unacknowledged.append(parse_event(line, self._printed))
        sys.stdout.flush()

    def _send_batch(self) -> bool:
        """Send one batch; what is not acknowledged is sent again later, less and less often."""
        assert self._send is not None
        batch = self._unacknowledged[:MAX_BATCH]
        try:
            acknowledged = self._send(batch)
        except HoneError as error:
            sys.stderr.write(f"report: {error}\n")
            self._next_try = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return False
        self._pause_s = 1.0
        self._unacknowledged = [event for event in self._unacknowledged if event.seq > acknowledged]
        return True
