"""How the service is: what it needs, whether it has it, and since when not; over HTTP for probes and for Prometheus.

Called by rpc/server.py. /healthz says whether the process works at all, /readyz whether it can serve callers, with a
line for each thing; /metrics what metrics.py counts and how many jobs there are. A cluster that is away is told and
does not make the service unready: jobs are taken and wait, and who was looked up lately is served on.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from hone.errors import HoneError, Unavailable

CLUSTER = "kubernetes"
"""Name of the check of the API server."""
COUNTED_S = 5.0
"""How long a count of the jobs is good enough."""
CLIENT_TIMEOUT_S = 10.0
"""How long a client may take to send its request."""
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that the service needs, as it is now."""

    name: str
    is_well: bool
    text: str
    is_needed: bool = True
    """Whether nothing can be served without it."""
    since: datetime | None = None
    """Since when it is not well, where that is known."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the monitor asks."""

    checks: Callable[[], Sequence[Check]]
    counts: Callable[[], Mapping[tuple[str, str], int]]
    """(namespace, state) → number of jobs. Raises HoneError when nobody can tell."""
    is_alive: Callable[[], bool]
    """Whether the process still does its work."""


class Monitor:
    """A small HTTP server in threads of its own."""

    def __init__(self, host: str, port: int, sources: Sources) -> None:
        """Listens at once. Raises Unavailable when the port is taken."""
        self._sources = sources
        self._registry = CollectorRegistry()
        self._registry.register(_Jobs(sources.counts))
        self._registry.register(_Checks(sources.checks))
        kind = _ServerV6 if ":" in host else ThreadingHTTPServer
        try:
            self._http = kind((host, port), self._handler())
        except OSError as error:
            raise Unavailable(
                f"Cannot listen on {host}:{port}: {error.strerror}.", fix="Choose another HONE_HTTP_ADDRESS."
            ) from error
        self._http.daemon_threads = True
        name = f"[{host}]" if ":" in host else host
        self.address = f"{name}:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="hone-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        if path == "/healthz":
            is_alive = self._sources.is_alive()
            return (200, _TEXT, b"ok\n") if is_alive else (503, _TEXT, b"the event loop does not turn\n")
        if path == "/readyz":
            checks = self._sources.checks()
            is_ready = all(check.is_well for check in checks if check.is_needed)
            return 200 if is_ready else 503, _TEXT, "".join(map(_line, checks)).encode()
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(REGISTRY) + generate_latest(self._registry)
        return 404, _TEXT, b"here are /healthz, /readyz and /metrics\n"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        monitor = self

        class Handler(BaseHTTPRequestHandler):
            timeout = CLIENT_TIMEOUT_S

            def do_GET(self) -> None:
                status, kind, body = monitor.answer(self.path.partition("?")[0])
                with suppress(ConnectionError):  # nobody waits for it any more
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Probes come every few seconds, and nobody wants to read of them."""

        return Handler


class _ServerV6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def _line(check: Check) -> str:
    return f"[{'+' if check.is_well else '-'}] {check.name}: {check.text}\n"


class _Jobs:
    """Jobs by namespace and state, as the record has them."""

    def __init__(self, counts: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._counts = counts
        self._kept: Mapping[tuple[str, str], int] = {}
        self._counted_at = float("-inf")

    def collect(self) -> Iterable[Metric]:
        """Called for each scrape."""
        if time.monotonic() - self._counted_at > COUNTED_S:
            try:
                self._kept, self._counted_at = self._counts(), time.monotonic()
            except HoneError:  # a gap in the curve is the truth
                return
        jobs = GaugeMetricFamily("hone_jobs", "Jobs on record.", labels=("namespace", "state"))
        for labels, count in self._kept.items():
            jobs.add_metric(labels, count)
        yield jobs


class _Checks:
    """Each check as 1 or 0."""

    def __init__(self, checks: Callable[[], Sequence[Check]]) -> None:
        self._checks = checks

    def collect(self) -> Iterable[Metric]:
        """Called for each scrape."""
        up = GaugeMetricFamily("hone_up", "1 where the service has what it needs, else 0.", labels=("what",))
        for check in self._checks():
            up.add_metric((check.name,), float(check.is_well))
        yield up
