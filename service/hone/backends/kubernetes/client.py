"""The API server over HTTP: JSON in, JSON out, and the one place where its answers become our errors and are retried.

Configuration (in a pod or from a kubeconfig), TLS and the pool of connections are the `kubernetes` package's; objects
stay plain dictionaries, because its typed ones cost three times as much (measured on 5,000 Jobs). Used by cache.py and
backend.py, and by the token checks of the service. Safe to use from several threads.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

import urllib3
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import RESTClientObject
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from hone.backends.base import Problem
from hone.backends.kubernetes.answers import ApiUnavailable, NodeUnreachable, NotAuthenticated, error_of
from hone.errors import ClusterError, HoneError, NotFound
from hone.metrics import KUBERNETES_REQUESTS

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 60.0
"""A log that is read and sends nothing for so long is given up."""
MAX_TRIES = 3
MAX_PAUSE_S = 5.0
"""Longest pause within one call; who asks for more is asked again by the caller."""
PAGE_SIZE = 500
MAX_CONNECTIONS = 256
"""Kept open; every watch holds one."""

MERGE_PATCH = "application/merge-patch+json"

Json = dict[str, Any]


def load_configuration() -> Configuration:
    """In a pod its service account's, else that of KUBECONFIG or ~/.kube/config. Raises ClusterError without one."""
    configuration = Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            # The client itself looks at KUBECONFIG only once, when it is imported.
            load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)  # type: ignore[no-untyped-call]
    except (ConfigException, OSError) as error:
        message = f"No cluster is configured: {error}."
        raise ClusterError(message, fix="Run in a pod with a service account, or set KUBECONFIG.") from error
    return configuration


class Api:
    """Requests to one API server. Every call has a time-out; what is temporary is tried again before it is raised.

    Raises, besides what the methods say: Unavailable when no answer came or the server asks for patience, ClusterError
    when it refuses (answers.py lists both), so callers tell the two apart by type.
    """

    def __init__(self, configuration: Configuration | None = None) -> None:
        self._given = configuration
        self._lock = threading.Lock()
        self._problem: Problem | None = None
        self._open()

    @property
    def problem(self) -> Problem | None:
        """Why the last request was not answered, or not for this account; None when it was."""
        return self._problem

    def close(self) -> None:
        """Give the connections back."""
        self._rest.close()

    def get(self, path: str, **query: str) -> Json:
        """One object, or one page. Raises NotFound."""
        return self._json("GET", path, query=query)

    def find(self, path: str, **query: str) -> Json | None:
        """One object, or None."""
        try:
            return self.get(path, **query)
        except NotFound:
            return None

    def pages(self, path: str, **query: str) -> Iterator[Json]:
        """Everything of one kind, page by page, read consistently."""
        following = ""
        while True:
            page = self.get(path, limit=str(PAGE_SIZE), **query, **({"continue": following} if following else {}))
            yield page
            following = page.get("metadata", {}).get("continue", "")
            if not following:
                return

    def create(self, path: str, body: Json, **query: str) -> Json:
        """A new object. Raises AlreadyExists. An ApiUnavailable leaves open whether it is there now."""
        return self._json("POST", path, query={"fieldManager": "hone", **query}, body=body)

    def patch(self, path: str, body: Json) -> Json:
        """Merge into an object. Raises NotFound, and Conflict when it is not the one of the body's uid."""
        return self._json("PATCH", path, query={"fieldManager": "hone"}, body=body, content_type=MERGE_PATCH)

    def delete(self, path: str, *, uid: str) -> None:
        """Delete exactly this object and, in the background, what it owns; one that is gone is fine.

        Raises Conflict when another one has its name.
        """
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            self._json("DELETE", path, body=body)
        except NotFound:
            return

    @contextmanager
    def stream(self, path: str, query: Mapping[str, str], *, timeout_s: float = STREAM_TIMEOUT_S) -> Iterator["Stream"]:
        """The body of a long answer: a log, or a watch."""
        response = self._request("GET", path, query=query, read_timeout_s=timeout_s)
        try:
            yield Stream(response)
        finally:
            response.close()

    def _open(self) -> None:
        self._configuration = self._given or load_configuration()
        self._configuration.keep_alive = True  # a watch notices within minutes that nobody is there any more
        self._configuration.connection_pool_maxsize = MAX_CONNECTIONS
        self._rest = RESTClientObject(self._configuration)

    def _open_again(self, used: Configuration) -> None:
        """Tokens and certificates change under a process that runs for months; several threads may see it at once."""
        with self._lock, suppress(ClusterError):  # there is none now, and may be one at the next try
            if self._configuration is used and self._given is None:
                self._open()

    def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Json:
        response = self._request(method, path, query=query, body=body, content_type=content_type)
        try:
            answer: Json = json.loads(response.data)
        except (HTTPError, ValueError) as error:  # cut in the middle: what it did is unknown
            raise ApiUnavailable(f"The API server's answer was cut: {error}.") from error
        return answer

    def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> urllib3.BaseHTTPResponse:
        """Send, and try again what may be tried again; the answer is a success whose body has not been read."""
        url = f"{path}?{urlencode(query)}" if query else path
        data = None if body is None else json.dumps(body).encode()
        retrying = Retrying(
            retry=retry_if_exception(lambda error: _may_be_tried_again(method, error)),
            stop=stop_after_attempt(MAX_TRIES),
            wait=_pause_s,
            reraise=True,
        )
        return retrying(self._send, method, url, data, content_type, read_timeout_s)

    def _send(
        self, method: str, url: str, data: bytes | None, content_type: str, read_timeout_s: float
    ) -> urllib3.BaseHTTPResponse:
        try:
            response = self._send_once(method, url, data, content_type, read_timeout_s)
        except ApiUnavailable as error:
            if not isinstance(error, NodeUnreachable):
                since = self._problem.since if self._problem else datetime.now(UTC)
                self._problem = Problem(what="requests", why=str(error), since=since)
            raise
        except HoneError:
            self._problem = None  # an answer, if not a welcome one
            raise
        self._problem = None
        return response

    def _send_once(
        self, method: str, url: str, data: bytes | None, content_type: str, read_timeout_s: float
    ) -> urllib3.BaseHTTPResponse:
        configuration, rest = self._configuration, self._rest
        code = "none"
        try:
            response = rest.pool_manager.request(
                method,
                configuration.host + url,
                body=data,
                headers=_headers(configuration, content_type if data else ""),
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=read_timeout_s),
                preload_content=False,
                retries=False,
                redirect=False,
            )
            code = str(response.status)
            if response.status < 300:
                return response
            text = response.read(1 << 20).decode("utf-8", "replace")
            response.release_conn()
        except (NewConnectionError, ConnectTimeoutError) as error:
            message = f"The API server {configuration.host} cannot be reached: {_plain(error)}."
            raise ApiUnavailable(message, was_not_done=True) from error
        except (HTTPError, OSError, ConfigException) as error:  # ConfigException: a token that cannot be read now
            raise ApiUnavailable(f"The API server {configuration.host} did not answer: {_plain(error)}.") from error
        finally:
            KUBERNETES_REQUESTS.labels(method, code).inc()
        failed = error_of(response.status, text, retry_after=response.headers.get("Retry-After"))
        if isinstance(failed, NotAuthenticated):
            self._open_again(configuration)
        raise failed


