"""The Kubernetes backend: makes, looks at, ends and removes the Jobs of attempts. Safe to use from several threads.

Every attempt is one Job with a name that follows from the job and the number, so making it twice is refused by the API
server itself; a name is never used for a second Job. An attempt is ended by one request: an annotation that says why,
and a deadline of zero, whereupon the Job controller stops the pods with their grace and never makes another. (Pods are
not deleted one by one: the service may read pods only. `suspend` is Kueue's.) What is seen comes from the cache; that
an attempt has ended is asked of the API server once more before it is told.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from hone.backends.base import ForeignJob, Observation, Owner, Phase, Problem
from hone.backends.kubernetes.answers import ApiUnavailable, NodeUnreachable, NotAdmitted, NotValid
from hone.backends.kubernetes.cache import Cache
from hone.backends.kubernetes.client import Api, Json, jobs_path, pods_path
from hone.backends.kubernetes.endings import Ending
from hone.backends.kubernetes.logs import PodLogs
from hone.backends.kubernetes.lookalike import first_difference, is_of
from hone.backends.kubernetes.objects import ANNOTATION_ENDING, JobView, PodView, job_view, pod_view
from hone.backends.kubernetes.observe import Facts, Limits, judge
from hone.backends.kubernetes.preflight import look
from hone.cluster import Cluster
from hone.crash import crash_point
from hone.errors import AlreadyExists, ClusterError, HoneError, InvalidRequest, NotFound, Violation, WrongState
from hone.findings import Finding
from hone.job import Event, Failure, FailureClass, Plan
from hone.manifests import applied_run, job_name, refuse, render_job, to_yaml
from hone.plan import Planned
from hone.run import Run

MAX_EVENTS = 1000
"""Events of one look."""
STOPPED = Failure(
    failure_class=FailureClass.PREEMPTED,
    message="The attempt was stopped on request.",
    next_step="Submit it again to run it.",
)
LOG_PATIENCE_S = 120.0
"""How long an ended attempt waits for a node that holds its log and does not answer."""
_log = logging.getLogger(__name__)
_CONTROLLER = "batch.kubernetes.io/controller-uid"


class KubernetesBackend:
    """Attempts as Jobs in the tenants' namespaces."""

    name = "kubernetes"
    max_waiting: int | None = None
    """All of them: the scheduler and Kueue keep the queue."""
    keeps_ended = False
    poll_s = 30.0
    """Between two looks at what nothing is told of; changes are told by `subscribe` within milliseconds."""

    def __init__(
        self,
        cluster: Cluster,
        api: Api | None = None,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Begins to watch at once. Raises ClusterError where no cluster is configured; one that does not answer is
        asked again and again, see `problems`."""
        self._cluster, self._clock = cluster, clock
        self._limits = Limits(start_s=cluster.start_deadline_s, gang_s=cluster.gang_deadline_s)
        self._api = api or Api()
        self._logs = PodLogs(self._api)
        self._lock = threading.Lock()
        self._listeners: list[Callable[[str, str], None]] = []
        self._asked_for: set[tuple[str, str]] = set()
        self._confirmed: set[str] = set()
        self._unread: dict[str, tuple[int, tuple[Event, ...]]] = {}
        self._foreign: dict[str, Run | str] = {}
        self._cache = Cache(self._api, cluster.namespaces, self._tell)
        self._cache.start()

    def close(self) -> None:
        """Stop watching; attempts run on."""
        self._cache.close()
        self._api.close()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What cannot be seen at the moment, why and since when; for health, events and metrics."""
        return self._cache.problems

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Whether every namespace was seen once, in that time."""
        deadline = time.monotonic() + timeout_s
        return all(
            self._cache.wait_until_seen(namespace, max(0.0, deadline - time.monotonic()))
            for namespace in self._cluster.namespaces
        )

    def subscribe(self, callback: Callable[[str, str], None]) -> Callable[[], None]:
        """Have (namespace, job id) told of every job of which something changed; the answer ends that."""
        with self._lock:
            self._listeners.append(callback)

        def unsubscribe() -> None:
            with self._lock, suppress(ValueError):
                self._listeners.remove(callback)

        return unsubscribe

    def check(self, planned: Planned, *, namespace: str) -> None:
        """Refuse what no pod of this platform could run. Raises InvalidRequest with every violation."""
        found: list[Violation] = []
        if namespace not in self._cluster.namespaces:
            message = f"{namespace!r} is no tenant of this service. A platform adds it to cluster.namespaces."
            found.append(Violation(path="namespace", value=namespace, message=message))
        try:
            refuse(planned.spec, planned.plan, self._cluster)
        except InvalidRequest as error:
            found += error.violations
        if found:
            raise InvalidRequest(found)

    def preflight(self, run: Run, plan: Plan) -> Sequence[Finding]:
        """What the API server and the stores say; rows and models are the pod's to look at."""
        return list(look(self._api, self._cluster, run, plan))

    def manifest(self, planned: Planned, *, namespace: str) -> str:
        """As `hone render` gives it; empty for what no pod of this platform could run."""
        try:
            refuse(planned.spec, planned.plan, self._cluster)
            run = applied_run(planned, self._cluster, namespace=namespace)
            return to_yaml([render_job(run, planned.plan, self._cluster, managed=False)])
        except InvalidRequest:
            return ""

    def ensure(self, run: Run, plan: Plan) -> Observation:
        """Make the Job, or find it made. Raises Unavailable when the outcome is unknown: ask again."""
        self._need_sight(run.namespace)
        name = job_name(run, managed=True)
        if left := self._left_pods(run):
            return Observation(phase=Phase.WAITING, reason=f"Pod {left[0].name} of a deleted Job has yet to end.")
        body = render_job(run, plan, self._cluster, managed=True)
        self._asked_for.add((run.namespace, name))
        crash_point("job-create")
        try:
            made = self._api.create(jobs_path(run.namespace), body)
        except AlreadyExists:
            return self._adopt(run, body)
        except NotFound:
            return _waiting(f"Namespace {run.namespace} does not exist: create it, and install the tenant chart there.")
        except NotAdmitted as error:
            return _waiting(f"Its Job is not admitted: {error}")
        except NotValid as error:
            return _not_ours(f"The cluster takes Job {run.namespace}/{name} for invalid: {error.message}")
        except ClusterError as error:
            return _waiting(str(error))
        crash_point("job-created")
        job = job_view(made)
        self._cache.put_job(job, is_news=False)
        return judge(self._facts(run, job)).seen

    def observe(self, run: Run, *, after_seq: int) -> Observation:
        """Look at the Job and its pods; of an ended attempt, also at the events in its log that are missing.

        Raises Unavailable while the namespace was never seen, or an end cannot be confirmed.
        """
        self._need_sight(run.namespace)
        job = self._job(run)
        if job and not _is_recorded(job, run):
            job = self._ask_again(job.namespace, job.name)
            if job and not _is_recorded(job, run):
                return _taken(job)
        verdict = judge(self._facts(run, job))
        if job and verdict.end:
            job = self._end(job, verdict.end)
            verdict = judge(self._facts(run, job))
        if job is None or verdict.seen.phase not in (Phase.SUCCEEDED, Phase.FAILED):
            return verdict.seen
        if job.uid not in self._confirmed:
            self._look_closely(job)
            verdict = judge(self._facts(run, self._cache.job(job.namespace, job.name)))
            if verdict.seen.phase not in (Phase.SUCCEEDED, Phase.FAILED):
                return verdict.seen
            self._confirmed.add(job.uid)
        return replace(verdict.seen, events=self._events(run, job, after_seq, ended=verdict.seen.end_time))

    def stop(self, run: Run, *, grace_s: float) -> Observation:
        """End the attempt: SIGTERM now, SIGKILL after the grace that its pods carry (grace_period_s of the platform,
        which `grace_s` does not change). Returns at once; it runs until every pod has ended."""
        self._need_sight(run.namespace)
        job = self._job(run)
        if job is None or job.is_gone or not _is_recorded(job, run) or Ending.from_json(job.ending):
            return self.observe(run, after_seq=_NOTHING_NEW)
        seen = judge(self._facts(run, job)).seen
        if seen.phase in (Phase.RUNNING, Phase.WAITING):
            self._end(job, Ending(failure=STOPPED, final=True))
        return self.observe(run, after_seq=_NOTHING_NEW)

    def remove(self, run: Run) -> None:
        """Delete the Job and its pods. Raises WrongState while a pod of it runs."""
        self._need_sight(run.namespace)
        name = job_name(run, managed=True)
        job = self._cache.job(run.namespace, name)
        if job is None and (run.namespace, name) not in self._asked_for:
            return  # asked for again and again: what was never here, or was removed, costs no request
        found = self._api.find(jobs_path(run.namespace, name))
        if found and is_of(run, found):
            job = job_view(found)
            if judge(self._facts(run, job)).seen.phase == Phase.RUNNING:
                raise WrongState(f"Attempt {run.attempt} of job {run.job} runs.", fix="Stop it first.")
            crash_point("job-delete")
            self._api.delete(jobs_path(run.namespace, name), uid=job.uid)
            crash_point("job-deleted")
        if job and _is_recorded(job, run):
            self._cache.forget(job.uid)
            self._confirmed.discard(job.uid)
        self._asked_for.discard((run.namespace, name))
        self._unread.pop(run.nonce, None)

    def logs(self, run: Run, *, rank: int, tail: int | None = None, offset: int = 0) -> Iterator[bytes]:
        """What a rank wrote. Nothing before its pod has started and after it is gone."""
        job = self._job(run)
        if job is None or not _is_recorded(job, run):
            return iter(())
        return self._read(job, run.launch.processes_per_node, rank=rank, tail=tail, offset=offset)

    def rescue(self, run: Run, *, after_seq: int) -> tuple[Sequence[Event], Mapping[int, bytes]]:
        """The Job controller deletes the pods of a Job that it ends, and their logs go with them at once."""
        self._need_sight(run.namespace)
        job = self._job(run)
        if job is None or job.is_gone or not _is_recorded(job, run) or Ending.from_json(job.ending):
            return (), {}
        pod = _newest(self._cache.pods(job.uid)).get(0)
        events: Sequence[Event] = ()
        if pod and pod.has_started and not pod.is_gone:
            with suppress(NodeUnreachable):
                events = self._logs.events(pod, after_seq=after_seq)
        return events, self.tail_logs(run)

    def tail_logs(self, run: Run) -> Mapping[int, bytes]:
        """The last 1 MiB of each rank, to be kept; one reading of each pod, without those whose node is silent."""
        job = self._job(run)
        tails: dict[int, bytes] = {}
        if job is None or not _is_recorded(job, run):
            return tails
        per_node = run.launch.processes_per_node
        for index, pod in _newest(self._cache.pods(job.uid)).items():
            if pod.has_started and not pod.is_gone:
                with suppress(NodeUnreachable):
                    tails.update(self._logs.tails(pod, first_rank=index * per_node, num_ranks=per_node))
        return tails

    def present(self) -> tuple[Owner, ...]:
        """The managed Jobs that are there, in the namespaces that can be seen."""
        return tuple(_owner(job) for job in self._cache.jobs() if job.is_managed and not job.is_gone)

    def foreign(self) -> tuple[ForeignJob, ...]:
        """The Jobs that people applied; one that was deleted is not among them. Raises Unavailable while a namespace
        was never seen."""
        for namespace in self._cluster.namespaces:
            self._need_sight(namespace)
        found = [job for job in self._cache.jobs() if job.spec and not job.is_managed and not job.is_gone]
        known = {job.uid for job in found}
        for uid in [uid for uid in list(self._foreign) if uid not in known]:
            self._foreign.pop(uid, None)
        return tuple(self._look_at_foreign(job) for job in found)

    def foreign_logs(self, uid: str, *, rank: int, tail: int | None = None, offset: int = 0) -> Iterator[bytes]:
        """What a rank of a Job that a person applied wrote."""
        job = self._cache.job_of_uid(uid)
        if job is None:
            return iter(())
        run = self._run_of(job)
        per_node = run.launch.processes_per_node if isinstance(run, Run) else 1
        return self._read(job, per_node, rank=rank, tail=tail, offset=offset)

    def owner_of(self, namespace: str, pod: str, uid: str) -> Owner | None:
        """The attempt that a pod belongs to: by the Job that controls it, not by labels. None where there is none, and
        where the pod is gone.

        Raises Unavailable when the API server has to be asked and does not answer.
        """
        if namespace not in self._cluster.namespaces:
            return None
        found = self._cache.pod(uid)
        if found is None or found.is_gone:
            data = self._api.find(pods_path(namespace, pod))
            found = pod_view(data) if data else None
        if found is None or (found.namespace, found.name, found.uid) != (namespace, pod, uid) or not found.owner_uid:
            return None
        job = self._cache.job_of_uid(found.owner_uid)
        if job is None:
            data = self._api.find(jobs_path(namespace, found.owner))
            job = job_view(data) if data else None
        return _owner(job) if job and job.uid == found.owner_uid and job.job else None

    def _tell(self, namespace: str, job: str) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(namespace, job)

    def _need_sight(self, namespace: str) -> None:
        if namespace not in self._cluster.namespaces:
            message = f"Namespace {namespace} is no tenant of this service any more."
            raise ClusterError(message, fix="Put it back into cluster.namespaces of the chart's values.")
        if not self._cache.has_seen(namespace):
            why = next((problem.why for problem in self._cache.problems if problem.what.endswith(f" {namespace}")), "")
            raise ApiUnavailable(f"What runs in namespace {namespace} is not known yet. {why}".strip())

    def _job(self, run: Run) -> JobView | None:
        """The Job of this name. A list is consistent, so what was not asked for here and is not in it is not there.
        One that went may only have lost the label that it is watched by."""
        key = (run.namespace, job_name(run, managed=True))
        job = self._cache.job(*key)
        if job is None:
            return self._ask_again(*key) if key in self._asked_for else None
        if job.uid not in self._confirmed and (job.is_gone or job.job != run.job):
            return self._ask_again(*key) or job
        return job

    def _ask_again(self, namespace: str, name: str) -> JobView | None:
        found = self._api.find(jobs_path(namespace, name))
        if found is None:
            return None
        job = job_view(found)
        self._cache.put_job(job)
        return job

    def _pods_of(self, run: Run) -> tuple[PodView, ...]:
        return self._cache.pods_of(run.namespace, run.job, run.attempt)

    def _left_pods(self, run: Run) -> list[PodView]:
        """Live pods of an earlier Job of this name, which somebody deleted: two pods must not hold one rank."""
        live = [pod for pod in self._pods_of(run) if not pod.has_ended]
        owners = {pod.owner_uid: self._cache.job_of_uid(pod.owner_uid) for pod in live}
        return [pod for pod in live if (owner := owners[pod.owner_uid]) is None or owner.is_gone]

    def _facts(self, run: Run, job: JobView | None) -> Facts:
        pods = self._cache.pods(job.uid) if job else self._pods_of(run)
        about = [job.uid, *(pod.uid for pod in pods)] if job else []
        return Facts(
            job=job,
            pods=pods,
            warnings={uid: self._cache.warnings(uid) for uid in about},
            workload=self._cache.workload(job.uid) if job else None,
            has_kueue=self._cache.has_kueue,
            processes_per_node=run.launch.processes_per_node,
            now=self._clock(),
            limits=self._limits,
        )

    def _adopt(self, run: Run, body: Json) -> Observation:
        """The name is taken: by what an earlier request made, or by somebody else."""
        found = self._api.find(jobs_path(run.namespace, body["metadata"]["name"]))
        if found is None:
            raise ApiUnavailable(f"Job {run.namespace}/{body['metadata']['name']} was there, and is not now.")
        job = job_view(found)
        if not is_of(run, found):
            return _taken(job)
        if difference := first_difference(body, found):
            return _not_ours(
                f"Job {job.namespace}/{job.name} carries this attempt's mark, and is another one: {difference} differs."
            )
        return judge(self._facts(run, job)).seen

    def _end(self, job: JobView, ending: Ending) -> JobView | None:
        """Why, and that it ends, in one request; None when it is gone."""
        body = {
            "metadata": {"uid": job.uid, "annotations": {ANNOTATION_ENDING: ending.to_json()}},
            "spec": {"activeDeadlineSeconds": 0},
        }
        crash_point("job-end")
        try:
            changed = job_view(self._api.patch(jobs_path(job.namespace, job.name), body))
        except NotFound:
            return None
        self._cache.put_job(changed)
        crash_point("job-ended")
        return changed

    def _look_closely(self, job: JobView) -> None:
        """Read the Job and its pods once more, consistently: the cache may lag behind, and an end is told once."""
        if self._ask_again(job.namespace, job.name) is None and not job.is_gone:
            self._cache.put_job(replace(job, is_gone=True))
        seen: set[str] = set()
        for page in self._api.pages(pods_path(job.namespace), labelSelector=f"{_CONTROLLER}={job.uid}"):
            for data in page.get("items") or ():
                pod = pod_view(data)
                seen.add(pod.uid)
                self._cache.put_pod(pod)
        for pod in self._cache.pods(job.uid):
            if pod.uid not in seen and not pod.is_gone:
                self._cache.put_pod(replace(pod, is_gone=True))

    def _events(self, run: Run, job: JobView, after_seq: int, *, ended: datetime | None) -> tuple[Event, ...]:
        """What the trainer printed and nobody received; read once, handed out in parts."""
        if after_seq == _NOTHING_NEW:
            return ()
        read_after, unread = self._unread.get(run.nonce, (after_seq + 1, ()))
        if after_seq < read_after:
            read_after, unread = after_seq, self._read_events(job, after_seq, ended=ended)
        events = tuple(event for event in unread if event.seq > after_seq)
        if events:
            self._unread[run.nonce] = (read_after, unread)
        else:
            self._unread.pop(run.nonce, None)
        return events[:MAX_EVENTS]

    def _read_events(self, job: JobView, after_seq: int, *, ended: datetime | None) -> tuple[Event, ...]:
        pod = _newest(self._cache.pods(job.uid)).get(0)
        if pod is None:
            return ()
        try:
            return self._logs.events(pod, after_seq=after_seq)
        except NodeUnreachable as error:
            if ended and (self._clock() - ended).total_seconds() < LOG_PATIENCE_S:
                raise
            _log.warning("Job %s: events after %d are lost with its node. %s", job.name, after_seq, error)
            return self._logs.events(replace(pod, is_gone=True), after_seq=after_seq)

    def _read(self, job: JobView, per_node: int, *, rank: int, tail: int | None, offset: int) -> Iterator[bytes]:
        pod = _newest(self._cache.pods(job.uid)).get(rank // per_node)
        if pod is None or pod.is_gone:
            return iter(())
        first = rank // per_node * per_node
        return self._logs.read(pod, rank=rank, first_rank=first, tail=tail, offset=offset)

    def _look_at_foreign(self, job: JobView) -> ForeignJob:
        run = self._run_of(job)
        facts = Facts(
            job=job,
            pods=self._cache.pods(job.uid),
            warnings={uid: self._cache.warnings(uid) for uid in self._uids(job)},
            workload=self._cache.workload(job.uid),
            has_kueue=self._cache.has_kueue,
            processes_per_node=run.launch.processes_per_node if isinstance(run, Run) else 1,
            now=self._clock(),
            limits=self._limits,
        )
        return ForeignJob(
            namespace=job.namespace,
            uid=job.uid,
            name=job.name,
            create_time=job.create_time,
            run=run if isinstance(run, Run) else None,
            problem="" if isinstance(run, Run) else run,
            seen=judge(facts).seen,
        )

    def _uids(self, job: JobView) -> list[str]:
        return [job.uid, *(pod.uid for pod in self._cache.pods(job.uid))]

    def _run_of(self, job: JobView) -> Run | str:
        """What a Job says that it runs, read once; or why that cannot be read."""
        if job.uid not in self._foreign:
            try:
                self._foreign[job.uid] = Run.from_yaml(job.spec)
            except HoneError as error:
                self._foreign[job.uid] = str(error)
            except Exception as error:  # whatever a person wrote there
                self._foreign[job.uid] = f"Its request is not YAML: {error}"
        return self._foreign[job.uid]


_NOTHING_NEW = -1


def _is_recorded(job: JobView, run: Run) -> bool:
    """By what was stored before the Job was made; its labels are anybody's to change."""
    return job.nonce == run.nonce


def _newest(pods: tuple[PodView, ...]) -> dict[int, PodView]:
    """Of each node the newest pod, one that started before one that did not."""
    return {pod.index: pod for pod in sorted(pods, key=lambda pod: (pod.has_started, pod.create_time))}


def _owner(job: JobView) -> Owner:
    return Owner(namespace=job.namespace, job=job.job, attempt=job.attempt, nonce=job.nonce)


def _waiting(reason: str) -> Observation:
    return Observation(phase=Phase.WAITING, reason=reason)


def _taken(job: JobView) -> Observation:
    return _not_ours(f"Job {job.namespace}/{job.name} is not the one that was recorded: somebody else made it.")


def _not_ours(message: str) -> Observation:
    failure = Failure(
        failure_class=FailureClass.INTERNAL,
        message=message,
        next_step="It was left as it is. Find out who made it, then submit the job again.",
    )
    return Observation(phase=Phase.FAILED, failure=failure, final=True)
