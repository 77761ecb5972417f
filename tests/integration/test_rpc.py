"""The API over a real server process on loopback, with the real store, reconciler and local backend, and the trainer's
own supervisor around a method that trains nothing."""

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hone.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    NotServed,
    Refused,
    RequestIdReused,
    TemporaryError,
    Unavailable,
    UserError,
    WrongState,
)
from hone.home import owner
from hone.job import Event, EventType, State
from hone.rpc import report
from hone.rpc.channel import MACHINE_KEY
from hone.rpc.client import AsyncClient, Client
from hone.rpc.server import LocalService
from hone.rpc.status import DETAILS_KEY
from hone.run import Run
from hone.settings import Settings
from hone.v1 import training_service_pb2 as pb

from .hone_server import MakeSpec, ServerProcess, end_runs, quick, running, stub_of, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for every test that does not stop it; each test has a namespace of its own."""
    place = tmp_path_factory.mktemp("service")
    script = place / "quick-python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent / "quick_trainer.py"}" "$@"\n')
    script.chmod(0o755)
    with running(ServerProcess(place / "home", script)) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Client]:
    namespace = f"test-{abs(hash(request.node.nodeid)) % 10**9}"
    with Client(server.address, namespace=namespace) as client:
        yield client
        end_runs(client)


@pytest.fixture
def own_server(tmp_path: Path, quick_python: Path) -> Iterator[ServerProcess]:
    """A server that may be killed."""
    with running(ServerProcess(tmp_path / "home", quick_python)) as server:
        yield server


@pytest.fixture
def own_client(own_server: ServerProcess) -> Iterator[Client]:
    with Client(own_server.address) as client:
        yield client
        end_runs(client)


def test_a_job_runs_to_its_end_and_leaves_what_it_promised(client: Client, make_spec: MakeSpec, tmp_path: Path) -> None:
    job = client.submit(quick(make_spec, steps=5))
    events = list(client.watch(job.id))
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    assert (events[-1].type, events[-1].fields["state"]) == (EventType.STATE, "SUCCEEDED")
    assert [event.step for event in events if event.type == EventType.PROGRESS] == [1, 2, 3, 4, 5]
    assert list(client.events(job.id)) == events
    ended = client.wait(job.id)
    assert ended.state is State.SUCCEEDED
    assert ended.requested_spec == job.requested_spec
    (series,) = client.metrics(job.id, names=["loss"])
    assert [point.value for point in series.points] == [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert [output.kind for output in client.outputs(job.id)] == ["adapter"]
    done: list[tuple[int, int]] = []
    (directory,) = client.download(job.id, tmp_path / "out", progress=lambda *at: done.append(at))
    assert (directory / "adapter_model.safetensors").read_bytes() == b"weights"
    assert done[-1][0] == done[-1][1] > 0
    with pytest.raises(UserError, match="has no output merged"):
        client.download(job.id, tmp_path / "out", kind="merged")


def test_a_watch_goes_on_over_a_server_that_is_killed_and_misses_and_doubles_nothing(
    own_server: ServerProcess, own_client: Client, make_spec: MakeSpec
) -> None:
    job = own_client.submit(quick(make_spec, steps=60, pause_ms=50))
    seen: list[Event] = []
    watcher = threading.Thread(target=lambda: seen.extend(own_client.watch(job.id)))
    watcher.start()
    wait_until(lambda: own_client.get(job.id).progress is not None)
    own_server.end(signal.SIGKILL)
    own_server.start()
    watcher.join(60)
    assert not watcher.is_alive()
    assert own_client.get(job.id).state is State.SUCCEEDED
    assert seen == list(own_client.events(job.id))
    assert [event.step for event in seen if event.type == EventType.PROGRESS] == list(range(1, 61))
    middle = seen[len(seen) // 2].seq
    assert list(own_client.watch(job.id, after_seq=middle)) == [event for event in seen if event.seq > middle]


def test_every_watcher_of_a_namespace_sees_every_event_once(client: Client, make_spec: MakeSpec) -> None:
    collected: list[list[Event]] = [[] for _ in range(8)]

    def collect(into: list[Event]) -> None:
        for event in client.watch_all():
            into.append(event)
            if [e.fields.get("state") for e in into].count("SUCCEEDED") == 2:
                return

    watchers = [threading.Thread(target=collect, args=(into,)) for into in collected]
    for watcher in watchers[:4]:
        watcher.start()
    jobs = [client.submit(quick(make_spec, steps=20, name=name)) for name in ("one", "two")]
    for watcher in watchers[4:]:
        watcher.start()
    for watcher in watchers:
        watcher.join(60)
    last = max(event.seq for event in collected[0])
    assert collected[0] == [event for event in client.events() if event.seq <= last]
    assert all(found == collected[0] for found in collected)
    assert {event.job for event in collected[0]} == {job.id for job in jobs}


def test_the_same_request_id_makes_one_job_and_another_body_is_told(client: Client, make_spec: MakeSpec) -> None:
    spec = quick(make_spec, steps=2)
    first = client.submit(spec, request_id="r-1")
    assert client.submit(spec, request_id="r-1").uid == first.uid
    with pytest.raises(RequestIdReused, match="r-1"):
        client.submit(quick(make_spec, steps=3), request_id="r-1")
    with pytest.raises(AlreadyExists, match=first.id) as taken:
        client.submit(spec, job_id=first.id)
    assert taken.value.reason == "JOB_ID_TAKEN"
    assert len(list(client.list())) == 1


def test_validate_only_records_nothing(client: Client, make_spec: MakeSpec) -> None:
    job = client.submit(quick(make_spec), validate_only=True)
    assert job.plan.fits
    assert list(client.list()) == []
    with pytest.raises(NotFound):
        client.get(job.id)


def test_listing_pages_filters_and_refuses_tokens_of_other_listings(client: Client, make_spec: MakeSpec) -> None:
    ids = [client.submit(quick(make_spec, labels={"n": str(n % 2)}), job_id=f"job-{n}").id for n in range(5)]
    assert [job.id for job in client.list(page_size=2)] == ids[::-1]
    assert [job.id for job in client.list(limit=3, page_size=2)] == ids[:1:-1]
    assert [job.id for job in client.list(filter='labels.n = "1"')] == ["job-3", "job-1"]
    stub, parent = stub_of(client), f"namespaces/{client.namespace}"
    token = stub.ListJobs(pb.ListJobsRequest(parent=parent, page_size=2)).next_page_token
    for request in (
        pb.ListJobsRequest(parent=parent, page_token=token, filter="state = FAILED"),
        pb.ListJobsRequest(parent=parent, page_token="nonsense"),
        pb.ListJobsRequest(parent=parent, page_size=-1),
        pb.ListJobsRequest(parent=parent, filter="colour = blue"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListJobs(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_job_is_cancelled_once_and_deleted_when_it_has_ended(client: Client, make_spec: MakeSpec) -> None:
    job = client.submit(quick(make_spec, steps=2000, pause_ms=20))
    wait_until(lambda: client.get(job.id).progress is not None)
    with pytest.raises(WrongState, match="RUNNING"):
        client.delete(job.id)
    assert client.cancel(job.id).state in (State.CANCELLING, State.CANCELLED)
    assert client.cancel(job.id).state in (State.CANCELLING, State.CANCELLED)
    assert client.wait(job.id, timeout_s=60).state is State.CANCELLED
    assert client.delete(job.id).delete_time is not None
    wait_until(lambda: not list(client.list()))
    with pytest.raises(NotFound):
        client.get(job.id)


def test_waiting_has_an_end(client: Client, make_spec: MakeSpec) -> None:
    job = client.submit(quick(make_spec, steps=2000, pause_ms=20))
    with pytest.raises(TemporaryError, match="in time"):
        client.wait(job.id, timeout_s=0.3)


def test_logs_are_followed_from_before_the_start_to_the_end(client: Client, make_spec: MakeSpec) -> None:
    job = client.submit(quick(make_spec, labels={"ending": "crash"}, scheduling={"max_attempts": 1}))
    followed = "".join(client.logs(job.id, follow=True))
    assert "the last line before the end" in followed
    assert client.wait(job.id).state is State.FAILED
    whole = "".join(client.logs(job.id))
    assert whole == followed
    assert "".join(client.logs(job.id, tail=2)) == "".join(whole.splitlines(keepends=True)[-2:])
    with pytest.raises(InvalidRequest, match="rank"):
        list(client.logs(job.id, rank=7))
    with pytest.raises(NotFound, match="attempt 9"):
        list(client.logs(job.id, attempt=9))


def test_a_plan_tells_every_violation_in_its_body(server: ServerProcess, client: Client, make_spec: MakeSpec) -> None:
    good = client.plan(quick(make_spec))
    assert good.plan and good.plan.fits and good.spec and good.runs_here and good.manifest == ""
    request = pb.PlanJobRequest(parent="namespaces/default")
    request.spec.name = "Not A Name"
    request.spec.method.sft.max_length = 1
    request.spec.training.learning_rate = 70
    answer = stub_of(client).PlanJob(request)
    assert {found.path for found in answer.violations} >= {
        "name",
        "model",
        "method.sft.max_length",
        "training.learning_rate",
    }
    here = client.plan({"name": "x", "modle": {"source": "hf://a/b"}})
    assert any("Did you mean model" in str(violation) for violation in here.violations)


def test_a_look_before_a_job_finds_everything_at_once_and_records_nothing(
    client: Client, make_spec: MakeSpec, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1"}\n')
    model = {"source": make_spec().model.source, "tokenizer": f"file://{tmp_path}"}
    spec = make_spec(model=model, dataset={"source": f"file://{rows}"}, output={"hub": {"repo": "o/n"}})
    found = {finding.check: finding for finding in client.preflight(spec)}
    states = {check: str(finding.state) for check, finding in found.items()}
    wrong = {"tokenizer": "FAILED", "data": "NOT_CHECKED", "hub": "FAILED"}
    assert states == {"store": "OK", "plan": "OK", "model": "OK", **wrong}
    assert found["tokenizer"].path == "model.tokenizer" and "has no tokenizer" in found["tokenizer"].message
    assert found["hub"].path == "output.hub.repo" and "HF_TOKEN" in found["hub"].message
    missing = make_spec(dataset={"source": f"file://{tmp_path}/nowhere.jsonl"})
    [machine] = [finding for finding in client.preflight(missing) if finding.check == "machine"]
    assert (machine.path, str(machine.state)) == ("dataset.source", "FAILED")
    assert list(client.list()) == []


def test_a_look_at_a_chain_waits_for_what_is_not_there(client: Client, make_spec: MakeSpec) -> None:
    job = client.submit(quick(make_spec, steps=10_000, pause_ms=20))
    merge = {"merge": {"adapters": [{"source": f"job://{job.id}/adapter"}]}}
    spec = make_spec(method=merge, adapter=None, dataset=None, training={})
    [inputs] = [finding for finding in client.preflight(spec) if finding.check == "inputs"]
    assert str(inputs.state) == "NOT_CHECKED" and f"waits for the adapter of job {job.id}" in inputs.message
    client.cancel(job.id)


def error_table() -> list[Any]:
    parent, nothing = "namespaces/default", "namespaces/default/jobs/nothing"
    return [
        ("GetJob", pb.GetJobRequest(name=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("GetJob", pb.GetJobRequest(name="nothing"), "INVALID_ARGUMENT", "INVALID_FIELDS"),
        ("CreateJob", pb.CreateJobRequest(parent=parent), "INVALID_ARGUMENT", "INVALID_FIELDS"),
        ("CreateJob", pb.CreateJobRequest(parent="x"), "INVALID_ARGUMENT", "INVALID_FIELDS"),
        ("CancelJob", pb.CancelJobRequest(name=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("DeleteJob", pb.DeleteJobRequest(name=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("PauseJob", pb.PauseJobRequest(name=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("ResumeJob", pb.ResumeJobRequest(name=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("PreflightJob", pb.PreflightJobRequest(parent="x"), "INVALID_ARGUMENT", "INVALID_FIELDS"),
        ("ListCheckpoints", pb.ListCheckpointsRequest(parent=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("ListEvents", pb.ListEventsRequest(parent=parent, after_seq=-1), "INVALID_ARGUMENT", "INVALID_FIELDS"),
        ("QueryMetrics", pb.QueryMetricsRequest(name=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("ListOutputs", pb.ListOutputsRequest(parent=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("WatchJob", pb.WatchJobRequest(name=nothing), "NOT_FOUND", "NOT_FOUND"),
        ("WatchJobs", pb.WatchJobsRequest(parent=parent, after_seq=10**9), "INVALID_ARGUMENT", "INVALID_FIELDS"),
        ("StreamLogs", pb.StreamLogsRequest(name=nothing), "NOT_FOUND", "NOT_FOUND"),
    ]


def test_every_error_has_its_code_and_its_reason(client: Client) -> None:
    stub = stub_of(client)
    for method, request, code, reason in error_table():
        with pytest.raises(grpc.RpcError) as failed:
            answer = getattr(stub, method)(request)
            list(answer) if method.startswith(("Watch", "Stream")) else answer
        assert failed.value.code().name == code, method
        found = status_pb2.Status.FromString(details_of(failed.value))
        info = error_details_pb2.ErrorInfo()
        assert found.details[0].Unpack(info) and info.reason == reason, method


def test_what_a_later_version_serves_is_refused_and_nothing_is_recorded(client: Client, make_spec: MakeSpec) -> None:
    split = {"strategy": "zero3", "processes_per_node": 2}
    with pytest.raises(NotServed, match="strategy zero3"):
        client.submit(make_spec(compute=split, quantization="nf4", adapter={"lora": {}}))
    assert list(client.list()) == []


def test_files_of_another_machine_are_refused_with_the_fix(client: Client, make_spec: MakeSpec) -> None:
    from hone.rpc import calls

    request: Any = calls.submit("default", quick(make_spec)).request
    with pytest.raises(grpc.RpcError) as refused:
        stub_of(client).CreateJob(request, metadata=((MACHINE_KEY, "another"),))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = status_pb2.Status.FromString(details_of(refused.value))
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in found.details)
    assert {violation.field for violation in bad.field_violations} == {"model.source", "dataset.source"}
    assert all("s3://" in violation.description for violation in bad.field_violations)
    answer = stub_of(client).PlanJob(
        pb.PlanJobRequest(parent="namespaces/default", spec=request.spec), metadata=((MACHINE_KEY, "another"),)
    )
    assert {violation.path for violation in answer.violations} == {"model.source", "dataset.source"}


def test_a_request_that_is_too_large_is_refused(client: Client, make_spec: MakeSpec) -> None:
    big = make_spec(model={"source": make_spec().model.source, "system_prompt": "x" * (5 * 2**20)})
    with pytest.raises(Refused, match="larger"):
        client.submit(big)


def test_only_the_attempts_own_trainer_may_report(server: ServerProcess, client: Client, make_spec: MakeSpec) -> None:
    job = client.submit(quick(make_spec, steps=2000, pause_ms=20))
    wait_until(lambda: client.get(job.id).progress is not None)
    job = client.get(job.id)
    run = Run(namespace=client.namespace, job=job.id, attempt=1, nonce="guessed", spec=job.resolved_spec,
              launch=job.plan.launch, store="file:///nowhere", inputs={})  # fmt: skip
    reporter = report.Reporter(server.address, run)
    with pytest.raises(Refused, match="not attempt 1"):
        reporter.send([Event(seq=1, time=job.create_time, type="note")])
    reporter.close()


def test_the_server_says_that_it_serves_and_describes_itself(server: ServerProcess) -> None:
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "hone.v1.TrainingService", "hone.v1.ReportService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        described = ProtoReflectionDescriptorDatabase(channel)
        assert "hone.v1.TrainingService" in described.get_services()
        service = DescriptorPool(described).FindServiceByName("hone.v1.TrainingService")
        assert "CreateJob" in service.methods_by_name


def test_a_stopped_server_ends_streams_so_that_they_resume_and_leaves_runs_alone(
    own_server: ServerProcess, own_client: Client, make_spec: MakeSpec
) -> None:
    job = own_client.submit(quick(make_spec, steps=60, pause_ms=50))
    wait_until(lambda: own_client.get(job.id).progress is not None)
    stream = stub_of(own_client).WatchJob(pb.WatchJobRequest(name=f"namespaces/default/jobs/{job.id}"))
    next(stream)
    assert own_server.end(signal.SIGTERM) == 0
    with pytest.raises(grpc.RpcError) as ended:
        list(stream)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "Traceback" not in own_server.log
    own_server.start()
    assert own_client.wait(job.id, timeout_s=60).state is State.SUCCEEDED


def test_a_port_that_is_taken_and_an_open_address_are_refused_with_the_fix(
    server: ServerProcess, tmp_path: Path
) -> None:
    from hone.rpc.server import serve

    for address, kind, fix in (
        (server.address, Unavailable, "another port"),
        ("0.0.0.0:7465", UserError, "ssh -L"),
        ("nowhere", UserError, "host:port"),
    ):
        with pytest.raises(kind, match=fix):
            asyncio.run(serve(Settings(home=tmp_path / "other", address=address)))
    with pytest.raises(WrongState, match="owns"):
        asyncio.run(serve(Settings(home=server.home, address="127.0.0.1:0")))


def test_nobody_there_is_one_sentence_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(f"unix:{tmp_path / 'nobody.sock'}") as client, pytest.raises(Unavailable, match="hone serve"):
        client.get("x")
    monkeypatch.setenv("HONE_HOME", str(tmp_path))
    monkeypatch.delenv("HONE_SERVER", raising=False)
    with pytest.raises(Unavailable, match="No Hone service is known here"):
        Client()


def test_the_client_finds_the_service_that_owns_the_home(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_HOME", str(server.home))
    monkeypatch.delenv("HONE_SERVER", raising=False)
    with Client() as client:
        assert client.server == server.address
        with pytest.raises(NotFound):
            client.get("nothing")


def test_a_service_in_this_process_runs_a_job(tmp_path: Path, quick_python: Path, make_spec: MakeSpec) -> None:
    settings = Settings(home=tmp_path / "home", trainer_python=str(quick_python))
    with LocalService(settings) as local, Client(local.address) as client:
        job = client.submit(quick(make_spec))
        assert client.wait(job.id, timeout_s=60).state is State.SUCCEEDED
        with pytest.raises(WrongState, match="owns"), LocalService(settings):
            pass
    assert owner(tmp_path / "home") is None


def test_the_client_for_asyncio_has_the_same_methods_and_answers(
    server: ServerProcess, client: Client, make_spec: MakeSpec, tmp_path: Path
) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(AsyncClient) == public(Client)

    async def everything() -> None:
        async with AsyncClient(server.address, namespace=client.namespace) as other:
            assert (await other.plan(quick(make_spec))).runs_here
            job = await other.submit(quick(make_spec))
            events = [event async for event in other.watch(job.id)]
            assert events == list(client.events(job.id)) == [event async for event in other.events(job.id)]
            assert await other.wait(job.id) == await other.get(job.id) == client.get(job.id)
            assert [found.id async for found in other.list()] == [job.id]
            assert "".join([text async for text in other.logs(job.id)]) == "".join(client.logs(job.id))
            assert await other.metrics(job.id) == client.metrics(job.id)
            assert await other.outputs(job.id) == client.outputs(job.id)
            assert await other.checkpoints(job.id) == client.checkpoints(job.id) == []
            for call in (other.pause, other.resume):
                with pytest.raises(WrongState, match="SUCCEEDED"):
                    await call(job.id)
            assert await other.download(job.id, tmp_path / "out") == [tmp_path / "out" / "adapter"]
            with pytest.raises(NotFound):
                await other.cancel("nothing")
            assert (await other.delete(job.id)).delete_time is not None

    asyncio.run(everything())


def details_of(error: Any) -> bytes:
    found: bytes = dict(error.trailing_metadata())[DETAILS_KEY]
    return found
