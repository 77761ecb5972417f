"""Reporting: events to the run's file, and from there to whoever listens.

Workers and supervisor append to one file, each event by one write. The supervisor's Printer follows that file, and the
ranks' logs, to its own stdout, which is what `kubectl logs` shows; its Relay follows it to the service where
HONE_REPORT_ADDRESS names one. Nothing here can stop or slow a training run: not a closed or stuck stdout, not a service
that is gone for days.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from hone.errors import HoneError, UserError
from hone.job import Event, EventType
from hone.run import Run
from hone_trainer.scrub import Scrubber

POLL_S = 0.2
MAX_TEXT = 64 * 1024
"""Characters of one text of an event; more is cut, so that a batch always fits one request."""
MAX_BATCH = 500
MAX_BATCH_BYTES = 1 << 20
MAX_LINE_BYTES = 8 * 1024
"""Of a rank's log: containerd cuts at 16 KiB, and a progress bar has no line end at all."""
LONGEST_PAUSE_S = 30.0
"""Between two tries at a service that does not answer."""
REFUSED_PAUSE_S = 60.0
"""Between two tries at a service that refuses, which is not to be expected to change its mind."""


class EventLog:
    """The append-only file of one attempt. Any process of the run may write; a line is whole or absent."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._scrubber = Scrubber(os.environ)

    def write(
        self,
        kind: EventType,
        message: str = "",
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        """Append one event, stamped with the time; secrets are taken out, and a text of many pages is cut."""
        record = {
            "time": datetime.now(UTC).isoformat(),
            "type": str(kind),
            "message": self._text(message),
            "step": step,
            "metrics": dict(metrics or {}),
            "fields": {name: self._text(text) for name, text in (fields or {}).items()},
        }
        os.write(self._descriptor, (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)

    def _text(self, text: str) -> str:
        text = self._scrubber.text(text[: 2 * MAX_TEXT])  # cut before and after: no half of a secret is left at the end
        return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


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


def last_checkpoint(path: Path) -> dict[str, Any] | None:
    """The newest event of the file that tells of a checkpoint, as it is printed: with its `seq`."""
    newest = None
    with suppress(FileNotFoundError), path.open("rb") as file:
        for seq, line in enumerate(file, start=1):
            if b'"checkpoint"' in line and (data := json.loads(line))["type"] == EventType.CHECKPOINT:
                newest = {"seq": seq, **data}
    return newest


def say(text: str) -> None:
    """The supervisor's own words, as a plain line of its stderr."""
    _write_all(2, (Scrubber(os.environ).text(text) + "\n").encode("utf-8", "replace"))


def _write_all(descriptor: int, data: bytes) -> bool:
    """Whether somebody takes it; False once the other end is closed."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        return False
    return True


class Printer:
    """Follows the event file, and logs, to stdout in a thread of the supervisor.

    An event is its JSON line with its `seq`, the line's number; a line of a log has the log's prefix. When stdout is
    closed nothing is printed any more, and when it is stuck `close` does not wait for it.
    """

    def __init__(self, events: Path, *, logs: Mapping[str, Path] | None = None, descriptor: int = 1) -> None:
        self._events = Lines(events)
        self._logs = {prefix.encode(): Lines(path, is_log=True) for prefix, path in (logs or {}).items()}
        self._descriptor = descriptor
        self._printed = 0
        self._scrubber = Scrubber(os.environ)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="printer", daemon=True)
        self._thread.start()

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Print what is left, and stop."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _follow(self) -> None:
        while True:
            stopped = self._stop.wait(POLL_S)
            text = b"".join(self._found(last=stopped))
            if text and not _write_all(self._descriptor, text):
                return
            if stopped and not text:
                return

    def _found(self, *, last: bool) -> Iterator[bytes]:
        for prefix, lines in self._logs.items():
            for line in filter(None, lines.read(last=last)):
                scrubbed = self._scrubber.text(line.decode("utf-8", "replace"))
                yield prefix + scrubbed.encode() + b"\n"
        for line in self._events.read(last=False):
            self._printed += 1
            yield b'{"seq": %d, ' % self._printed + line.removeprefix(b"{") + b"\n"


class Lines:
    """The lines of a growing file, each once."""

    def __init__(self, path: Path, *, is_log: bool = False) -> None:
        self._path, self._is_log = path, is_log
        self._offset = 0
        self._rest = b""

    def read(self, *, last: bool) -> list[bytes]:
        """What has come since the last call; a line without its end only when nothing follows any more."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(MAX_BATCH_BYTES)
        except FileNotFoundError:
            return []
        self._offset += len(data)
        data = self._rest + data
        if self._is_log:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = data.split(b"\n")
        if self._is_log:
            lines = [piece for line in lines for piece in _pieces(line)]
            if self._rest and (last or len(self._rest) > MAX_LINE_BYTES):
                lines += _pieces(self._rest)
                self._rest = b""
        return lines


