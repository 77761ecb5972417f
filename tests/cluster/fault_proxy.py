"""A proxy on loopback between a client and the API server, which does to answers what a bad day does.

Plain HTTP on one side, so that no certificate is in the way; the administrator's kubeconfig on the other.
"""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import urllib3
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import RESTClientObject
from kubernetes.config import load_kube_config

_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "host", "content-length", "accept-encoding"})


class FaultProxy:
    """Passes everything on until it is told otherwise."""

    def __init__(self, kubeconfig: Path) -> None:
        self._configuration = Configuration()
        load_kube_config(str(kubeconfig), client_configuration=self._configuration)
        self._configuration.connection_pool_maxsize = 64
        self._pool = RESTClientObject(self._configuration).pool_manager
        self.answer: Callable[[str, str], tuple[int, dict[str, str]] | None] = lambda method, path: None
        """Given method and path: code and headers to answer with at once; None passes the request on."""
        self.loses: Callable[[str, str], bool] = lambda method, path: False
        """Whether the request is passed on, and its answer never comes."""
        self.cut_after_s: float | None = None
        """How long a watch may last."""
        self.first_event: dict[str, Any] | None = None
        """What every watch begins with."""
        self.requests: Counter[str] = Counter()
        """How often each method (WATCH for a watch) was asked for."""
        self._is_down = False
        self._open: set[urllib3.BaseHTTPResponse] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, name="fault-proxy", daemon=True).start()

    @property
    def configuration(self) -> Configuration:
        """For a client that goes through it."""
        return Configuration(host=f"http://127.0.0.1:{self._http.server_port}")

    def close(self) -> None:
        """End it."""
        self._http.shutdown()
        self._http.server_close()
        self.cut()
        self._pool.clear()

    def cut(self) -> None:
        """Break off every answer that is under way."""
        for response in list(self._open):
            with contextlib.suppress(ValueError, RuntimeError, OSError):
                response.shutdown()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """An API server that does not answer, and has cut every watch."""
        self._is_down = True
        self.cut()
        try:
            yield
        finally:
            self._is_down = False

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        handler.close_connection = True
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        method, path = handler.command, handler.path
        is_watch = "watch" in parse_qs(urlsplit(path).query)
        self.requests["WATCH" if is_watch else method] += 1
        if self._is_down:
            return
        if fault := self.answer(method, path):
            _answer(handler, *fault)
            return
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP_BY_HOP}
        if key := self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization"):
            headers["Authorization"] = key
        response = self._pool.request(
            method,
            self._configuration.host + path,
            body=body or None,
            headers=headers,
            preload_content=False,
            retries=False,
        )
        try:
            if self.loses(method, path):
                response.read()
            else:
                self._pass_on(handler, response, is_watch=is_watch)
        finally:
            response.close()

    def _pass_on(self, handler: BaseHTTPRequestHandler, response: urllib3.BaseHTTPResponse, *, is_watch: bool) -> None:
        handler.send_response(response.status)
        for name, value in response.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                handler.send_header(name, value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        if is_watch and self.first_event:
            handler.wfile.write((json.dumps(self.first_event) + "\n").encode())
        timer = threading.Timer(self.cut_after_s or 0.0, lambda: _shut(response))
        if is_watch and self.cut_after_s is not None:
            timer.start()
        self._open.add(response)
        try:
            while data := response.read1(65536):
                handler.wfile.write(data)
                handler.wfile.flush()
        except (OSError, urllib3.exceptions.HTTPError, ValueError):
            return  # either side went away
        finally:
            timer.cancel()
            self._open.discard(response)


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

        def _serve(self) -> None:
            with contextlib.suppress(OSError):  # the client went away
                proxy.serve(self)

        do_GET = do_POST = do_PATCH = do_DELETE = _serve

    return Handler


def _shut(response: urllib3.BaseHTTPResponse) -> None:
    with contextlib.suppress(ValueError, RuntimeError, OSError):
        response.shutdown()


def _answer(handler: BaseHTTPRequestHandler, code: int, headers: dict[str, str]) -> None:
    status = {"kind": "Status", "status": "Failure", "code": code, "reason": "Injected", "message": f"injected {code}"}
    body = json.dumps(status).encode()
    handler.send_response(code)
    for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
