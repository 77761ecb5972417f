"""TLS and callers over a real server on this machine; what Kubernetes says is in rights.py, and what a caller may is
told by Server as `hone serve` builds it."""

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hone.errors import ClusterError, InvalidRequest, NotFound, Refused, Unauthenticated, Unavailable, UserError
from hone.job import Event, EventType, State
from hone.monitor import CLUSTER, Check
from hone.rpc.auth import CALLERS, TRAINERS, CallerGate, TokenInfo, TrainerGate
from hone.rpc.client import AsyncClient, Client
from hone.rpc.listening import Gates
from hone.rpc.report import Reporter
from hone.rpc.server import serve
from hone.rpc.status import DETAILS_KEY
from hone.run import Run
from hone.service import Service
from hone.settings import Settings
from hone.v1 import training_service_pb2 as pb

from .certificates import Authority, authority
from .hone_server import MakeSpec, ServerThread, quick, stub_of, wait_until
from .rights import ALICE, TRAINER, Attempt, Cluster

BOB = TokenInfo(user="bob")


def gates_of(cluster: Cluster) -> Callable[[], Gates]:
    """Gates that forget within a second."""
    return lambda: Gates(
        callers=CallerGate(cluster, kept_s=1.0, again_s=0.5, no_kept_s=0.2),
        trainers=TrainerGate(cluster, cluster.owner_of, kept_s=1.0, no_kept_s=0.2),
    )


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("certificates") / "authority")


@pytest.fixture
def cert(signer: Authority, tmp_path: Path) -> tuple[Path, Path]:
    """The service's certificate and key."""
    pair = tmp_path / "tls.crt", tmp_path / "tls.key"
    signer.sign(*pair)
    return pair


@pytest.fixture
def cluster() -> Cluster:
    """Alice may do everything in team-a, Bob reads there, and each has a token."""
    rights = {("alice", verb, "team-a") for verb in ("create", "get", "list")}
    rights |= {("bob", verb, "team-a") for verb in ("get", "list")}
    return Cluster(tokens={("alice-token", CALLERS): ALICE, ("bob-token", CALLERS): BOB}, rights=rights)


@pytest.fixture
def server(
    tmp_path: Path, cluster: Cluster, cert: tuple[Path, Path], quick_python: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServerThread]:
    monkeypatch.setenv("HONE_TRAINER_PYTHON", str(quick_python))
    for name in ("HONE_TOKEN", "HONE_TOKEN_FILE", "HONE_TLS_CA", "HONE_TLS_SERVER_NAME"):
        monkeypatch.delenv(name, raising=False)
    with ServerThread(tmp_path / "home", gates=gates_of(cluster), pair=cert) as server:
        yield server


@pytest.fixture
def connect(server: ServerThread, signer: Authority) -> Iterator[Callable[..., Client]]:
    """A client of that server."""
    opened: list[Client] = []

    def open_client(token: str = "alice-token", namespace: str = "team-a", **changes: Any) -> Client:
        opened.append(Client(server.address, namespace=namespace, token=token, **{"tls_ca": signer.ca, **changes}))
        return opened[-1]

    yield open_client
    for client in opened:
        client.close()


def test_who_may_submits_and_is_named_as_the_creator(connect: Callable[..., Client], make_spec: MakeSpec) -> None:
    client = connect()
    job = client.submit(quick(make_spec))
    assert job.creator == "alice"
    assert client.wait(job.id, timeout_s=60).state is State.SUCCEEDED
    assert [found.id for found in client.list(filter="creator = alice")] == [job.id]


def test_who_may_only_read_reads(connect: Callable[..., Client], make_spec: MakeSpec) -> None:
    job = connect().submit(quick(make_spec))
    bob = connect("bob-token")
    assert bob.get(job.id).id == job.id
    bob.wait(job.id, timeout_s=60)
    assert "".join(bob.logs(job.id)) is not None
    assert bob.checkpoints(job.id) == []
    with pytest.raises(Refused, match="bob may not create Jobs in namespace 'team-a'"):
        bob.submit(quick(make_spec))
    for refused in (bob.cancel, bob.pause, bob.resume, bob.delete):
        with pytest.raises(Refused, match="bob may not create Jobs in namespace 'team-a'"):
            refused(job.id)


