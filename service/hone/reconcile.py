"""The reconciler: a thread that makes the backend match the store, and the store tell what the backend saw.

Started by service.py; one for each database. Keys of jobs become due when their record changes, when their time comes,
or when another job ended; a few workers make one step each, never two of one job at a time. What fails is tried again
ever more slowly.
"""

import heapq
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from hone import metrics
from hone.backends.base import Backend
from hone.errors import NotFound, TemporaryError
from hone.job import Job
from hone.logs import about
from hone.observed import Observer
from hone.plan import Planned
from hone.spec import JobSpec
from hone.steps import WAITING_POLL_S, Step, World
from hone.storage import ArtifactStore
from hone.store import Store

Key = tuple[str, str]
"""(namespace, job id)"""

NUM_WORKERS = 32
MAX_PAUSE_S = 60.0
NEW = 1
"""Version of a job that nothing has happened to."""
LOOK_S = 30.0
"""Between two looks at everything that has not ended; what this process writes is heard of at once."""
OBSERVE_S = 1.0
"""At least so long between two looks at what people started past the service."""
_log = logging.getLogger(__name__)


@dataclass
class _Visit:
    """When a job is to be looked at again."""

    due: float
    version: int = 0
    """Of its record, as it was last heard of."""
    seen_version: int = 0
    """Of its record, as the last step left it."""
    is_under_way: bool = False
    must_repeat: bool = False
    """Something of it changed in the backend while a step was under way."""
    failures: int = 0
    is_broken: bool = False
    """Whether the last step failed by a bug, or so that a person has to look."""


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
        planner: Callable[[JobSpec], Planned] | None = None,
        look_s: float = LOOK_S,
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
        self._look_s = look_s
        self._observer = Observer(store, backend, artifacts, planner=planner, clock=clock) if planner else None
        self._must_observe = True
        self._last_problem = ""
        self._visits: dict[Key, _Visit] = {}
        self._queue: list[tuple[float, Key]] = []
        """(when due, whose): a heap. An entry whose time is not its visit's any more is passed over."""
        self._waiting: dict[Key, None] = {}
        """Who asked for room and found none; longest first."""
        self._held: dict[Key, None] = {}
        """Who is not even asked for, because so many wait already; longest first."""
        self._condition = threading.Condition()
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="hone-reconcile")
        self._unsubscribe: tuple[Callable[[], None], ...] = ()

    def start(self) -> None:
        """Begin; what an earlier service left is taken up."""
        self._unsubscribe = (
            self._store.subscribe(self._hear),
            self._world.backend.subscribe(self._hear_backend),
        )
        self._thread = threading.Thread(target=self._loop, name="hone-reconcile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the steps under way; runs go on."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        if self._thread:
            self._thread.join()
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._workers.shutdown()

    def step(self, key: Key) -> float | None:
        """One step of one job; in how many seconds it wants the next, None when never."""
        job = self._store.find(*key)
        return None if job is None else Step(self._world, job).make()

    def _hear(self, job: Job) -> None:
        """A commit changed this job."""
        with self._condition:
            if not job.state.is_terminal or job.delete_time:
                self._note((job.namespace, job.id), job.version)

    def _hear_backend(self, namespace: str, job_id: str) -> None:
        """Something of a job changed in the backend; of an ended or a foreign one perhaps."""
        key = (namespace, job_id)
        with self._condition:
            self._must_observe = True
            visit = self._visits.get(key)
            if visit is None:
                visit = self._visits[key] = _Visit(due=math.inf)
            elif visit.is_under_way:
                visit.must_repeat = True
                return
            self._schedule(key, visit, 0.0)
            self._condition.notify()

    def _loop(self) -> None:
        look_at = observe_at = 0.0
        while True:
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + (self._look_s if self._look_for_work() else 1.0)
                self._must_observe = True
            if self._must_observe and time.monotonic() >= observe_at:
                observe_at = time.monotonic() + OBSERVE_S
                self._observe()
            with self._condition:
                self._hand_out()
                if self._is_stopping:
                    return
                self._condition.wait(self._pause(min(look_at, observe_at) if self._must_observe else look_at))

    def _pause(self, look_at: float) -> float:
        """Seconds until something is due."""
        due = min(look_at, self._queue[0][0]) if self._queue else look_at
        return max(0.0, due - time.monotonic())

    def _look_for_work(self) -> bool:
        """Everything that has not ended: what an earlier service left, and what another one wrote meanwhile."""
        try:
            found = self._store.unfinished()
        except Exception:  # whatever it is, jobs are not left alone
            _log.exception("The database cannot be asked for work; trying again")
            return False
        with self._condition:
            for namespace, job_id, version in found:
                self._note((namespace, job_id), version)
        for owner in self._world.backend.present():  # what is left of attempts whose end is recorded
            if (owner.namespace, owner.job) not in self._visits:
                self._hear_backend(owner.namespace, owner.job)
        return True

    def _observe(self) -> None:
        """What people started past the service."""
        self._must_observe = False
        try:
            if self._observer:
                self._observer.look()
            self._last_problem = ""
        except TemporaryError as error:
            self._must_observe = True
            if str(error) != self._last_problem:  # it is tried every second, and told once
                self._last_problem = str(error)
                _log.warning("What people applied cannot be seen now: %s", error)
        except Exception:
            self._must_observe = True
            _log.exception("What people applied cannot be recorded; trying again")

    def _note(self, key: Key, version: int) -> None:
        """A job is at this version now: whoever changed since the last step is due. The condition is held."""
        visit = self._visits.get(key)
        if visit is None:
            visit = self._visits[key] = _Visit(due=math.inf, version=version)
            if version == NEW and not self._may_ask:
                self._held[key] = None
                return
        elif version <= visit.version:
            return
        visit.version = version
        self._held.pop(key, None)
        if not visit.is_under_way:
            self._schedule(key, visit, 0.0)
            self._condition.notify()

    @property
    def _may_ask(self) -> bool:
        limit = self._world.backend.max_waiting
        return limit is None or len(self._waiting) < limit

    def _schedule(self, key: Key, visit: _Visit, pause_s: float) -> None:
        visit.due = time.monotonic() + pause_s
        heapq.heappush(self._queue, (visit.due, key))

    def _hand_out(self) -> None:
        now = time.monotonic()
        while self._queue and self._queue[0][0] <= now:
            due, key = heapq.heappop(self._queue)
            visit = self._visits.get(key)
            if visit and visit.due == due and not visit.is_under_way:
                visit.is_under_way = True
                self._workers.submit(self._visit, key, visit)

    def _visit(self, key: Key, visit: _Visit) -> None:
        started = time.monotonic()
        with about(*key):
            pause = self._step(key, visit)
        result = "ok" if not visit.failures else "error" if visit.is_broken else "retry"
        metrics.STEP_SECONDS.labels(result).observe(time.monotonic() - started)
        with self._condition:
            self._after_visit(key, visit, pause)
            self._condition.notify()

    def _step(self, key: Key, visit: _Visit) -> float | None:
        """One step; whatever fails is tried again later."""
        pause: float | None
        try:
            job = self._store.find(*key)
            step = Step(self._world, job) if job else None
            pause = step.make() if step else None
            visit.failures, visit.is_broken = 0, False
            visit.seen_version = step.job.version if step else visit.version
        except NotFound:  # another deleted it meanwhile
            pause, visit.seen_version = None, visit.version
        except TemporaryError as error:
            pause = self._after_error(visit)
            visit.is_broken = False
            _log.warning("Job %s: %s Trying again in %.0f s.", key[1], error, pause)
        except Exception:  # a bug, or a person has to look: the other jobs go on
            pause = self._after_error(visit)
            visit.is_broken = True
            _log.exception("Job %s: the step failed; trying again in %.0f s", key[1], pause)
        return pause

    def _after_visit(self, key: Key, visit: _Visit, pause: float | None) -> None:
        visit.is_under_way = False
        if pause == WAITING_POLL_S:
            self._waiting.setdefault(key)
        else:
            self._waiting.pop(key, None)
        if self._held and self._may_ask:
            following = next(iter(self._held))
            del self._held[following]
            self._schedule(following, self._visits[following], 0.0)
        has_changed = (visit.version > visit.seen_version or visit.must_repeat) and not visit.failures
        visit.must_repeat = False
        if pause is not None or has_changed:
            self._schedule(key, visit, 0.0 if has_changed or pause is None else pause)
        else:
            del self._visits[key]
            self._let_others_try()

    def _after_error(self, visit: _Visit) -> float:
        visit.failures += 1
        return float(min(2.0 ** (visit.failures - 1), MAX_PAUSE_S))

    def _let_others_try(self) -> None:
        """Something ended, so there may be room for those that wait longest."""
        for key in islice(self._waiting, self._world.backend.max_waiting):
            visit = self._visits[key]
            if not visit.is_under_way:
                self._schedule(key, visit, 0.0)