def _pieces(line: bytes) -> list[bytes]:
    return [line[start : start + MAX_LINE_BYTES] for start in range(0, max(len(line), 1), MAX_LINE_BYTES)]


class Sender(Protocol):
    """Hands events to the service."""

    def send(self, events: Sequence[Event], *, timeout_s: float) -> int:
        """The answer is the last seq that it has recorded. Raises HoneError when it cannot be reached."""

    def close(self) -> None:
        """Give the connection back."""


def sender(environment: Mapping[str, str], run: Run) -> Sender | None:
    """How to reach the service that the environment names; None where nobody listens."""
    address = environment.get("HONE_REPORT_ADDRESS")
    if not address:
        return None
    from hone.rpc.report import Reporter

    files = {
        "token_file": environment.get("HONE_REPORT_TOKEN_FILE"),
        "ca_file": environment.get("HONE_REPORT_CA_FILE"),
    }
    given: dict[str, Any] = {name: Path(path) for name, path in files.items() if path}
    return Reporter(address, run, **given)


class Relay:
    """Follows the event file to the service, in a thread of the supervisor.

    What is not acknowledged stays in the file and is read again, so memory does not grow while nobody listens.
    """

    def __init__(self, path: Path, send: Sender, *, timeout_s: float = 10.0) -> None:
        """`timeout_s`: how long `close` goes on trying."""
        self._path, self._send, self._timeout_s = path, send, timeout_s
        self._acknowledged = 0
        self._offset = 0
        """Where the first line that is not acknowledged begins."""
        self._pause_s = 1.0
        self._refusal = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, for a bounded time, and stop."""
        self._stop.set()
        self._thread.join(self._timeout_s + 1.0)

    def _follow(self) -> None:
        next_try = 0.0
        while not self._stop.wait(POLL_S):
            if time.monotonic() >= next_try:
                next_try = time.monotonic() + self._send_batch(timeout_s=self._timeout_s)
        self._send_rest(deadline=time.monotonic() + self._timeout_s)
        self._send.close()

    def _send_rest(self, *, deadline: float) -> None:
        while self._batch()[0] and (left := deadline - time.monotonic()) > 0:
            pause = self._send_batch(timeout_s=left)
            if pause == REFUSED_PAUSE_S:
                return
            time.sleep(min(pause, POLL_S))

    def _send_batch(self, *, timeout_s: float) -> float:
        """Send one batch; the answer is how long to wait after a failure, longer and longer."""
        events, ends = self._batch()
        if not events:
            return 0.0
        try:
            acknowledged = self._send.send(events, timeout_s=timeout_s)
        except HoneError as error:
            return self._pause_after(error)
        self._pause_s, self._refusal = 1.0, ""
        taken = min(acknowledged - self._acknowledged, len(events))
        if taken <= 0:
            return POLL_S
        self._acknowledged, self._offset = self._acknowledged + taken, ends[taken - 1]
        return 0.0

    def _pause_after(self, error: HoneError) -> float:
        if str(error) != self._refusal:  # said once, however often it is tried
            say(f"report: {error}")
            self._refusal = str(error)
        if isinstance(error, UserError):
            return REFUSED_PAUSE_S
        pause, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause

    def _batch(self) -> tuple[list[Event], list[int]]:
        """The next events that are not acknowledged, and where the line of each ends."""
        events: list[Event] = []
        ends: list[int] = []
        try:
            with self._path.open("rb") as file:
                end = file.seek(self._offset)
                while len(events) < MAX_BATCH and end - self._offset < MAX_BATCH_BYTES:
                    line = file.readline()
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    events.append(parse_event(line, self._acknowledged + len(events) + 1))
                    ends.append(end)
        except FileNotFoundError:
            pass
        return events, ends