def every_call(namespace: str, job: str) -> list[tuple[str, Any]]:
    parent, name = f"namespaces/{namespace}", f"namespaces/{namespace}/jobs/{job}"
    return [
        ("PlanJob", pb.PlanJobRequest(parent=parent)),
        ("PreflightJob", pb.PreflightJobRequest(parent=parent)),
        ("CreateJob", pb.CreateJobRequest(parent=parent, job_id="Not An Id")),
        ("GetJob", pb.GetJobRequest(name=name)),
        ("ListJobs", pb.ListJobsRequest(parent=parent, page_size=-1)),
        ("CancelJob", pb.CancelJobRequest(name=name)),
        ("PauseJob", pb.PauseJobRequest(name=name)),
        ("ResumeJob", pb.ResumeJobRequest(name=name)),
        ("DeleteJob", pb.DeleteJobRequest(name=name)),
        ("WatchJob", pb.WatchJobRequest(name=name)),
        ("WatchJobs", pb.WatchJobsRequest(parent=parent, after_seq=10**9)),
        ("StreamLogs", pb.StreamLogsRequest(name=name, tail=-1)),
        ("ListEvents", pb.ListEventsRequest(parent=name, after_seq=-1)),
        ("ListEvents", pb.ListEventsRequest(parent=parent, after_seq=-1)),
        ("QueryMetrics", pb.QueryMetricsRequest(name=name)),
        ("ListCheckpoints", pb.ListCheckpointsRequest(parent=name)),
        ("ListOutputs", pb.ListOutputsRequest(parent=name)),
    ]


