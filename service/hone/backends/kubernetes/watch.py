"""List and watch of one kind in one namespace, for ever: a thread that hands on what is there and what changes.

It starts from a consistent list, watches on from that version with bookmarks, lists again when the version is no longer
kept (410) and every ten minutes besides. So an event that is missed, repeated, out of order or late changes when
something is seen, never what. (The client's own SharedInformer retries without a pause and asks for no bookmarks.)
"""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Protocol

from hone.backends.base import Problem
from hone.backends.kubernetes.answers import ApiUnavailable, Expired, error_of
from hone.backends.kubernetes.client import Api, Json, Stream
from hone.errors import HoneError

WATCH_S = 120.0
"""How long one watch is asked for, and up to a quarter longer: all of them at once would be a burst."""
SILENCE_S = 30.0
"""What a watch may last longer than asked for before its connection counts as dead."""
LIST_AGAIN_S = 600.0
MIN_PAUSE_S = 0.2
"""Between two watches, where the first ended at once."""
MAX_PAUSE_S = 8.0
_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told. Both are called from the watching thread, never at once."""

    def replace(self, found: Iterable[Json]) -> None:
        """Everything that there is now; what is not among it is gone."""

    def apply(self, data: Json, *, is_gone: bool) -> None:
        """One object as it is now, or as it was last."""


class Watch:
    """Runs until it is closed, whatever the API server does."""

    def __init__(
        self,
        api: Api,
        path: str,
        listener: Listener,
        *,
        what: str,
        query: dict[str, str] | None = None,
        on_listed: Callable[[], None] = lambda: None,
    ) -> None:
        self._api, self._path, self._listener, self._query = api, path, listener, query or {}
        self._what, self._on_listed = what, on_listed
        self._is_closing = threading.Event()
        self._stream: Stream | None = None
        self._version = ""
        self._listed = 0.0
        self._failures = 0
        self._problem: Problem | None = None
        self._has_listed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"hone-watch {what}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End soon; `join` waits for it."""
        self._is_closing.set()
        if stream := self._stream:
            stream.cut()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(5.0)

    @property
    def has_listed(self) -> bool:
        """Whether everything was seen once."""
        return self._has_listed.is_set()

    def wait_until_listed(self, timeout_s: float) -> bool:
        """Whether everything was seen once, in that time."""
        return self._has_listed.wait(timeout_s)

    @property
    def problem(self) -> Problem | None:
        """Why it sees nothing at the moment."""
        return self._problem

    def _run(self) -> None:
        while not self._is_closing.is_set():
            began = time.monotonic()
            pause_s = 0.0
            try:
                self._look()
                self._failures = 0
            except Expired:
                self._version = ""
            except HoneError as error:
                self._note(error)
                pause_s = error.pause_s if isinstance(error, ApiUnavailable) else 0.0
            except Exception as error:  # a bug of ours must not blind the service for ever
                _log.exception("Watching %s failed; trying again", self._what)
                self._note(error)
                self._version = ""
            if self._problem:
                self._failures += 1
                self._is_closing.wait(max(pause_s, _pause_s(self._failures)))
            elif time.monotonic() - began < MIN_PAUSE_S:
                self._is_closing.wait(MIN_PAUSE_S)

    def _look(self) -> None:
        if not self._version or time.monotonic() - self._listed > LIST_AGAIN_S * random.uniform(1.0, 1.2):
            self._list()
        self._watch()

    def _list(self) -> None:
        version = ""

        def found() -> Iterable[Json]:
            nonlocal version
            for page in self._api.pages(self._path, **self._query):
                version = str(page["metadata"]["resourceVersion"])
                # Items of a list do not repeat their kind; nobody here reads it.
                yield from page.get("items") or ()

        self._listener.replace(found())
        self._version, self._listed, self._problem = version, time.monotonic(), None
        if not self._has_listed.is_set():
            self._has_listed.set()
            self._on_listed()

    def _watch(self) -> None:
        asked_s = WATCH_S * random.uniform(1.0, 1.25)
        query = {
            **self._query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(int(asked_s)),
        }
        with self._api.stream(self._path, query, timeout_s=asked_s + SILENCE_S) as stream:
            self._stream = stream
            self._problem = None
            if self._is_closing.is_set():
                return
            try:
                for line in stream.lines():
                    self._take(json.loads(line))
            except ApiUnavailable as error:  # a watch may be cut at any time; what counts is whether the next one opens
                _log.debug("Watching %s: %s", self._what, error)
            finally:
                self._stream = None

    def _take(self, event: Any) -> None:
        kind, data = event["type"], event["object"]
        if kind == "ERROR":
            raise error_of(int(data.get("code", 500)), json.dumps(data))
        if kind in ("ADDED", "MODIFIED", "DELETED"):
            self._listener.apply(data, is_gone=kind == "DELETED")
        self._version = str(data["metadata"]["resourceVersion"])

    def _note(self, error: Exception) -> None:
        if self._is_closing.is_set():
            return
        since = self._problem.since if self._problem else datetime.now(UTC)
        if self._problem is None:
            _log.warning("Watching %s: %s", self._what, error)
        self._problem = Problem(what=self._what, why=str(error), since=since)


def _pause_s(failures: int) -> float:
    """Twice as long each time, at random, so that a hundred watches do not come back at once."""
    return random.uniform(0.5, 1.0) * min(MIN_PAUSE_S * 2.0 ** min(failures - 1, 10), MAX_PAUSE_S)
