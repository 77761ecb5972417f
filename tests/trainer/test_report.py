import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from hone.errors import Unavailable
from hone.job import Event, EventType
from hone_trainer.report import EventLog, Relay, parse_event


class Listener:
    """A service that is down for its first calls, and then records what it is sent, in batches of at most two."""

    def __init__(self, *, down_for: int) -> None:
        self.received: list[int] = []
        self._down_for = down_for
        self.done = threading.Event()

    def send(self, events: Sequence[Event]) -> int:
        if self._down_for:
            self._down_for -= 1
            raise Unavailable("nobody answers")
        taken = [event.seq for event in events[:2]]
        self.received += taken
        return taken[-1]


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


@pytest.mark.parametrize("down_for", [0, 3])
def test_events_are_sent_again_until_they_are_acknowledged(
    tmp_path: Path, down_for: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path, listener = tmp_path / "events.jsonl", Listener(down_for=down_for)
    relay = Relay(path, send=listener.send)
    write(path, 7)
    relay.close()
    assert listener.received == [1, 2, 3, 4, 5, 6, 7]
    assert capsys.readouterr().out.encode() == path.read_bytes()


def test_a_service_that_never_answers_does_not_keep_the_run_from_ending(tmp_path: Path) -> None:
    path, listener = tmp_path / "events.jsonl", Listener(down_for=10**9)
    relay = Relay(path, send=listener.send)
    write(path, 1)
    relay.close(timeout_s=0.3)
    assert listener.received == []


def test_without_a_service_the_lines_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relay = Relay(tmp_path / "events.jsonl", send=None)
    write(tmp_path / "events.jsonl", 1)
    relay.close()
    assert capsys.readouterr().out.count("\n") == 1