def answer_of(client: Client, method: str, request: Any, token: str) -> tuple[str, str]:
    """Code and text of a call that is refused."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with pytest.raises(grpc.RpcError) as failed:
        answer = getattr(stub_of(client), method)(request, metadata=metadata)
        list(answer) if method.startswith(("Watch", "Stream")) else answer
    status = status_pb2.Status.FromString(dict(failed.value.trailing_metadata())[DETAILS_KEY])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return failed.value.code().name, f"{info.reason} {status.message}"


def test_every_call_of_another_tenant_is_refused_alike_whether_the_job_exists_or_not(
    cluster: Cluster, connect: Callable[..., Client], make_spec: MakeSpec
) -> None:
    job = connect().submit(quick(make_spec))
    cluster.tokens["eve-token", CALLERS] = TokenInfo(user="eve")
    client = connect("eve-token")
    answers = [
        [answer_of(client, method, request, "eve-token") for method, request in every_call("team-a", name)]
        for name in (job.id, "nothing")
    ]
    assert answers[0] == answers[1]
    assert {code for code, _ in answers[0]} == {"PERMISSION_DENIED"}
    assert all(text.startswith("REFUSED eve may not ") and job.id not in text for _, text in answers[0])


@pytest.mark.parametrize("token", ["", "nobodys"])
def test_every_call_of_nobody_known_is_unauthenticated(connect: Callable[..., Client], token: str) -> None:
    client = connect()
    for method, request in every_call("team-a", "nothing"):
        code, text = answer_of(client, method, request, token)
        assert (code, text.split()[0]) == ("UNAUTHENTICATED", "UNAUTHENTICATED"), method


def test_who_may_is_told_what_is_wrong_with_the_request(connect: Callable[..., Client]) -> None:
    client = connect()
    with pytest.raises(NotFound):
        client.get("nothing")
    for method, request in every_call("team-a", "n"):
        if method in ("CreateJob", "ListJobs", "WatchJobs"):
            assert answer_of(client, method, request, "alice-token")[0] == "INVALID_ARGUMENT"
    with pytest.raises(InvalidRequest):
        client.plan({"name": "x"}) and client.submit({"name": "x"})


def test_health_and_reflection_are_open(server: ServerThread, signer: Authority) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    credentials = grpc.ssl_channel_credentials(signer.ca.read_bytes())
    with grpc.secure_channel(server.address, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert "hone.v1.TrainingService" in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_an_api_server_that_is_away_keeps_out_nobody_who_was_looked_up_and_blames_nobody(
    cluster: Cluster, connect: Callable[..., Client]
) -> None:
    client = connect()
    assert list(client.list()) == []
    cluster.error = Unavailable("The API server cannot be reached.")
    assert list(client.list()) == []
    time.sleep(1.1)
    code, text = answer_of(client, *every_call("team-a", "x")[4], "alice-token")
    assert (code, text.split()[0]) == ("UNAVAILABLE", "UNAVAILABLE")
    cluster.error = None
    assert list(client.list()) == []  # the client tries again by itself


def test_health_says_when_nobody_can_be_served_any_more(
    tmp_path: Path, cluster: Cluster, cert: tuple[Path, Path], signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hone.rpc.server.LOOK_S", 0.05)
    monkeypatch.setattr("hone.rpc.server.KEPT_S", 1.0)
    away: list[Check] = []
    monkeypatch.setattr(Service, "checks", lambda _: away)
    with ServerThread(tmp_path / "home", gates=gates_of(cluster), pair=cert) as server:
        credentials = grpc.ssl_channel_credentials(signer.ca.read_bytes())
        with grpc.secure_channel(server.address, credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def serving() -> bool:
                answer = stub.Check(health_pb2.HealthCheckRequest(service="hone.v1.TrainingService"))
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            since = datetime.now(UTC)
            away[:] = [Check(name=CLUSTER, is_well=False, text="no answer", is_needed=False, since=since)]
            time.sleep(0.5)
            assert serving()  # who was looked up is served
            wait_until(lambda: not serving(), timeout_s=5)
            assert (datetime.now(UTC) - since).total_seconds() > 1.0
            away.clear()
            wait_until(serving, timeout_s=5)


def test_a_stream_ends_when_its_caller_may_no_longer(cluster: Cluster, connect: Callable[..., Client]) -> None:
    ended: list[Exception] = []

    def watch() -> None:
        try:
            list(connect("bob-token").watch_all())
        except Exception as error:
            ended.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    wait_until(lambda: ("may", "bob", "list", "team-a") in cluster.asked)
    cluster.rights -= {("bob", "list", "team-a")}
    watcher.join(10)
    assert not watcher.is_alive() and isinstance(ended[0], Refused)


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_a_watch_goes_on_with_the_token_that_took_the_place_of_its_own(
    cluster: Cluster, server: ServerThread, signer: Authority, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, kind: str,
) -> None:  # fmt: skip
    file = tmp_path / "token"
    file.write_text("bob-token\n")
    monkeypatch.setenv("HONE_TOKEN_FILE", str(file))
    monkeypatch.setenv("HONE_TLS_CA", str(signer.ca))
    seen: list[Event] = []

    def watch() -> None:
        with Client(server.address, namespace="team-a") as client:
            seen.extend(client.watch("one"))

    async def watch_aio() -> None:
        async with AsyncClient(server.address, namespace="team-a") as client:
            seen.extend([event async for event in client.watch("one")])

    with Client(server.address, namespace="team-a", token="alice-token") as alice:
        alice.submit(quick(make_spec, steps=150, pause_ms=20), job_id="one")
        watcher = threading.Thread(target=watch if kind == "threads" else lambda: asyncio.run(watch_aio()))
        watcher.start()
        wait_until(lambda: ("may", "bob", "get", "team-a") in cluster.asked)
        cluster.tokens["bobs-next", CALLERS] = cluster.tokens.pop(("bob-token", CALLERS))
        file.write_text("bobs-next\n")
        watcher.join(60)
        assert not watcher.is_alive()
        assert ("token", "bobs-next", CALLERS) in cluster.asked
        assert seen == list(alice.events("one")) and seen[-1].fields["state"] == "SUCCEEDED"


def test_a_pod_reports_for_its_own_job_over_tls_and_may_do_nothing_else(
    cluster: Cluster, server: ServerThread, signer: Authority, connect: Callable[..., Client], make_spec: MakeSpec,
    tmp_path: Path,
) -> None:  # fmt: skip
    client = connect()
    for job_id in ("demo", "other"):
        client.submit(quick(make_spec, steps=3000, pause_ms=20), job_id=job_id)
    wait_until(lambda: all(client.get(job).attempts for job in ("demo", "other")))
    cluster.tokens |= {("pod-token", TRAINERS): TRAINER, ("pod-token-for-callers", CALLERS): TRAINER}
    cluster.attempt = Attempt(attempt=1)
    token = tmp_path / "pod-token"
    token.write_text("pod-token")
    event = Event(seq=10_000, time=datetime.now(UTC), type=EventType.NOTE, message="from the pod")

    def reporter(job_id: str) -> Reporter:
        job = client.get(job_id)
        nonce = server.service.store.get("team-a", job_id).attempts[0].nonce
        run = Run(namespace="team-a", job=job_id, attempt=1, nonce=nonce, spec=job.resolved_spec,
                  launch=job.plan.launch, store="file:///nowhere", inputs={})  # fmt: skip
        return Reporter(server.address, run, token_file=token, ca_file=signer.ca)

    own, others = reporter("demo"), reporter("other")
    assert own.send([event]) >= 0  # after a gap nothing is taken, and that is answered
    with pytest.raises(Refused, match="may not report for namespaces/team-a/jobs/other"):
        others.send([event])
    token.write_text("alice-token")
    with pytest.raises(Unauthenticated, match="hone-report"):
        own.send([event])
    own.close()
    others.close()
    for method, request in every_call("team-a", "demo"):
        assert answer_of(client, method, request, "pod-token")[0] == "UNAUTHENTICATED"
        assert answer_of(client, method, request, "pod-token-for-callers")[0] == "PERMISSION_DENIED"
    for job_id in ("demo", "other"):
        client.cancel(job_id)
        client.wait(job_id, timeout_s=30)


@pytest.mark.parametrize("what", ["authority", "name", "plain text"])
def test_a_connection_that_does_not_fit_the_certificate_is_told_with_the_fix(
    connect: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    other = authority(tmp_path / "other")
    if what == "name":
        monkeypatch.setenv("HONE_TLS_SERVER_NAME", "elsewhere.example")
    client = connect(**{"authority": {"tls_ca": other.ca}, "plain text": {"tls_ca": None}}.get(what, {}))
    with pytest.raises(Unavailable, match="HONE_TLS_CA"):
        client.get("x")


def test_a_certificate_that_is_renewed_is_served_without_a_restart(
    server: ServerThread, signer: Authority, cert: tuple[Path, Path], tmp_path: Path, connect: Callable[..., Client]
) -> None:
    client = connect()
    assert list(client.list()) == []
    before = served(server.address)
    new = tmp_path / "new.crt", tmp_path / "new.key"
    signer.sign(*new, serial=2)
    os.replace(new[0], cert[0])  # the key is still the old one's
    assert served(server.address) == before
    os.replace(new[1], cert[1])
    assert served(server.address) == ssl.PEM_cert_to_DER_cert(cert[0].read_text()) != before
    assert list(client.list()) == []  # connections go on
    with Client(server.address, namespace="team-a", token="alice-token", tls_ca=signer.ca) as another:
        assert list(another.list()) == []
    cert[1].unlink()
    assert served(server.address) == ssl.PEM_cert_to_DER_cert(cert[0].read_text())


def served(address: str) -> bytes:
    """The certificate that a new connection is shown."""
    host, _, port = address.rpartition(":")
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, int(port)), timeout=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "0.0.0.0:0"}, "needs a certificate"),
        ({"address": "0.0.0.0:0", "auth": "none", "tls_cert": "crt", "tls_key": "key"}, "callers who are known"),
        ({"address": "[::]:0", "auth": "kubernetes"}, "needs a certificate"),
        ({"tls_cert": "crt"}, "needs its key"),
        ({"tls_cert": "crt", "tls_key": "missing"}, "missing cannot be read"),
        ({"tls_cert": "crt", "tls_key": "ca"}, "no certificate with its key"),
    ],
)
def test_what_would_let_in_anybody_is_not_served(
    signer: Authority, cert: tuple[Path, Path], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    files = {"crt": cert[0], "key": cert[1], "ca": signer.ca, "missing": tmp_path / "missing"}
    settings = {name: files.get(value, value) if name.startswith("tls") else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        asyncio.run(serve(Settings(home=tmp_path / "other", **settings)))  # type: ignore[arg-type]


def test_callers_are_known_by_a_cluster_or_not_at_all(
    cert: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = Settings(home=tmp_path / "other", address="127.0.0.1:0", auth="kubernetes")
    with pytest.raises(ClusterError, match="No cluster is configured"):
        asyncio.run(serve(settings))


_ELSEWHERE = """
import json, sys
from hone.errors import InvalidRequest
from hone.rpc.client import Client
from hone.spec.parse import parse

