"""AsyncClient: the methods of Client, for asyncio. client.py's texts hold here too."""

import asyncio
import codecs
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
from tenacity import AsyncRetrying

from hone.errors import InvalidRequest
from hone.findings import Finding
from hone.job import Checkpoint, Event, Job, MetricSeries, Output
from hone.rpc import calls, retry
from hone.rpc.access import default_access
from hone.rpc.calls import Call, PlanAnswer, SpecLike
from hone.rpc.channel import default_namespace, default_server
from hone.rpc.download import Progress, download
from hone.rpc.retry import Reconnects, typed_errors
from hone.v1 import training_service_pb2_grpc

_Answer = TypeVar("_Answer")


class AsyncClient:
    """Talks to a Hone service; made and used on one event loop. Close it, or use it with `async with`."""

    def __init__(
        self,
        server: str = "",
        *,
        namespace: str = "",
        timeout_s: float = 30.0,
        token: str = "",
        tls_ca: Path | str | None = None,
    ) -> None:
        self.server = server or default_server()
        self.namespace = namespace or default_namespace()
        self._timeout_s = timeout_s
        self._access = default_access(token=token, tls_ca=tls_ca)
        self._channel = self._access.open_aio(self.server)
        self._stub = training_service_pb2_grpc.TrainingServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def plan(self, spec: SpecLike) -> PlanAnswer:
        """What would run, or every violation of the request; records nothing."""
        try:
            return await self._call(calls.plan(self.namespace, calls.read_spec(spec)))
        except InvalidRequest as error:
            return calls.wrong_plan(error)

    async def preflight(self, spec: SpecLike) -> Sequence[Finding]:
        """What a look outside finds: model, data set, store and all else that the request names."""
        call = calls.preflight(self.namespace, calls.read_spec(spec))
        return await self._call(call, timeout_s=max(self._timeout_s, calls.PREFLIGHT_TIMEOUT_S))

    async def submit(
        self, spec: SpecLike, *, job_id: str = "", request_id: str = "", validate_only: bool = False
    ) -> Job:
        """Create a job; it is durable when this returns."""
        call = calls.submit(self.namespace, spec, job_id=job_id, request_id=request_id, validate_only=validate_only)
        return await self._call(call)

    async def get(self, job: str) -> Job:
        """A job by its id, or by its name while only one has it."""
        return await self._call(calls.get(self.namespace, job))

    async def list(self, *, filter: str = "", limit: int | None = None, page_size: int = 50) -> AsyncIterator[Job]:
        """Jobs, newest first."""
        token, left = "", limit
        while left is None or left > 0:
            size = page_size if left is None else min(page_size, left)
            page = await self._call(calls.page(self.namespace, filter=filter, page_size=size, page_token=token))
            for job in page.jobs:
                yield job
            token = page.next_page_token
            if not token:
                return
            left = None if left is None else left - len(page.jobs)

    async def cancel(self, job: str) -> Job:
        """Ask a job to end; once more is no error."""
        return await self._call(calls.cancel(self.namespace, job))

    async def pause(self, job: str) -> Job:
        """Free what a job holds, after a checkpoint; it is PAUSED when that is done."""
        return await self._call(calls.pause(self.namespace, job))

    async def resume(self, job: str) -> Job:
        """Have a paused job go on from its last checkpoint; once more is no error."""
        return await self._call(calls.resume(self.namespace, job))

    async def delete(self, job: str, *, artifacts: bool = False) -> Job:
        """Forget a job that has ended, and what it left when asked."""
        return await self._call(calls.delete(self.namespace, job, artifacts=artifacts))

    def watch(self, job: str, *, after_seq: int = 0) -> AsyncIterator[Event]:
        """Events of a job after a number, until it has ended."""
        return self._watch(job, after_seq, timeout_s=None)

    def watch_all(self, *, after_seq: int = 0) -> AsyncIterator[Event]:
        """Events of every job of the namespace, for ever."""
        return self._watch("", after_seq, timeout_s=None)

    async def wait(self, job: str, *, timeout_s: float | None = None) -> Job:
        """The job when it has ended. Raises TemporaryError when the time is over first."""
        async for _ in self._watch(job, 0, timeout_s=timeout_s):
            pass
        return await self.get(job)

    async def logs(
        self, job: str, *, follow: bool = False, tail: int | None = None, rank: int = 0, attempt: int = 0
    ) -> AsyncIterator[str]:
        """What a rank printed, as text in pieces cut anywhere."""
        request = calls.logs(self.namespace, job, follow=follow, tail=tail, rank=rank, attempt=attempt)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        stream = self._stub.StreamLogs(request, metadata=self._access.metadata())
        try:
            with typed_errors(self.server):
                async for answer in stream:
                    yield decoder.decode(answer.data)
        finally:
            stream.cancel()
        if rest := decoder.decode(b"", final=True):
            yield rest

    async def events(self, job: str = "", *, after_seq: int = 0) -> AsyncIterator[Event]:
        """Events that were, of one job or of the namespace."""
        while True:
            found, after_seq = await self._call(calls.events(self.namespace, job, after_seq=after_seq))
            for event in found:
                yield event
            if not after_seq:
                return

    async def metrics(self, job: str, *, names: Sequence[str] = ()) -> Sequence[MetricSeries]:
        """Reported numbers; those names, or all."""
        return await self._call(calls.metrics(self.namespace, job, names=names))

    async def outputs(self, job: str) -> Sequence[Output]:
        """Complete outputs."""
        return await self._call(calls.outputs(self.namespace, job))

    async def checkpoints(self, job: str) -> Sequence[Checkpoint]:
        """What the job's trainers saved to go on from, in that order; what was removed since is not complete."""
        return await self._call(calls.checkpoints(self.namespace, job))

    async def download(
        self, job: str, directory: Path, *, kind: str = "", progress: Progress | None = None
    ) -> Sequence[Path]:
        """Fetch outputs into `directory/<kind>`, each file verified."""
        found = calls.chosen(await self.outputs(job), job=job, kind=kind)
        return await asyncio.to_thread(download, found, directory, progress=progress)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, call: Call[_Answer], *, timeout_s: float | None = None) -> _Answer:
        method = getattr(self._stub, call.method)
        async for attempt in AsyncRetrying(**retry.CALLS):
            with attempt, typed_errors(self.server):
                limit = timeout_s or self._timeout_s
                answer = await method(call.request, timeout=limit, metadata=self._access.metadata())
        return call.read(answer)

    async def _watch(self, job: str, after_seq: int, *, timeout_s: float | None) -> AsyncIterator[Event]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        reconnects = Reconnects(self.server)
        while True:
            method, request = calls.watch(self.namespace, job, after_seq=after_seq)
            metadata = self._access.metadata()
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            stream = getattr(self._stub, method)(request, timeout=left, metadata=metadata)
            try:
                async for answer in stream:
                    reconnects.succeeded()
                    for event in calls.read_events(answer):
                        yield event
                    after_seq = answer.seq
                return
            except grpc.RpcError as error:
                pause_s = reconnects.pause_s(error, has_new_token=self._access.metadata() != metadata)
            finally:
                stream.cancel()
            await asyncio.sleep(pause_s)