class Stream:
    """A body as it comes. `cut` may be called from another thread, and ends it."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response

    def chunks(self) -> Iterator[bytes]:
        """As they come. Raises ApiUnavailable when the connection breaks."""
        try:
            while data := self._response.read1(64 * 1024):  # not stream(), which waits for that much
                yield data
        except (HTTPError, OSError, ValueError) as error:  # ValueError: it was closed under the reader
            raise ApiUnavailable(f"The API server stopped in the middle of an answer: {_plain(error)}.") from error

    def lines(self, *, with_rest: bool = False) -> Iterator[bytes]:
        """Whole lines without their end; what comes after the last newline is one only `with_rest`."""
        rest = b""
        for chunk in self.chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        if rest and with_rest:
            yield rest

    def cut(self) -> None:
        """Make whoever reads stop."""
        try:
            self._response.shutdown()
        except (ValueError, RuntimeError, OSError):  # it had ended
            return


def path_of(*parts: str, group: str = "") -> str:
    """`/api/v1/…`, or with a group and version `/apis/batch/v1/…`; every part is escaped."""
    root = f"/apis/{group}" if group else "/api/v1"
    return "/".join([root, *(quote(part, safe="") for part in parts)])


def jobs_path(namespace: str, name: str = "") -> str:
    """All Jobs of a namespace, or one."""
    return path_of("namespaces", namespace, "jobs", *([name] if name else []), group="batch/v1")


def pods_path(namespace: str, *rest: str) -> str:
    """All pods of a namespace, or one, or what is below it."""
    return path_of("namespaces", namespace, "pods", *rest)


def events_path(namespace: str) -> str:
    """Events of a namespace."""
    return path_of("namespaces", namespace, "events")


def _headers(configuration: Configuration, content_type: str) -> dict[str, str]:
    headers = {"Accept": "application/json", "User-Agent": "hone"}
    if content_type:
        headers["Content-Type"] = content_type
    # Asking for the key is what reads the token file again once a minute.
    if key := configuration.get_api_key_with_prefix("BearerToken", alias="authorization"):
        headers["Authorization"] = key
    return headers


def _may_be_tried_again(method: str, error: BaseException) -> bool:
    """Reading may be repeated; writing only where it was surely not done, for the caller has to look first."""
    if isinstance(error, NotAuthenticated):
        return True
    return (
        isinstance(error, ApiUnavailable) and (method == "GET" or error.was_not_done) and error.pause_s <= MAX_PAUSE_S
    )


def _pause_s(state: RetryCallState) -> float:
    """As long as the server asked for, else twice as long each time."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.pause_s if isinstance(error, ApiUnavailable) else 0.0
    return max(asked, 0.1 * 2.0**state.attempt_number)


def _plain(error: Exception) -> str:
    """urllib3's texts begin with the connection's address in memory."""
    text = str(error.args[-1]) if error.args else type(error).__name__
    return text.rpartition(": ")[2] if "object at 0x" in text else text
