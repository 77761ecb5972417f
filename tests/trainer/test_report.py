import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hone.errors import Refused, Unavailable
from hone.job import Event, EventType
from hone_trainer.report import MAX_TEXT, EventLog, Printer, Relay, parse_event


class Listener:
    """A service that is down for its first calls, and then records what it is sent, at most two events of a batch."""

    def __init__(self, *, down_for: int = 0, refuses: bool = False) -> None:
        self.received: list[int] = []
        self.asked = 0
        self.closed = False
        self._down_for = down_for
        self._refuses = refuses

    def send(self, events: Sequence[Event], *, timeout_s: float) -> int:
        self.asked += 1
        if self._refuses:
            raise Refused("your token is of another pod")
        if self._down_for:
            self._down_for -= 1
            raise Unavailable("nobody answers")
        taken = [event.seq for event in events[:2]]
        self.received += taken
        return taken[-1]

    def close(self) -> None:
        self.closed = True


def write(path: Path, count: int) -> None:
    log = EventLog(path)
    for number in range(count):
        log.write(EventType.PROGRESS, "söme text", step=number, metrics={"loss": 0.5}, fields={"a": "b"})
    log.close()


def test_an_event_is_one_line_with_every_key(tmp_path: Path) -> None:
    write(tmp_path / "events.jsonl", 2)
    first, second = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert json.loads(first).keys() == {"time", "type", "message", "step", "metrics", "fields"}
    event = parse_event(second, 2)
    assert (event.seq, event.type, event.step, event.metrics, event.fields) == (
        2,
        "progress",
        1,
        {"loss": 0.5},
        {"a": "b"},
    )
    assert event.time.tzinfo is not None


def test_several_writers_never_mix_their_lines(tmp_path: Path) -> None:
    writers = [threading.Thread(target=write, args=(tmp_path / "events.jsonl", 200)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert len([parse_event(line, 1) for line in lines]) == 800


def test_an_event_holds_no_secret_and_no_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-hub-token")
    EventLog(tmp_path / "events.jsonl").write(
        EventType.NOTE, "with canary-hub-token", fields={"url": "https://x:canary-hub-token@y", "long": "x" * 10**6}
    )
    line = (tmp_path / "events.jsonl").read_bytes()
    assert b"canary" not in line
    assert len(parse_event(line, 1).fields["long"]) == MAX_TEXT


@pytest.mark.parametrize("down_for", [0, 2])
def test_events_are_sent_again_until_they_are_acknowledged(tmp_path: Path, down_for: int) -> None:
    path, listener = tmp_path / "events.jsonl", Listener(down_for=down_for)
    relay = Relay(path, listener)
    write(path, 7)
    relay.close()
    assert listener.received == [1, 2, 3, 4, 5, 6, 7]
    assert listener.closed


def test_a_service_that_never_answers_does_not_keep_the_run_from_ending(tmp_path: Path) -> None:
    path, listener = tmp_path / "events.jsonl", Listener(down_for=10**9)
    relay = Relay(path, listener, timeout_s=0.3)
    write(path, 1)
    began = time.monotonic()
    relay.close()
    assert time.monotonic() - began < 2
    assert listener.received == []
    assert listener.asked >= 1


def test_a_service_that_refuses_is_asked_once_at_the_end_and_told_of_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, listener = tmp_path / "events.jsonl", Listener(refuses=True)
    write(path, 3)
    relay = Relay(path, listener, timeout_s=30)
    began = time.monotonic()
    relay.close()
    assert time.monotonic() - began < 5
    assert listener.asked <= 2
    assert capfd.readouterr().err == "report: your token is of another pod\n"


def printed(descriptor: int, found: Callable[[bytes], bool]) -> bytes:
    """What came out of a pipe, read until it is enough."""
    text = b""
    while not found(text):
        text += os.read(descriptor, 65536)
    return text


def test_events_are_printed_with_their_number_and_logs_with_their_rank(tmp_path: Path) -> None:
    out, into = os.pipe()
    log = tmp_path / "rank-3.log"
    log.write_bytes("söme words\r\n 10%\r 90%\rdone\nno end".encode())
    printer = Printer(tmp_path / "events.jsonl", logs={"[rank 3] ": log}, descriptor=into)
    write(tmp_path / "events.jsonl", 2)
    printer.close()
    os.close(into)
    lines = os.read(out, 65536).decode().splitlines()
    assert [line for line in lines if not line.startswith("{")] == [
        "[rank 3] söme words",
        "[rank 3]  10%",
        "[rank 3]  90%",
        "[rank 3] done",
        "[rank 3] no end",
    ]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(event["seq"], event["step"]) for event in events] == [(1, 0), (2, 1)]
    assert events[0].keys() == {"seq", "time", "type", "message", "step", "metrics", "fields"}


def test_a_line_without_an_end_is_printed_in_pieces(tmp_path: Path) -> None:
    out, into = os.pipe()
    log = tmp_path / "log"
    log.write_bytes(b"x" * 20_000)
    printer = Printer(tmp_path / "events.jsonl", logs={"": log}, descriptor=into)
    assert [len(line) for line in printed(out, lambda text: text.count(b"\n") == 3).splitlines()] == [8192, 8192, 3616]
    printer.close()


def test_secrets_in_a_log_are_not_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    out, into = os.pipe()
    (tmp_path / "log").write_text("a library says canary-secret\n")
    Printer(tmp_path / "events.jsonl", logs={"": tmp_path / "log"}, descriptor=into).close()
    assert os.read(out, 65536) == b"a library says ***\n"


def test_a_closed_stdout_ends_the_printing_and_nothing_else(tmp_path: Path) -> None:
    out, into = os.pipe()
    os.close(out)
    printer = Printer(tmp_path / "events.jsonl", descriptor=into)
    write(tmp_path / "events.jsonl", 2)
    printer.close()
    os.close(into)


def test_a_stuck_stdout_is_not_waited_for(tmp_path: Path) -> None:
    _out, into = os.pipe()  # nobody reads
    printer = Printer(tmp_path / "events.jsonl", descriptor=into)
    log = EventLog(tmp_path / "events.jsonl")
    for _ in range(40):
        log.write(EventType.NOTE, "x" * 10_000)
    began = time.monotonic()
    printer.close(timeout_s=0.5)
    assert time.monotonic() - began < 3
