"""The reconciler: a thread that makes the backend match the store, and the store tell what the backend saw.

Started by service.py; one for each database. Keys of jobs become due when their record changes, when their time comes,
or when another job ended; a few workers make one step each, never two of one job at a time. What fails is tried again
ever more slowly.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from hone.backends.base import Backend
from hone.errors import NotFound, TemporaryError
from hone.steps import WAITING_POLL_S, Step, World
from hone.storage import ArtifactStore
from hone.store import Store

Key = tuple[str, str]
"""(namespace, job id)"""

NUM_WORKERS = 8
MAX_PAUSE_S = 60.0
NEW = 1
"""Version of a job that nothing has happened to."""
_LONGEST_WAIT_S = 30.0
_log = logging.getLogger(__name__)


@dataclass
class _Visit:
    """When a job is to be looked at again."""

    due: float
    version: int = 0
    is_waiting: bool = False
    """For room, or for its turn to ask."""
    is_under_way: bool = False
    has_changed: bool = False
    """Its record changed while a step was under way."""
    failures: int = 0


class Reconciler:
    """Looks after every job that has not ended."""

    def __init__(
        self,
        store: Store,
        backend: Backend,
        artifacts: ArtifactStore,
        *,
        grace_s: float = 30.0,
        retry_pause_s: float = 10.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_nonce: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self._world = World(
            store=store,
            backend=backend,
            artifacts=artifacts,
            grace_s=grace_s,
            retry_pause_s=retry_pause_s,
            clock=clock,
            new_nonce=new_nonce,
        )
        self._store = store
        self._visits: dict[Key, _Visit] = {}
        self._condition = threading.Condition()
        self._is_dirty = True
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="hone-reconcile")
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin; what an earlier service left is taken up."""
        self._unsubscribe = self._store.subscribe(self._wake)
        self._thread = threading.Thread(target=self._loop, name="hone-reconcile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the steps under way; runs go on."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        if self._thread:
            self._thread.join()
        self._unsubscribe()
        self._workers.shutdown()

    def step(self, key: Key) -> float | None:
        """One step of one job; in how many seconds it wants the next, None when never."""
        job = self._store.find(*key)
        return None if job is None else Step(self._world, job).make()

    def _wake(self, _namespace: str) -> None:
        with self._condition:
            self._is_dirty = True
            self._condition.notify()

    def _loop(self) -> None:
        while True:
            with self._condition:
                if not self._is_dirty and not self._is_stopping:
                    self._condition.wait(self._pause())
                if self._is_stopping:
                    return
                was_dirty, self._is_dirty = self._is_dirty, False
            try:
                if was_dirty:
                    self._look_for_work()
            except Exception:  # whatever it is, jobs are not left alone
                _log.exception("The database cannot be asked for work; trying again")
                time.sleep(1.0)
                self._wake("")
            self._hand_out()

    def _pause(self) -> float:
        """Seconds until something is due."""
        now = time.monotonic()
        waiting = [visit.due - now for visit in self._visits.values() if not visit.is_under_way]
        return max(0.0, min(waiting, default=_LONGEST_WAIT_S))

    def _look_for_work(self) -> None:
        """Whoever changed since the last step is due now."""
        open_ = self._store.unfinished()
        with self._condition:
            limit = self._world.backend.max_waiting
            num_waiting = sum(visit.is_waiting for visit in self._visits.values())
            for namespace, job_id, version in open_:
                visit = self._visits.get((namespace, job_id))
                if visit is None:
                    held = limit is not None and num_waiting >= limit and version == NEW
                    num_waiting += held
                    due = time.monotonic() + WAITING_POLL_S if held else 0.0
                    self._visits[(namespace, job_id)] = _Visit(due=due, version=version, is_waiting=held)
                elif visit.is_under_way:
                    visit.has_changed = True
                elif visit.version != version:
                    visit.due, visit.version = 0.0, version

    def _hand_out(self) -> None:
        now = time.monotonic()
        with self._condition:
            for key, visit in self._visits.items():
                if visit.due <= now and not visit.is_under_way:
                    visit.is_under_way = True
                    self._workers.submit(self._visit, key, visit)

    def _visit(self, key: Key, visit: _Visit) -> None:
        pause: float | None
        try:
            job = self._store.find(*key)
            step = Step(self._world, job) if job else None
            pause = step.make() if step else None
            visit.failures = 0
            if step:
                visit.version = step.job.version
        except NotFound:  # another deleted it meanwhile
            pause = None
        except TemporaryError as error:
            pause = self._after_error(visit)
            _log.warning("Job %s: %s Trying again in %.0f s.", key[1], error, pause)
        except Exception:  # a bug, or a person has to look: the other jobs go on
            pause = self._after_error(visit)
            _log.exception("Job %s: the step failed; trying again in %.0f s", key[1], pause)
        with self._condition:
            if pause is None:
                self._visits.pop(key, None)
                self._let_others_try()
            else:
                visit.due = time.monotonic() + pause
                visit.is_waiting = pause == WAITING_POLL_S
            self._is_dirty = self._is_dirty or visit.has_changed
            visit.is_under_way = visit.has_changed = False
            self._condition.notify()

    def _after_error(self, visit: _Visit) -> float:
        visit.failures += 1
        return float(min(2.0 ** (visit.failures - 1), MAX_PAUSE_S))

    def _let_others_try(self) -> None:
        """Something ended, so there may be room for those that wait longest."""
        waiting = (visit for visit in self._visits.values() if visit.is_waiting and not visit.is_under_way)
        for visit in islice(waiting, self._world.backend.max_waiting):
            visit.due = 0.0
