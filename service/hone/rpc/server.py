"""The life of the gRPC server: listen, serve, drain. `serve` is `hone serve`; LocalService is the same in this process.

What other machines can reach is served with a certificate and to known callers only; loopback and unix sockets may be
plain text, for everybody on this machine.
"""

import asyncio
import contextlib
import logging
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hone import logs
from hone.errors import Unavailable
from hone.monitor import CLUSTER, Check, Monitor, Sources
from hone.rpc.answers import KEPT_S
from hone.rpc.channel import server_options, split_address
from hone.rpc.feed import HEARTBEAT_S
from hone.rpc.handlers import handlers
from hone.rpc.listening import EVERYBODY, Gates, Listening, grpc_address, open_gates
from hone.rpc.services import ReportService, TrainingService
from hone.service import Service, open_service
from hone.settings import Settings
from hone.v1 import report_service_pb2, training_service_pb2

DRAIN_S = 5.0
"""Calls that are under way when the service is stopped have so long to finish."""
LOOK_S = 5.0
"""Between two looks at what the service needs, for grpc.health.v1."""
LOOP_TURNS_S = 3.0
"""How long the event loop may take to answer before the process counts as stuck."""

_TRAINING = training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"]
_REPORT = report_service_pb2.DESCRIPTOR.services_by_name["ReportService"]
_NAMES = (_TRAINING.full_name, _REPORT.full_name)

_log = logging.getLogger(__name__)


class Server:
    """One gRPC server over an open service. Lives on one event loop."""

    def __init__(self, service: Service, *, gates: Gates = EVERYBODY, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._service = service
        self._asks_kubernetes = gates.callers is not None
        self._training = TrainingService(service.jobs, service.store, heartbeat_s=heartbeat_s)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=server_options())
        self._looking: asyncio.Task[None] | None = None
        self._is_stopping = False
        report = ReportService(service.jobs)
        self._server.add_generic_rpc_handlers(
            (
                handlers(_TRAINING, self._training.methods, gates.callers),
                handlers(_REPORT, report.methods, gates.trainers),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> str:
        """Listen; the answer is the address with the port that was taken. Raises UserError, or Unavailable when the
        port is taken."""
        where = grpc_address(address)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(where)
            else:
                port = self._server.add_secure_port(where, credentials)
        except RuntimeError as error:
            raise _taken(address) from error
        if not port:
            raise _taken(address)
        await self._server.start()
        await self._tell_health(is_serving=True)
        self._looking = asyncio.get_running_loop().create_task(self._look())
        return where if where.startswith("unix:") else f"{where.rpartition(':')[0]}:{port}"

    def checks(self) -> list[Check]:
        """What is needed to serve, and whether it is there; may wait for what does not answer."""
        stopping = Check(name="service", is_well=False, text="it is stopping")
        return [*self._service.checks(), *([stopping] if self._is_stopping else [])]

    def counts(self) -> Mapping[tuple[str, str], int]:
        """(namespace, state) → number of jobs."""
        return self._service.store.counts()

    async def drain(self) -> None:
        """Say that no more is served, end the streams (callers resume them), let calls under way finish, stop."""
        self._is_stopping = True
        if self._looking:
            self._looking.cancel()
        await self._health.enter_graceful_shutdown()
        self._training.feeds.close()
        await self._server.stop(DRAIN_S)
        self._training.close()

    async def _look(self) -> None:
        """Keep grpc.health.v1 true."""
        while True:
            await asyncio.sleep(LOOK_S)
            found = await asyncio.to_thread(self._service.checks)
            await self._tell_health(is_serving=not any(self._prevents(check) for check in found))

    def _prevents(self, check: Check) -> bool:
        """Whether nobody can be served. Callers who were looked up before the cluster went away are, for a while."""
        if check.is_well or check.is_needed:
            return not check.is_well
        since = check.since or datetime.now(UTC)
        is_over = (datetime.now(UTC) - since).total_seconds() > KEPT_S
        return self._asks_kubernetes and check.name == CLUSTER and is_over

    async def _tell_health(self, *, is_serving: bool) -> None:
        kinds = health_pb2.HealthCheckResponse
        for name in ("", *_NAMES):
            await self._health.set(name, kinds.SERVING if is_serving else kinds.NOT_SERVING)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises what stops the start: another service owns the home, the port is taken."""
    logs.configure(settings.log_level, as_json=settings.log_format == "json")
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    listening = Listening.of(settings)
    with open_service(settings) as service, open_gates(service, listening) as gates:
        server = Server(service, gates=gates)
        with _monitor(settings.http_address, server, loop):
            try:
                address = await server.start(listening.address, listening.credentials)
                service.announce(address)
                _log.info("listening on %s, %s", address, listening.manner)
                await stopped.wait()
                _log.info("stopping; runs go on, and are found again at the next start")
            finally:
                await server.drain()


class LocalService:
    """A service in this process, behind a unix socket that nobody else can reach; ends with the `with` block.

        with LocalService() as local, Client(local.address) as client: ...

    Raises WrongState on entering when another service owns the home.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._started: Future[str] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="hone-local-service", daemon=True)
        self.address = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self.address = self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            try:
                self._loop.run_until_complete(self._serve())
            except BaseException as error:
                if self._started.done():
                    raise
                self._started.set_exception(error)

    async def _serve(self) -> None:
        # Not below home: a unix socket's path has at most 107 characters.
        with tempfile.TemporaryDirectory(prefix="hone-") as directory, open_service(self._settings) as service:
            server = Server(service)
            try:
                address = await server.start(f"unix:{Path(directory) / 'hone.sock'}")
                service.announce(address)
                self._started.set_result(address)
                await self._stop.wait()
            finally:
                await server.drain()


@contextlib.contextmanager
def _monitor(address: str, server: Server, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Probes and metrics over HTTP, where an address is set."""
    if not address:
        yield
        return
    sources = Sources(checks=server.checks, counts=server.counts, is_alive=lambda: _turns(loop))
    monitor = Monitor(*split_address(address), sources)
    _log.info("telling health and metrics on http://%s", monitor.address)
    try:
        yield
    finally:
        monitor.stop()


def _turns(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the event loop still does its work."""
    turn = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop)
    try:
        turn.result(LOOP_TURNS_S)
    except TimeoutError:
        turn.cancel()
        return False
    return True


def _taken(address: str) -> Unavailable:
    return Unavailable(
        f"Cannot listen on {address}: something else does.",
        fix="Stop it, or choose another port: hone serve --address 127.0.0.1:7466 (or HONE_ADDRESS).",
    )
