"""A pod's log: whose each line is, what is an event, what was lost, and times that sort."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

import pytest

from hone.backends.kubernetes.client import Api
from hone.backends.kubernetes.logs import TAIL_BYTES, PodLogs, _sortable, _split, _Tail, _with_gaps_told
from hone.backends.kubernetes.objects import ContainerView, PodView
from hone.errors import NotFound
from hone.job import Event, EventType

EVENT = json.dumps({"seq": 4, "time": "2026-11-24T12:00:00+00:00", "type": "note", "message": "x"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "whose", "text"),
    [
        (b"[rank 0] hello\n", 0, b"hello\n"),
        (b"[rank 13] [rank 2] quoted\n", 13, b"[rank 2] quoted\n"),
        (b"[rank 3] \n", 3, b"\n"),
        (b"[rank 3]\n", 3, b"\n"),
        (b"the trainer's own words\n", 8, b"the trainer's own words\n"),
        (b"[rank x] no mark\n", 8, b"[rank x] no mark\n"),
        (b'{"a": 1}\n', 8, b'{"a": 1}\n'),
        (b'{"seq": 1, broken\n', 8, b'{"seq": 1, broken\n'),
        (b'{"seq": "1", "type": "note", "time": ""}\n', 8, b'{"seq": "1", "type": "note", "time": ""}\n'),
        (EVENT, None, b""),
        (b"[rank 1] " + EVENT, 1, EVENT),  # a rank that prints what looks like one
    ],
)
def test_every_line_is_somebodys(line: bytes, whose: int | None, text: bytes) -> None:
    assert _split(line, 8) == (whose, text)


def test_what_is_missing_is_told_in_its_place() -> None:
    def event(seq: int) -> Event:
        return Event(seq=seq, time=datetime(2026, 11, 24, tzinfo=UTC), type=EventType.NOTE)

    told = list(_with_gaps_told([event(3), event(4), event(6)], 0))
    assert [found.seq for found in told] == [2, 3, 4, 5, 6]
    assert told[0].message.startswith("Events 1 to 2 of the attempt are lost")
    assert told[3].message.startswith("Event 5 of the attempt is lost") and told[3].type == EventType.WARNING
    assert [found.seq for found in _with_gaps_told([event(3)], 2)] == [3]


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_log_that_is_gone_leaves_the_checkpoint_that_the_status_tells_of(is_gone: bool) -> None:
    class Gone:
        def stream(self, path: str, query: dict[str, str]) -> None:
            raise NotFound(f"{path} is not there.")

    told = {**json.loads(EVENT), "type": "checkpoint", "step": 7}
    ended = ContainerView(ended_message=json.dumps({"message": "Stopped.", "checkpoint": told}))
    now = datetime(2026, 11, 24, tzinfo=UTC)
    pod = PodView(
        namespace="a", name="p", uid="u", version="1", owner="j", owner_uid="o", create_time=now, phase="Failed",
        trainer=ended, is_gone=is_gone,
    )  # fmt: skip
    logs = PodLogs(cast(Api, Gone()))
    lost, event = logs.events(pod, after_seq=1)
    assert (lost.seq, lost.type) == (3, EventType.WARNING)
    assert (event.seq, event.type, event.step) == (4, "checkpoint", 7)
    assert logs.events(pod, after_seq=4) == ()
    for message in ("", "no JSON", "[]", '{"checkpoint": 3}', '{"checkpoint": {"seq": "4"}}'):
        assert logs.events(replace(pod, trainer=replace(ended, ended_message=message)), after_seq=0) == ()


def test_times_sort_however_they_are_written() -> None:
    written = [
        b"2026-11-24T12:00:00Z",
        b"2026-11-24T12:00:00.000000001Z",
        b"2026-11-24T13:00:00.05+01:00",
        b"2026-11-24T12:00:00.5Z",
        b"2026-11-24T12:00:00.500000001Z",
        b"2026-11-24T07:00:01.25-05:00",
    ]
    sortable = [_sortable(stamp) for stamp in written]
    assert sortable == sorted(sortable) and len({len(stamp) for stamp in sortable}) == 1


def test_a_tail_holds_whole_lines_up_to_its_size() -> None:
    tail = _Tail()
    for number in range(20_000):
        tail.add(b"%0100d\n" % number)
    kept = tail.take()
    assert TAIL_BYTES - 101 < len(kept) <= TAIL_BYTES and kept.endswith(b"19999\n") and len(kept) % 101 == 0
    tail.add(b"y" * (2 * TAIL_BYTES))
    assert tail.take() == b"y" * TAIL_BYTES
