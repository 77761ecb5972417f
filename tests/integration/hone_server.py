"""`hone serve` in a process of its own, for tests that talk to it, kill it and start it again; or in a thread, for
tests that decide who is let in."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hone.home import owner
from hone.rpc.client import Client
from hone.rpc.listening import EVERYBODY, Gates
from hone.rpc.server import Server
from hone.rpc.tls import server_credentials
from hone.service import Service, open_service
from hone.settings import Settings
from hone.spec import JobSpec

MakeSpec = Callable[..., JobSpec]
SERVE = "import asyncio; from hone.rpc.server import serve; from hone.settings import Settings; "
SERVE += "asyncio.run(serve(Settings()))"


class ServerProcess:
    """`hone serve`, on a port that is kept over restarts."""

    def __init__(self, home: Path, trainer_python: Path, *, code: str = SERVE, **settings: str) -> None:
        """`code` is what Python runs, `settings` are further variables of its environment."""
        self.home = home
        self._code = code
        self._environment = {
            **os.environ,
            "HONE_HOME": str(home),
            "HONE_TRAINER_PYTHON": str(trainer_python),
            "HONE_TEST_STARTS": str(home.parent / "starts"),
            **settings,
        }
        self._environment.pop("HONE_SERVER", None)
        self.address = settings.get("HONE_ADDRESS", "127.0.0.1:0")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        environment = {**self._environment, "HONE_ADDRESS": self.address}
        self._log = (self.home.parent / "server.log").open("ab")
        self.process = subprocess.Popen([sys.executable, "-c", self._code], env=environment, stderr=self._log)
        deadline = time.monotonic() + 30
        while not ((found := owner(self.home)) and found.pid == self.process.pid and found.address):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.02)
        self.address = found.address

    def end(self, number: signal.Signals) -> int:
        """Send it a signal and wait for its end; the answer is its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._log.close()
        return code

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return (self.home.parent / "server.log").read_text(encoding="utf-8")


class ServerThread:
    """A server in a thread of this process, with gates of the test's own."""

    def __init__(
        self,
        home: Path,
        *,
        gates: Callable[[], Gates] = lambda: EVERYBODY,
        pair: tuple[Path, Path] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """`gates` is called on the server's event loop; `pair` is its certificate and key."""
        self._settings = Settings(home=home)
        self._gates, self._host = gates, host
        self._credentials = server_credentials(*pair) if pair else None
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self.service: Service
        self.address = ""

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        gates = self._gates()
        with open_service(self._settings) as self.service:
            server = Server(self.service, gates=gates, heartbeat_s=0.2)
            self.address = await server.start(f"{self._host}:0", self._credentials)
            self._ready.set()
            await self._stop.wait()
            await server.drain()
        for gate in (gates.callers, gates.trainers):
            if gate:
                gate.close()


@contextmanager
def running(server: ServerProcess) -> Iterator[ServerProcess]:
    """Start a server, and end it with the block."""
    server.start()
    try:
        yield server
    finally:
        if server.process and server.process.poll() is None:
            server.end(signal.SIGTERM)


def end_runs(client: Client) -> None:
    """Leave nothing behind that trains on."""
    for job in client.list(filter="state != SUCCEEDED AND state != FAILED AND state != CANCELLED"):
        client.cancel(job.id)
        client.wait(job.id, timeout_s=30)


def quick(make_spec: MakeSpec, *, steps: int = 3, pause_ms: int = 5, **changes: Any) -> JobSpec:
    """A request for the trainer that trains nothing."""
    labels = {"steps": str(steps), "pause_ms": str(pause_ms), **changes.pop("labels", {})}
    return make_spec(labels=labels, **changes)


def stub_of(client: Client) -> Any:
    """The client's own stub, for requests that the client would not send."""
    return client._stub


def wait_until(true: Callable[[], bool], *, timeout_s: float = 120.0) -> None:
    """Wait for something that will come to be true."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
