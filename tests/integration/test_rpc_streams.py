"""Streams that say nothing for long: over a real server in this process, whose heartbeat is short."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc

from hone.rpc.server import Server
from hone.service import open_service
from hone.settings import Settings
from hone.v1 import training_service_pb2 as pb
from hone.v1 import training_service_pb2_grpc

from .hone_server import MakeSpec, quick

HEARTBEAT_S = 0.2


def serve_and(home: Path, body: Callable[[Any, Any], Awaitable[None]]) -> None:
    """Run `body(service, stub)` beside a server whose watches have a short heartbeat."""

    async def run() -> None:
        with open_service(Settings(home=home)) as service:
            server = Server(service, heartbeat_s=HEARTBEAT_S)
            address = await server.start("127.0.0.1:0")
            try:
                async with grpc.aio.insecure_channel(address) as channel:
                    await body(service, training_service_pb2_grpc.TrainingServiceStub(channel))  # type: ignore[no-untyped-call]
            finally:
                await server.drain()

    asyncio.run(run())


def test_an_idle_watch_of_a_namespace_sends_heartbeats_that_hold_the_cursor(tmp_path: Path) -> None:
    async def watch(_: Any, stub: Any) -> None:
        stream = stub.WatchJobs(pb.WatchJobsRequest(parent="namespaces/default"))
        loop = asyncio.get_running_loop()
        times = []
        for _beat in range(3):
            answer = await stream.read()
            times.append(loop.time())
            assert (list(answer.events), answer.seq) == ([], 0)
        stream.cancel()
        assert all(later - earlier > HEARTBEAT_S / 2 for earlier, later in pairwise(times))

    serve_and(tmp_path / "home", watch)


def test_an_idle_watch_of_a_job_sends_them_too_and_events_of_others_move_its_cursor(
    tmp_path: Path, make_spec: MakeSpec, quick_python: Path
) -> None:
    async def watch(service: Any, stub: Any) -> None:
        # Two jobs that wait for no reconciler: the service is stopped short of running them.
        service.reconciler.stop()
        first = service.jobs.create("default", quick(make_spec))
        stream = stub.WatchJob(pb.WatchJobRequest(name=f"namespaces/default/jobs/{first.id}"))
        answer = await stream.read()
        assert [event.seq for event in answer.events] == [1]
        service.jobs.create("default", quick(make_spec))
        while answer.seq < 2:
            answer = await stream.read()
            assert not answer.events
        stream.cancel()

    serve_and(tmp_path / "home", watch)
