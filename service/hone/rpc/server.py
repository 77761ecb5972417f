"""The life of the gRPC server: listen, serve, drain. `serve` is `hone serve`; LocalService is the same in this process.

Plain text without authentication, so on loopback and unix sockets only.
"""

import asyncio
import contextlib
import logging
import signal
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hone.errors import Unavailable, UserError
from hone.rpc.channel import is_local, server_options, split_address
from hone.rpc.services import ReportService, TrainingService, handlers
from hone.service import Service, open_service
from hone.settings import Settings
from hone.v1 import report_service_pb2, training_service_pb2

DRAIN_S = 5.0
"""Calls that are under way when the service is stopped have so long to finish."""

_TRAINING = training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"]
_REPORT = report_service_pb2.DESCRIPTOR.services_by_name["ReportService"]
_NAMES = (_TRAINING.full_name, _REPORT.full_name)

_log = logging.getLogger(__name__)


class Server:
    """One gRPC server over an open service. Lives on one event loop."""

    def __init__(self, service: Service) -> None:
        self._training = TrainingService(service.jobs, service.store)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=server_options())
        report = ReportService(service.jobs)
        self._server.add_generic_rpc_handlers(
            (handlers(_TRAINING, self._training.methods), handlers(_REPORT, report.methods))
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, address: str) -> str:
        """Listen; the answer is the address with the port that was taken. Raises UserError, or Unavailable when the
        port is taken."""
        where = _listen_address(address)
        try:
            port = self._server.add_insecure_port(where)
        except RuntimeError as error:
            raise _taken(address) from error
        if not port:
            raise _taken(address)
        await self._server.start()
        for name in ("", *_NAMES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return where if where.startswith("unix:") else f"{where.rpartition(':')[0]}:{port}"

    async def drain(self) -> None:
        """Say that no more is served, end the streams (callers resume them), let calls under way finish, stop."""
        await self._health.enter_graceful_shutdown()
        self._training.feeds.close()
        await self._server.stop(DRAIN_S)
        self._training.close()


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises what stops the start: another service owns the home, the port is taken."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("hone").setLevel(settings.log_level.upper())
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    with open_service(settings) as service:
        server = Server(service)
        try:
            address = await server.start(settings.address)
            service.announce(address)
            _log.info("listening on %s, plain text and without authentication, for this machine only", address)
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


def _listen_address(address: str) -> str:
    if not is_local(address):
        raise UserError(
            f"{address} can be reached from other machines, and this version serves plain text without authentication.",
            fix="Listen on 127.0.0.1:7465, and let callers forward a port: ssh -L 7465:127.0.0.1:7465 <this machine>.",
        )
    if address.startswith("unix:"):
        return address
    host, port = split_address(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _taken(address: str) -> Unavailable:
    return Unavailable(
        f"Cannot listen on {address}: something else does.",
        fix="Stop it, or choose another port: hone serve --address 127.0.0.1:7466 (or HONE_ADDRESS).",
    )
