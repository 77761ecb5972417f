"""What the tenants' namespaces hold, as last seen: Jobs, their pods, warnings about both, and Kueue's Workloads.

Used by backend.py, which asks the API server itself before it draws a conclusion that cannot be taken back. What was
there and went is kept as it was last seen until it is forgotten: a deleted pod still tells how it ended.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from hone.backends.base import Problem
from hone.backends.kubernetes.client import Api, Json, events_path, jobs_path, path_of, pods_path
from hone.backends.kubernetes.objects import (
    EventView,
    JobView,
    PodView,
    WorkloadView,
    event_view,
    job_view,
    pod_view,
    workload_view,
)
from hone.backends.kubernetes.watch import Watch
from hone.errors import HoneError
from hone.manifests.names import LABEL_JOB

KUEUE = "kueue.x-k8s.io"
LOOK_FOR_KUEUE_S = 300.0
LOOK_AGAIN_S = 5.0
"""When whether Kueue is there could not be asked."""
MAX_WARNINGS = 20_000
MAX_GONE = 1_000
"""Jobs that are kept after they went, the newest: nobody may ever ask for those that people applied."""

OnChange = Callable[[str, str], None]
"""Told (namespace, job id) of every job of which something changed."""
_View = TypeVar("_View", JobView, PodView, WorkloadView)


class Cache:
    """Watches until it is closed. Every method may be called from any thread, and none waits for the network."""

    def __init__(self, api: Api, namespaces: Sequence[str], on_change: OnChange) -> None:
        self._api, self._namespaces, self._on_change = api, tuple(namespaces), on_change
        self._lock = threading.Lock()
        self._jobs: dict[tuple[str, str], JobView] = {}
        self._names: dict[str, tuple[str, str]] = {}
        self._pods: dict[str, dict[str, PodView]] = defaultdict(dict)
        self._owners: dict[str, str] = {}
        self._warnings: dict[str, dict[str, EventView]] = {}
        self._workloads: dict[str, WorkloadView] = {}
        self._is_closing = threading.Event()
        self._watches = {namespace: self._watches_of(namespace) for namespace in self._namespaces}
        self._queues: list[Watch] = []
        self._has_kueue: bool | None = None
        self._kueue = threading.Thread(target=self._look_for_kueue, name="hone-watch kueue", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        for watches in self._watches.values():
            for watch in watches:
                watch.start()
        self._kueue.start()

    def close(self) -> None:
        """End every watch."""
        self._is_closing.set()
        for watch in self._all_watches():
            watch.close()
        for watch in self._all_watches():
            watch.join()
        self._kueue.join(5.0)

    def has_seen(self, namespace: str) -> bool:
        """Whether all Jobs and pods of a namespace were seen once."""
        jobs, pods, _ = self._watches[namespace]
        return jobs.has_listed and pods.has_listed

    def wait_until_seen(self, namespace: str, timeout_s: float) -> bool:
        """The same, after waiting for it."""
        jobs, pods, _ = self._watches[namespace]
        return jobs.wait_until_listed(timeout_s) and pods.wait_until_listed(timeout_s)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What cannot be seen at the moment, the longest first."""
        found = [self._api.problem, *(watch.problem for watch in self._all_watches())]
        return tuple(sorted((problem for problem in found if problem), key=lambda problem: problem.since))

    @property
    def has_kueue(self) -> bool:
        """Whether Kueue is installed, as far as is known."""
        return bool(self._has_kueue)

    def jobs(self) -> tuple[JobView, ...]:
        """All of them, with those that went."""
        with self._lock:
            return tuple(self._jobs.values())

    def job(self, namespace: str, name: str) -> JobView | None:
        """By name."""
        with self._lock:
            return self._jobs.get((namespace, name))

    def job_of_uid(self, uid: str) -> JobView | None:
        """By uid."""
        with self._lock:
            return self._jobs.get(self._names.get(uid, ("", "")))

    def pods(self, job_uid: str) -> tuple[PodView, ...]:
        """The pods of one Job, with those that went, oldest first."""
        with self._lock:
            found = tuple(self._pods.get(job_uid, {}).values())
        return tuple(sorted(found, key=lambda pod: (pod.create_time, pod.name)))

    def pods_of(self, namespace: str, job: str, attempt: int) -> tuple[PodView, ...]:
        """The pods that carry an attempt's labels, whatever Job they are of."""
        with self._lock:
            return tuple(
                pod
                for pods in self._pods.values()
                for pod in pods.values()
                if (pod.namespace, pod.job, pod.attempt) == (namespace, job, attempt)
            )

    def pod(self, uid: str) -> PodView | None:
        """By uid."""
        with self._lock:
            return self._pods.get(self._owners.get(uid, ""), {}).get(uid)

    def warnings(self, uid: str) -> tuple[EventView, ...]:
        """What was warned of about a Job or a pod, the newest of each reason, oldest first."""
        with self._lock:
            return tuple(sorted(self._warnings.get(uid, {}).values(), key=lambda event: event.time))

    def workload(self, job_uid: str) -> WorkloadView | None:
        """What Kueue says of a Job."""
        with self._lock:
            return self._workloads.get(job_uid)

    def forget(self, job_uid: str) -> None:
        """Nobody will ask for this Job again."""
        with self._lock:
            self._drop(job_uid)

    def _watches_of(self, namespace: str) -> tuple[Watch, Watch, Watch]:
        ours = {"labelSelector": LABEL_JOB}
        warnings = {"fieldSelector": "type=Warning"}
        jobs, pods, events = _Jobs(self, namespace), _Pods(self, namespace), _Warnings(self)
        return (
            Watch(self._api, jobs_path(namespace), jobs, what=f"jobs in {namespace}", query=ours),
            Watch(self._api, pods_path(namespace), pods, what=f"pods in {namespace}", query=ours),
            Watch(self._api, events_path(namespace), events, what=f"events in {namespace}", query=warnings),
        )

    def _all_watches(self) -> list[Watch]:
        return [watch for watches in self._watches.values() for watch in watches] + self._queues

    def _look_for_kueue(self) -> None:
        """It may be installed later; that it is asked for again costs one request in five minutes."""
        while not self._queues and not self._is_closing.is_set():
            pause_s = LOOK_FOR_KUEUE_S
            try:
                group = self._api.find(f"/apis/{KUEUE}")
                self._has_kueue = group is not None
                if group:
                    self._watch_workloads(group["preferredVersion"]["groupVersion"])
            except HoneError:
                pause_s = LOOK_AGAIN_S
            self._is_closing.wait(pause_s)

    def _watch_workloads(self, version: str) -> None:
        for namespace in self._namespaces:
            path = path_of("namespaces", namespace, "workloads", group=version)
            listener = _Workloads(self, namespace)
            self._queues.append(Watch(self._api, path, listener, what=f"workloads in {namespace}"))
        for watch in self._queues:
            watch.start()

    def put_job(self, job: JobView, *, is_news: bool = True) -> None:
        """A Job as it is now; no news to whoever has just made it."""
        with self._lock:
            known = self._jobs.get((job.namespace, job.name))
            if known == job or _is_older(job, known):
                return
            if job.is_gone and (known is None or known.uid != job.uid):
                return  # forgotten, or followed by another
            if known and known.uid != job.uid:
                self._drop(known.uid)
            self._jobs[(job.namespace, job.name)] = job
            self._names[job.uid] = (job.namespace, job.name)
            if job.is_gone:
                self._limit_gone()
        if is_news:
            self._tell(job.namespace, job.job)

    def put_pod(self, pod: PodView) -> None:
        """A pod as it is now."""
        with self._lock:
            known = self._pods.get(pod.owner_uid, {}).get(pod.uid)
            if known == pod or _is_older(pod, known) or not pod.owner_uid:
                return
            if pod.is_gone and pod.owner_uid not in self._names:
                self._drop_pod(pod)
            else:
                self._pods[pod.owner_uid][pod.uid] = pod
                self._owners[pod.uid] = pod.owner_uid
        self._tell(pod.namespace, pod.job)

    def put_workload(self, workload: WorkloadView, *, is_gone: bool) -> None:
        """A Workload as it is now."""
        with self._lock:
            known = self._workloads.get(workload.owner_uid)
            if _is_older(workload, known) or (known == workload and not is_gone):
                return
            if not is_gone:
                self._workloads[workload.owner_uid] = workload
            elif known and known.uid == workload.uid:
                del self._workloads[workload.owner_uid]
            else:
                return
            job = self._jobs.get(self._names.get(workload.owner_uid, ("", "")))
        if job:
            self._tell(job.namespace, job.job)

    def put_warning(self, event: EventView) -> None:
        """A warning; of one reason the newest is kept."""
        with self._lock:
            known = self._warnings.setdefault(event.about_uid, {})
            older = known.get(event.reason)
            if older and older.time >= event.time:
                return
            known[event.reason] = event
            self._limit_warnings()
            pod = self._pods.get(self._owners.get(event.about_uid, ""), {}).get(event.about_uid)
            job = self._jobs.get(self._names.get(event.about_uid, ("", "")))
        about = pod or job
        if about and (older is None or older.message != event.message):
            self._tell(about.namespace, about.job)

    def jobs_in(self, namespace: str) -> tuple[JobView, ...]:
        """Those that are there."""
        return tuple(job for job in self.jobs() if job.namespace == namespace and not job.is_gone)

    def pods_in(self, namespace: str) -> tuple[PodView, ...]:
        """Those that are there."""
        with self._lock:
            found = [pod for pods in self._pods.values() for pod in pods.values()]
        return tuple(pod for pod in found if pod.namespace == namespace and not pod.is_gone)

    def workloads_in(self, namespace: str) -> tuple[WorkloadView, ...]:
        """Those that are there."""
        with self._lock:
            return tuple(found for found in self._workloads.values() if found.namespace == namespace)

    def _tell(self, namespace: str, job: str) -> None:
        if job:
            self._on_change(namespace, job)

    def _drop(self, job_uid: str) -> None:
        """Pods that still end go when they are gone."""
        for pod in [pod for pod in self._pods.get(job_uid, {}).values() if pod.is_gone]:
            self._drop_pod(pod)
        self._workloads.pop(job_uid, None)
        self._warnings.pop(job_uid, None)
        if name := self._names.pop(job_uid, None):
            self._jobs.pop(name, None)

    def _drop_pod(self, pod: PodView) -> None:
        self._owners.pop(pod.uid, None)
        self._warnings.pop(pod.uid, None)
        pods = self._pods.get(pod.owner_uid, {})
        pods.pop(pod.uid, None)
        if not pods:
            self._pods.pop(pod.owner_uid, None)

    def _limit_gone(self) -> None:
        gone = [job.uid for job in self._jobs.values() if job.is_gone]
        for uid in gone[:-MAX_GONE]:
            self._drop(uid)

    def _limit_warnings(self) -> None:
        """Those about what is not here (yet) go first."""
        if len(self._warnings) <= MAX_WARNINGS:
            return
        strange = [uid for uid in self._warnings if uid not in self._owners and uid not in self._names]
        for uid in strange[: MAX_WARNINGS // 2] or list(self._warnings)[: MAX_WARNINGS // 10]:
            del self._warnings[uid]


class _Jobs:
    def __init__(self, cache: Cache, namespace: str) -> None:
        self._cache, self._namespace = cache, namespace

    def replace(self, found: Iterable[Json]) -> None:
        before = self._cache.jobs_in(self._namespace)  # what is made while the list is read need not be in it
        seen = set()
        for data in found:
            job = job_view(data)
            seen.add(job.uid)
            self._cache.put_job(job)
        for job in _missing(before, seen):
            self._cache.put_job(replace(job, is_gone=True))

    def apply(self, data: Json, *, is_gone: bool) -> None:
        self._cache.put_job(replace(job_view(data), is_gone=is_gone))


class _Pods:
    def __init__(self, cache: Cache, namespace: str) -> None:
        self._cache, self._namespace = cache, namespace

    def replace(self, found: Iterable[Json]) -> None:
        before = self._cache.pods_in(self._namespace)
        seen = set()
        for data in found:
            pod = pod_view(data)
            seen.add(pod.uid)
            self._cache.put_pod(pod)
        for pod in _missing(before, seen):
            self._cache.put_pod(replace(pod, is_gone=True))

    def apply(self, data: Json, *, is_gone: bool) -> None:
        self._cache.put_pod(replace(pod_view(data), is_gone=is_gone))


class _Workloads:
    def __init__(self, cache: Cache, namespace: str) -> None:
        self._cache, self._namespace = cache, namespace

    def replace(self, found: Iterable[Json]) -> None:
        seen = set()
        for data in found:
            workload = workload_view(data)
            seen.add(workload.uid)
            self._put(workload, is_gone=False)
        for workload in _missing(self._cache.workloads_in(self._namespace), seen):
            self._put(workload, is_gone=True)

    def apply(self, data: Json, *, is_gone: bool) -> None:
        self._put(workload_view(data), is_gone=is_gone)

    def _put(self, workload: WorkloadView, *, is_gone: bool) -> None:
        if workload.owner_uid:
            self._cache.put_workload(workload, is_gone=is_gone)


class _Warnings:
    """Events end by themselves after an hour; what they said holds until what they are about is gone."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def replace(self, found: Iterable[Json]) -> None:
        for data in found:
            self.apply(data, is_gone=False)

    def apply(self, data: Json, *, is_gone: bool) -> None:
        if not is_gone and data.get("involvedObject", {}).get("kind") in ("Job", "Pod"):
            self._cache.put_warning(event_view(data))


def _missing(known: Iterable[_View], seen: set[str]) -> Iterator[_View]:
    return (view for view in known if view.uid not in seen)


def _is_older(view: JobView | PodView | WorkloadView, known: JobView | PodView | WorkloadView | None) -> bool:
    """Versions of one object rise; one that is no number is not compared."""
    if known is None or known.uid != view.uid or not (known.version.isdecimal() and view.version.isdecimal()):
        return False
    return int(view.version) < int(known.version)
