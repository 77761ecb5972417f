"""The calls of the API, each from its message to its answer. server.py serves them; jobs.py does the work.

Reading a job's version is cheap and happens on the event loop, where the database is a file; everything else that asks
the database has a thread.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from hone import metrics
from hone.creation import Creation
from hone.errors import InvalidRequest, Violation
from hone.findings import Finding, of_error
from hone.job import Event, Job
from hone.jobs import Jobs
from hone.rpc import convert
from hone.rpc.auth import caller
from hone.rpc.batches import Batches
from hone.rpc.channel import MACHINE_KEY, is_on_this_machine
from hone.rpc.feed import HEARTBEAT_S, PAGE_EVENTS, Feed, Feeds
from hone.spec import JobSpec
from hone.spec.sources import sources
from hone.store import Store
from hone.v1 import report_service_pb2 as report_pb
from hone.v1 import training_service_pb2 as pb

THREADS = 8
LOOKS = 2
"""PreflightJob calls at once, which take minutes and have no part in these threads; others wait."""
CACHED_JOBS = 2048
LOG_LOOK_S = 0.5
"""How often a followed log is looked at."""
LOG_CHUNK_BYTES = 64 * 1024

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


class TrainingService:
    """What callers ask."""

    def __init__(self, jobs: Jobs, store: Store, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._jobs = jobs
        self._store = store
        self._heartbeat_s = heartbeat_s
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="hone-rpc")
        self._looks = ThreadPoolExecutor(LOOKS, thread_name_prefix="hone-preflight")
        self._cache: dict[tuple[str, int], bytes] = {}
        self.feeds = Feeds(self._open_feed)
        self._creations = Batches(self._create_all, name="hone-create")
        self._unsubscribe = store.subscribe(lambda job: self.feeds.tell(job.namespace))

    def close(self) -> None:
        """End every stream; calls under way finish."""
        self._unsubscribe()
        self.feeds.close()
        self._creations.close()
        self._threads.shutdown(wait=False)
        self._looks.shutdown(wait=False, cancel_futures=True)

    @property
    def methods(self) -> Mapping[str, Callable[[Any, Any], Any]]:
        """RPC name → handler. The names are compared with the proto when the server starts."""
        return {
            "PlanJob": self.plan,
            "PreflightJob": self.preflight,
            "CreateJob": self.create,
            "GetJob": self.get,
            "ListJobs": self.list,
            "CancelJob": self.cancel,
            "PauseJob": self.pause,
            "ResumeJob": self.resume,
            "DeleteJob": self.delete,
            "WatchJob": self.watch,
            "WatchJobs": self.watch_all,
            "StreamLogs": self.logs,
            "ListEvents": self.events,
            "QueryMetrics": self.metrics,
            "ListCheckpoints": self.checkpoints,
            "ListOutputs": self.outputs,
        }

    async def plan(self, request: pb.PlanJobRequest, context: Any) -> pb.PlanJobResponse:
        namespace = convert.split_namespace_name(request.parent)
        answer = pb.PlanJobResponse()
        try:
            spec = _own_spec(request, context)
            planned = await self._in_thread(self._jobs.plan, namespace, spec)
        except InvalidRequest as error:
            answer.violations.extend(convert.violation_to_message(violation) for violation in error.violations)
        else:
            convert.fill(answer, planned)
        return answer

    async def preflight(self, request: pb.PreflightJobRequest, context: Any) -> pb.PreflightJobResponse:
        namespace = convert.split_namespace_name(request.parent)
        try:
            spec = _own_spec(request, context)
        except InvalidRequest as error:
            found: Sequence[Finding] = list(of_error("request", error))
        else:
            look = partial(self._jobs.preflight, namespace, spec)
            found = await asyncio.get_running_loop().run_in_executor(self._looks, look)
        answer = pb.PreflightJobResponse()
        for finding in found:
            convert.fill(answer.findings.add(), finding)
        return answer

    async def create(self, request: pb.CreateJobRequest, context: Any) -> bytes:
        creation = Creation(
            namespace=convert.split_namespace_name(request.parent),
            spec=_own_spec(request, context),
            job_id=request.job_id,
            request_id=request.request_id,
            validate_only=request.validate_only,
            creator=caller.get(),
        )
        return await self._creations.do(creation)

    async def get(self, request: pb.GetJobRequest, context: Any) -> bytes:
        namespace, job_id = convert.split_job_name(request.name)
        key = await self._quickly(self._store.job_version, namespace, job_id)
        if key in self._cache:
            return self._cache[key]
        return self._bytes_of(await self._in_thread(self._jobs.get, namespace, job_id))

    async def list(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        namespace = convert.split_namespace_name(request.parent)
        return await self._in_thread(self._list, namespace, request)

    async def cancel(self, request: pb.CancelJobRequest, context: Any) -> bytes:
        return self._bytes_of(await self._in_thread(self._jobs.cancel, *convert.split_job_name(request.name)))

    async def pause(self, request: pb.PauseJobRequest, context: Any) -> bytes:
        return self._bytes_of(await self._in_thread(self._jobs.pause, *convert.split_job_name(request.name)))

    async def resume(self, request: pb.ResumeJobRequest, context: Any) -> bytes:
        return self._bytes_of(await self._in_thread(self._jobs.resume, *convert.split_job_name(request.name)))

    async def delete(self, request: pb.DeleteJobRequest, context: Any) -> bytes:
        namespace, job_id = convert.split_job_name(request.name)
        return self._bytes_of(await self._in_thread(self._jobs.delete, namespace, job_id, artifacts=request.artifacts))

    async def watch(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[Any]:
        namespace, job_id = convert.split_job_name(request.name)
        job = await self._in_thread(self._jobs.get, namespace, job_id)
        last_seq = await self._check_cursor(namespace, request.after_seq)
        if job.state.is_terminal:
            async for page in self._history(job, request.after_seq):
                yield pb.WatchJobResponse(events=map(convert.event_to_message, page), seq=page[-1].seq)
            return
        with self.feeds.of(namespace, last_seq=last_seq) as feed:
            async for answer in feed.watch(job.id, after_seq=request.after_seq):
                yield answer

    async def watch_all(self, request: pb.WatchJobsRequest, context: Any) -> AsyncIterator[Any]:
        namespace = convert.split_namespace_name(request.parent)
        last_seq = await self._check_cursor(namespace, request.after_seq)
        with self.feeds.of(namespace, last_seq=last_seq) as feed:
            async for answer in feed.watch("", after_seq=request.after_seq):
                yield answer

    async def logs(self, request: pb.StreamLogsRequest, context: Any) -> AsyncIterator[Any]:
        namespace, job_id = convert.split_job_name(request.name)
        job = await self._in_thread(self._jobs.get, namespace, job_id)
        while request.follow and not job.attempts and not job.state.is_terminal:
            await asyncio.sleep(LOG_LOOK_S)
            job = await self._in_thread(self._jobs.get, namespace, job.id)
        number = request.attempt or (job.attempts[-1].number if job.attempts else 0)
        offset = 0
        if request.HasField("tail"):
            offset = await self._in_thread(self._tail_offset, job, request, number)
        while True:
            ended = job.state.is_terminal or any(a.number == number and a.state.is_terminal for a in job.attempts)
            while data := await self._in_thread(self._log, job, request, number, offset):
                offset += len(data)
                yield pb.StreamLogsResponse(data=data)
            if ended or not request.follow:
                return
            await asyncio.sleep(LOG_LOOK_S)
            job = await self._in_thread(self._jobs.get, namespace, job.id)

    async def events(self, request: pb.ListEventsRequest, context: Any) -> pb.ListEventsResponse:
        namespace, job_id = _job_or_namespace(request.parent)
        limit = min(request.page_size or PAGE_EVENTS, PAGE_EVENTS)
        found = await self._in_thread(
            self._jobs.events, namespace, job_id=job_id, after_seq=request.after_seq, limit=limit
        )
        following = found[-1].seq if len(found) == limit else 0
        return pb.ListEventsResponse(events=map(convert.event_to_message, found), next_after_seq=following)

    async def metrics(self, request: pb.QueryMetricsRequest, context: Any) -> pb.QueryMetricsResponse:
        namespace, job_id = convert.split_job_name(request.name)
        found = await self._in_thread(
            self._jobs.metrics,
            namespace,
            job_id,
            names=tuple(request.metrics),
            min_step=request.min_step,
            max_step=request.max_step if request.HasField("max_step") else None,
        )
        answer = pb.QueryMetricsResponse()
        for series in found:
            convert.fill(answer.series.add(), series)
        return answer

    async def outputs(self, request: pb.ListOutputsRequest, context: Any) -> pb.ListOutputsResponse:
        namespace, job_id = convert.split_job_name(request.parent, field="parent")
        answer = pb.ListOutputsResponse()
        for output in await self._in_thread(self._jobs.outputs, namespace, job_id):
            convert.fill(answer.outputs.add(), output)
        return answer

    async def checkpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        namespace, job_id = convert.split_job_name(request.parent, field="parent")
        answer = pb.ListCheckpointsResponse()
        for checkpoint in await self._in_thread(self._jobs.checkpoints, namespace, job_id):
            convert.fill(answer.checkpoints.add(), checkpoint)
        return answer

    async def _quickly(
        self, function: Callable[_Arguments, _Answer], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Answer:
        """For what costs less than a thread; but a database elsewhere may not answer, and the loop waits for nobody."""
        if self._store.is_shared:
            return await self._in_thread(function, *args, **kwargs)
        return function(*args, **kwargs)

    async def _in_thread(
        self, function: Callable[_Arguments, _Answer], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Answer:
        loop, context = asyncio.get_running_loop(), copy_context()  # what is logged there is about the same job
        return await loop.run_in_executor(self._threads, lambda: context.run(function, *args, **kwargs))

    def _create_all(self, creations: Sequence[Creation]) -> Sequence[bytes | Exception]:
        answers = self._jobs.create_all(creations)
        return [self._created(*pair) for pair in zip(creations, answers, strict=True)]

    def _created(self, creation: Creation, answer: Job | Exception) -> bytes | Exception:
        if isinstance(answer, Exception):
            return answer
        return convert.job_to_message(answer).SerializeToString() if creation.validate_only else self._bytes_of(answer)

    def _list(self, namespace: str, request: pb.ListJobsRequest) -> pb.ListJobsResponse:
        page = self._jobs.list(
            namespace, page_size=request.page_size, page_token=request.page_token, filter=request.filter
        )
        answer = pb.ListJobsResponse(next_page_token=page.next_page_token)
        for job in page.jobs:
            answer.jobs.add().ParseFromString(self._bytes_of(job))
        return answer

    def _bytes_of(self, job: Job) -> bytes:
        """The message of a job, made once for each of its versions."""
        key = (job.uid, job.version)
        data = self._cache.get(key)
        if data is None:
            data = self._cache[key] = convert.job_to_message(job).SerializeToString()
            while len(self._cache) > CACHED_JOBS:
                self._cache.pop(next(iter(self._cache)), None)
        return data

    def _open_feed(self, namespace: str, last_seq: int) -> Feed:
        async def read(job_id: str, after_seq: int) -> Sequence[Event]:
            return await self._in_thread(
                self._jobs.events, namespace, job_id=job_id, after_seq=after_seq, limit=PAGE_EVENTS
            )

        return Feed(read, last_seq=last_seq, heartbeat_s=self._heartbeat_s)

    async def _history(self, job: Job, after_seq: int) -> AsyncIterator[Sequence[Event]]:
        while page := await self._in_thread(
            self._jobs.events, job.namespace, job_id=job.id, after_seq=after_seq, limit=PAGE_EVENTS
        ):
            yield page
            after_seq = page[-1].seq

    async def _check_cursor(self, namespace: str, after_seq: int) -> int:
        """The number of the newest event, which is not before the cursor."""
        last = await self._quickly(self._store.last_seq, namespace)
        if not 0 <= after_seq <= last:
            message = f"{after_seq} is no event of this namespace, whose last is {last}: watch from 0."
            raise InvalidRequest([Violation(path="after_seq", value=after_seq, message=message)])
        return last

    def _log(self, job: Job, request: pb.StreamLogsRequest, attempt: int, offset: int) -> bytes:
        found = self._jobs.logs(job.namespace, job.id, attempt=attempt, rank=request.rank, offset=offset)
        data = bytearray()
        for chunk in found:
            data += chunk
            if len(data) >= LOG_CHUNK_BYTES:
                break
        return bytes(data)

    def _tail_offset(self, job: Job, request: pb.StreamLogsRequest, attempt: int) -> int:
        """Where the last lines begin, so that what is written meanwhile is neither lost nor doubled."""
        if request.tail < 0:
            message = f"{request.tail} is negative: give a number of lines."
            raise InvalidRequest([Violation(path="tail", value=request.tail, message=message)])
        where = {"attempt": attempt, "rank": request.rank}
        whole = sum(len(chunk) for chunk in self._jobs.logs(job.namespace, job.id, **where))
        tail = sum(len(chunk) for chunk in self._jobs.logs(job.namespace, job.id, **where, tail=request.tail))
        return max(whole - tail, 0)


class ReportService:
    """What trainers tell."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    @property
    def methods(self) -> Mapping[str, Callable[[Any, Any], Any]]:
        """RPC name → handler."""
        return {"ReportEvents": self.report}

    async def report(self, request: report_pb.ReportEventsRequest, context: Any) -> report_pb.ReportEventsResponse:
        namespace, job_id = convert.split_job_name(request.job, field="job")
        events = [convert.from_message(Event, event) for event in request.events]
        acked = await asyncio.to_thread(self._jobs.report, namespace, job_id, request.attempt, request.nonce, events)
        if events:
            metrics.EVENT_LAG_SECONDS.observe(max(0.0, time.time() - events[-1].time.timestamp()))
        return report_pb.ReportEventsResponse(acked_seq=acked)


def _own_spec(request: pb.PlanJobRequest | pb.PreflightJobRequest | pb.CreateJobRequest, context: Any) -> JobSpec:
    """The request of a message, with sources that this machine can read. Raises InvalidRequest."""
    if not request.HasField("spec"):
        raise InvalidRequest([Violation(path="spec", message="is missing: the request itself.")])
    spec = convert.spec_from_message(request.spec)
    machine = dict(context.invocation_metadata() or ()).get(MACHINE_KEY)
    if not is_on_this_machine(context.peer(), machine):
        refuse_own_files(spec)
    return spec


def refuse_own_files(spec: JobSpec) -> None:
    """Refuse file:// sources of a caller whose files are not this machine's. Raises InvalidRequest."""
    found = [
        Violation(
            path=path,
            value=source,
            message=f"{source} is on the caller's machine, and this service runs on another: upload it, and give "
            "s3://bucket/prefix or hf://organisation/name.",
        )
        for path, source in sources(spec, scheme="file")
    ]
    if found:
        raise InvalidRequest(found)


def _job_or_namespace(parent: str) -> tuple[str, str]:
    if "/jobs/" in parent:
        return convert.split_job_name(parent, field="parent")
    return convert.split_namespace_name(parent), ""
