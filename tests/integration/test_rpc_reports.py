"""Reports over the wire: the trainer's own relay sends, and nobody reads its event file, as it is in a pod."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hone.job import EventType, State
from hone.rpc.client import Client

from .hone_server import MakeSpec, ServerProcess, end_runs, quick, running, wait_until
from .servers import free_port

_READS_NO_EVENTS = """
import asyncio
from dataclasses import replace

from hone.backends.local import LocalBackend
from hone.rpc.server import serve
from hone.settings import Settings

observe = LocalBackend.observe
LocalBackend.observe = lambda self, run, *, after_seq: replace(observe(self, run, after_seq=after_seq), events=())
asyncio.run(serve(Settings()))
"""


@pytest.fixture
def server(tmp_path: Path, quick_python: Path) -> Iterator[ServerProcess]:
    """A service whose backend sees how trainers end, and none of their events."""
    address = f"127.0.0.1:{free_port()}"
    settings = {"HONE_ADDRESS": address, "HONE_REPORT_ADDRESS": address}
    with running(ServerProcess(tmp_path / "home", quick_python, code=_READS_NO_EVENTS, **settings)) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
        end_runs(client)


def test_what_a_trainer_reports_is_recorded_once_and_in_order(client: Client, make_spec: MakeSpec) -> None:
    job = client.submit(quick(make_spec, steps=30, pause_ms=20))
    assert client.wait(job.id, timeout_s=60).state is State.SUCCEEDED
    told = [event for event in client.events(job.id) if event.attempt == 1]
    assert [event.step for event in told if event.type == EventType.PROGRESS] == list(range(1, 31))
    assert [event.fields["kind"] for event in told if event.type == EventType.OUTPUT] == ["adapter"]


def test_what_was_reported_while_no_service_ran_comes_after_its_restart(
    server: ServerProcess, client: Client, make_spec: MakeSpec
) -> None:
    job = client.submit(quick(make_spec, steps=60, pause_ms=50))
    wait_until(lambda: client.get(job.id).progress is not None)
    server.end(signal.SIGKILL)
    server.start()
    assert client.wait(job.id, timeout_s=60).state is State.SUCCEEDED
    steps = [event.step for event in client.events(job.id) if event.type == EventType.PROGRESS]
    assert steps == list(range(1, 61))
