"""Clients for other Python services: Client, and AsyncClient with the same methods for asyncio.

    with Client() as client:
        job = client.submit("request.yaml")
        for event in client.watch(job.id):
            print(event.message)
        client.download(job.id, Path("out"))

Answers are hone.job's types, errors hone.errors'. Only Unavailable is retried, a few times; a submission keeps its
request id over that, so it makes one job. Watching goes on by itself where it was cut. The base dependencies suffice.
"""

import codecs
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
from tenacity import Retrying

from hone.errors import InvalidRequest
from hone.findings import Finding
from hone.job import Checkpoint, Event, Job, MetricSeries, Output
from hone.rpc import calls, retry
from hone.rpc.access import default_access
from hone.rpc.async_client import AsyncClient
from hone.rpc.calls import Call, PlanAnswer, SpecLike
from hone.rpc.channel import default_namespace, default_server
from hone.rpc.download import Progress, download
from hone.rpc.retry import Reconnects, typed_errors
from hone.v1 import training_service_pb2_grpc

__all__ = ["AsyncClient", "Client", "PlanAnswer"]

_Answer = TypeVar("_Answer")


class Client:
    """Talks to a Hone service. Safe to use from several threads; close it, or use it as a context manager."""

    def __init__(
        self,
        server: str = "",
        *,
        namespace: str = "",
        timeout_s: float = 30.0,
        token: str = "",
        tls_ca: Path | str | None = None,
    ) -> None:
        """`server` is host:port or unix:/path; without one it is HONE_SERVER, else the service that owns HONE_HOME.

        `timeout_s` is for each call but the streams. `token` is a bearer token of the audience `hone`; without one it
        is HONE_TOKEN, else the content of HONE_TOKEN_FILE at each call. `tls_ca` are the certificates (PEM) that the
        service's is checked against; without them HONE_TLS_CA, else those that this machine trusts. Only a service on
        this machine is talked to in plain text. Raises Unavailable when there is no service to talk to.
        """
        self.server = server or default_server()
        self.namespace = namespace or default_namespace()
        self._timeout_s = timeout_s
        self._access = default_access(token=token, tls_ca=tls_ca)
        self._channel = self._access.open(self.server)
        self._stub = training_service_pb2_grpc.TrainingServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def plan(self, spec: SpecLike) -> PlanAnswer:
        """What would run, or every violation of the request; records nothing."""
        try:
            return self._call(calls.plan(self.namespace, calls.read_spec(spec)))
        except InvalidRequest as error:
            return calls.wrong_plan(error)

    def preflight(self, spec: SpecLike) -> Sequence[Finding]:
        """What a look outside finds: model, data set, store and all else that the request names; records nothing. It
        would run where no finding is FAILED. May take minutes, where the service has large files to look at."""
        call = calls.preflight(self.namespace, calls.read_spec(spec))
        return self._call(call, timeout_s=max(self._timeout_s, calls.PREFLIGHT_TIMEOUT_S))

    def submit(self, spec: SpecLike, *, job_id: str = "", request_id: str = "", validate_only: bool = False) -> Job:
        """Create a job; it is durable when this returns. Raises InvalidRequest with every violation, AlreadyExists."""
        call = calls.submit(self.namespace, spec, job_id=job_id, request_id=request_id, validate_only=validate_only)
        return self._call(call)

    def get(self, job: str) -> Job:
        """A job by its id, or by its name while only one has it. Raises NotFound."""
        return self._call(calls.get(self.namespace, job))

    def list(self, *, filter: str = "", limit: int | None = None, page_size: int = 50) -> Iterator[Job]:
        """Jobs, newest first; `filter` such as `state = RUNNING AND labels.team = "nlp"`."""
        token, left = "", limit
        while left is None or left > 0:
            size = page_size if left is None else min(page_size, left)
            page = self._call(calls.page(self.namespace, filter=filter, page_size=size, page_token=token))
            yield from page.jobs
            token = page.next_page_token
            if not token:
                return
            left = None if left is None else left - len(page.jobs)

    def cancel(self, job: str) -> Job:
        """Ask a job to end; once more is no error."""
        return self._call(calls.cancel(self.namespace, job))

    def pause(self, job: str) -> Job:
        """Free what a job holds, after a checkpoint; it is PAUSED when that is done. Once more is no error. Raises
        WrongState for one that is being cancelled or has ended."""
        return self._call(calls.pause(self.namespace, job))

    def resume(self, job: str) -> Job:
        """Have a paused job go on from its last checkpoint; once more is no error. Raises WrongState for one that is
        still being paused or cancelled, or has ended."""
        return self._call(calls.resume(self.namespace, job))

    def delete(self, job: str, *, artifacts: bool = False) -> Job:
        """Forget a job that has ended, and what it left when asked. Raises WrongState while it has not."""
        return self._call(calls.delete(self.namespace, job, artifacts=artifacts))

    def watch(self, job: str, *, after_seq: int = 0) -> Iterator[Event]:
        """Events of a job after a number, until it has ended: each once, in order, over cut connections too."""
        return self._watch(job, after_seq, timeout_s=None)

    def watch_all(self, *, after_seq: int = 0) -> Iterator[Event]:
        """Events of every job of the namespace, for ever."""
        return self._watch("", after_seq, timeout_s=None)

    def wait(self, job: str, *, timeout_s: float | None = None) -> Job:
        """The job when it has ended. Raises TemporaryError when the time is over first."""
        for _ in self._watch(job, 0, timeout_s=timeout_s):
            pass
        return self.get(job)

    def logs(
        self, job: str, *, follow: bool = False, tail: int | None = None, rank: int = 0, attempt: int = 0
    ) -> Iterator[str]:
        """What a rank printed, as text in pieces cut anywhere; with `follow` until the attempt has ended."""
        request = calls.logs(self.namespace, job, follow=follow, tail=tail, rank=rank, attempt=attempt)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        stream = self._stub.StreamLogs(request, metadata=self._access.metadata())
        try:
            with typed_errors(self.server):
                for answer in stream:
                    yield decoder.decode(answer.data)
        finally:
            stream.cancel()
        if rest := decoder.decode(b"", final=True):
            yield rest

    def events(self, job: str = "", *, after_seq: int = 0) -> Iterator[Event]:
        """Events that were, of one job or of the namespace."""
        while True:
            found, after_seq = self._call(calls.events(self.namespace, job, after_seq=after_seq))
            yield from found
            if not after_seq:
                return

    def metrics(self, job: str, *, names: Sequence[str] = ()) -> Sequence[MetricSeries]:
        """Reported numbers; those names, or all."""
        return self._call(calls.metrics(self.namespace, job, names=names))

    def outputs(self, job: str) -> Sequence[Output]:
        """Complete outputs."""
        return self._call(calls.outputs(self.namespace, job))

    def checkpoints(self, job: str) -> Sequence[Checkpoint]:
        """What the job's trainers saved to go on from, in that order; what was removed since is not complete."""
        return self._call(calls.checkpoints(self.namespace, job))

    def download(
        self, job: str, directory: Path, *, kind: str = "", progress: Progress | None = None
    ) -> Sequence[Path]:
        """Fetch outputs into `directory/<kind>`, each file verified; straight from the store, with the caller's own
        credentials. Raises UserError when there is none, IntegrityError."""
        found = calls.chosen(self.outputs(job), job=job, kind=kind)
        return download(found, directory, progress=progress)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, call: Call[_Answer], *, timeout_s: float | None = None) -> _Answer:
        method = getattr(self._stub, call.method)
        for attempt in Retrying(**retry.CALLS):
            with attempt, typed_errors(self.server):
                answer = method(call.request, timeout=timeout_s or self._timeout_s, metadata=self._access.metadata())
        return call.read(answer)

    def _watch(self, job: str, after_seq: int, *, timeout_s: float | None) -> Iterator[Event]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        reconnects = Reconnects(self.server)
        while True:
            method, request = calls.watch(self.namespace, job, after_seq=after_seq)
            metadata = self._access.metadata()
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            stream = getattr(self._stub, method)(request, timeout=left, metadata=metadata)
            try:
                for answer in stream:
                    reconnects.succeeded()
                    yield from calls.read_events(answer)
                    after_seq = answer.seq
                return
            except grpc.RpcError as error:
                pause_s = reconnects.pause_s(error, has_new_token=self._access.metadata() != metadata)
            finally:
                stream.cancel()
            time.sleep(pause_s)