spec = parse(json.loads(sys.argv[2]))
with Client(sys.argv[1], tls_ca=sys.argv[3]) as client:
    try:
        client.submit(spec)
    except InvalidRequest as error:
        print(json.dumps([[v.path, v.message] for v in error.violations]))
    here = client.plan(spec)
    print(json.dumps([v.path for v in here.violations]))
"""


def test_files_of_a_peer_on_another_machine_are_refused_with_the_fix(
    tmp_path: Path, signer: Authority, make_spec: MakeSpec
) -> None:
    """The peer has a network of its own, and its address is none of ours; it is the same kernel, so it sends our own
    machine id, which is not believed alone."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and iproute2")
    name, ours, theirs = f"hone{os.getpid() % 10**6}", "192.0.2.129", "192.0.2.130"
    pair = tmp_path / "tls.crt", tmp_path / "tls.key"
    signer.sign(*pair, names=f"IP:{ours}")
    spec = json.dumps(make_spec().to_mapping())
    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("addr", "add", f"{ours}/30", "dev", f"{name}a")
        ip("link", "set", f"{name}a", "up")
        ip("-n", name, "addr", "add", f"{theirs}/30", "dev", f"{name}b")
        ip("-n", name, "link", "set", f"{name}b", "up")
        with ServerThread(tmp_path / "home", pair=pair, host=ours) as server:
            command = [
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                "-c",
                _ELSEWHERE,
                server.address,
                spec,
                str(signer.ca),
            ]
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
            with Client(server.address, tls_ca=signer.ca) as here:
                assert here.submit(make_spec(), validate_only=True).plan.fits  # the same call from this machine
    finally:
        ip("netns", "del", name)
    violations = dict(json.loads(told[0]))
    assert set(violations) == {"model.source", "dataset.source"} == set(json.loads(told[1]))
    assert all("on another" in message and "s3://" in message for message in violations.values())


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def test_a_malformed_message_of_somebody_known_is_told_and_of_nobody_known_is_not(
    server: ServerThread, signer: Authority
) -> None:
    credentials = grpc.ssl_channel_credentials(signer.ca.read_bytes())
    with grpc.secure_channel(server.address, credentials) as channel:
        call = channel.unary_unary("/hone.v1.TrainingService/GetJob")
        for metadata, code in (
            ((), "UNAUTHENTICATED"),
            ((("authorization", "Bearer alice-token"),), "INVALID_ARGUMENT"),
        ):
            with pytest.raises(grpc.RpcError) as failed:
                call(b"\xff\xff", metadata=metadata)
            assert failed.value.code().name == code
