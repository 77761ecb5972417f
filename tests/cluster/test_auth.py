"""Who may, as a real API server has it: tokens of real accounts, rights that come and go, pods that report.

The service asks with an account of its own that may do nothing but ask.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from kubernetes.client.configuration import Configuration

from hone.backends.kubernetes.backend import KubernetesBackend
from hone.backends.kubernetes.client import Api, load_configuration
from hone.cluster import Cluster as Platform
from hone.errors import Refused, Unauthenticated
from hone.job import Event, EventType
from hone.machine import plan_here
from hone.manifests import render_tenant
from hone.rpc.auth import CALLERS, TRAINERS, CallerGate, TrainerGate
from hone.rpc.client import Client
from hone.rpc.listening import Gates
from hone.rpc.report import Reporter
from hone.rpc.reviews import ClusterReviews
from hone.run import Run
from hone.spec import JobSpec
from hone.v1 import training_service_pb2 as pb

from ..integration.hone_server import ServerThread, quick
from .fault_proxy import FaultProxy
from .harness.access import Cluster

KEPT_S = 3.0
NO_KEPT_S = 0.3
Json = dict[str, Any]


@dataclass(kw_only=True)
class Tenant:
    """A namespace, and accounts in it."""

    cluster: Cluster
    namespace: str

    def grant(self, account: str, *verbs: str) -> None:
        """Make an account that may do that with Jobs here."""
        where = {"metadata": {"name": account}}
        role = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            **where,
            "rules": [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": list(verbs)}],
        }
        self.apply({"apiVersion": "v1", "kind": "ServiceAccount", **where}, role, binding(account, self.namespace))

    def revoke(self, account: str) -> None:
        """Take its rights away."""
        self.cluster.kubectl("delete", "rolebinding", account, namespace=self.namespace)

    def token(self, account: str, audience: str = CALLERS, *more: str) -> str:
        """A token as people make one."""
        words = ("create", "token", account, "--audience", audience, *more)
        return self.cluster.kubectl(*words, namespace=self.namespace).strip()

    def apply(self, *objects: Json) -> None:
        self.cluster.kubectl.apply(*objects, namespace=self.namespace)


def binding(account: str, namespace: str) -> Json:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": account},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
    }


@dataclass(kw_only=True)
class Door:
    """A service of which callers are looked up in the cluster, and clients of it."""

    server: ServerThread
    clients: list[Client] = field(default_factory=list)

    def client(self, tenant: Tenant, token: str) -> Client:
        """A client for a tenant's namespace."""
        self.clients.append(Client(self.server.address, namespace=tenant.namespace, token=token))
        return self.clients[-1]


@pytest.fixture
def tenant(cluster: Cluster, namespace: str) -> Tenant:
    """Somebody who submits, somebody who reads, and somebody who may nothing."""
    made = Tenant(cluster=cluster, namespace=namespace)
    made.grant("submitter", "create", "get", "list")
    made.grant("reader", "get", "list")
    made.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody"}})
    return made


@pytest.fixture
def other_tenant(cluster: Cluster) -> Iterator[Tenant]:
    with cluster.new_namespace(f"test-{secrets.token_hex(4)}") as name:
        made = Tenant(cluster=cluster, namespace=name)
        made.grant("submitter", "create", "get", "list")
        yield made


@pytest.fixture
def service_account(cluster: Cluster, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configuration]:
    """What the service asks with: it may ask, and nothing else."""
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    name = f"hone-reviews-{namespace}"
    cluster.kubectl.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "hone", "namespace": namespace}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "system:auth-delegator",
            },
            "subjects": [{"kind": "ServiceAccount", "name": "hone", "namespace": namespace}],
        },
    )
    administrator = load_configuration()
    own = Configuration(host=administrator.host)
    own.ssl_ca_cert = administrator.ssl_ca_cert
    token = cluster.kubectl("create", "token", "hone", namespace=namespace).strip()
    own.api_key = {"authorization": f"Bearer {token}"}
    yield own
    cluster.kubectl("delete", "clusterrolebinding", name)


@pytest.fixture
def open_door(tmp_path: Path, quick_python: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Door]]:
    """Open a service whose gates ask through a connection to an API server."""
    monkeypatch.setenv("HONE_TRAINER_PYTHON", str(quick_python))
    for name in ("HONE_TOKEN", "HONE_TOKEN_FILE", "HONE_TLS_CA"):
        monkeypatch.delenv(name, raising=False)
    doors: list[tuple[Door, Api]] = []

    def begin(configuration: Configuration, backend: KubernetesBackend | None = None) -> Door:
        api = Api(configuration)
        reviews = ClusterReviews(api)

        def gates() -> Gates:
            times = {"kept_s": KEPT_S, "again_s": KEPT_S / 2, "no_kept_s": NO_KEPT_S}
            owner_of = backend.owner_of if backend else lambda *_: None
            return Gates(callers=CallerGate(reviews, **times), trainers=TrainerGate(reviews, owner_of, **times))

        door = Door(server=ServerThread(tmp_path / f"home-{len(doors)}", gates=gates).__enter__())
        doors.append((door, api))
        return door

    yield begin
    for door, api in doors:
        for client in door.clients:
            client.close()
        door.server.__exit__()
        api.close()


def test_accounts_do_what_kubernetes_lets_them(
    tenant: Tenant, service_account: Configuration, open_door: Callable[..., Door], make_spec: Callable[..., JobSpec]
) -> None:
    door = open_door(service_account)
    submitter, reader, nobody = (door.client(tenant, tenant.token(name)) for name in ("submitter", "reader", "nobody"))
    job = submitter.submit(quick(make_spec))
    assert job.creator == f"system:serviceaccount:{tenant.namespace}:submitter"
    assert reader.get(job.id).id == job.id and len(list(reader.list())) == 1
    with pytest.raises(Refused, match="may not create Jobs"):
        reader.cancel(job.id)
    with pytest.raises(Refused, match="may not get Jobs"):
        nobody.get(job.id)


def test_another_tenant_learns_nothing(
    tenant: Tenant, other_tenant: Tenant, service_account: Configuration, open_door: Callable[..., Door],
    make_spec: Callable[..., JobSpec],
) -> None:  # fmt: skip
    door = open_door(service_account)
    job = door.client(tenant, tenant.token("submitter")).submit(quick(make_spec))
    stranger = door.client(tenant, other_tenant.token("submitter"))  # a good token, in somebody else's namespace
    calls: list[Callable[[str], Any]] = [
        stranger.get, stranger.cancel, stranger.delete, stranger.outputs, stranger.metrics,
        lambda name: list(stranger.watch(name)), lambda name: list(stranger.logs(name)),
        lambda name: list(stranger.events(name)), lambda _: stranger.submit(quick(make_spec)),
        lambda _: list(stranger.list()), lambda _: next(stranger.watch_all()),
    ]  # fmt: skip
    for call in calls:
        told = set()
        for name in (job.id, "nothing"):
            with pytest.raises(Refused) as refused:
                call(name)
            told.add(str(refused.value))
        assert len(told) == 1 and job.id not in told.pop()
    own = door.client(other_tenant, other_tenant.token("submitter"))
    assert list(own.list()) == []


def test_tokens_of_other_audiences_expired_and_revoked_ones_are_refused(
    cluster: Cluster, tenant: Tenant, service_account: Configuration, open_door: Callable[..., Door]
) -> None:
    door = open_door(service_account)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "binding"}}
    tenant.apply(secret)
    bound = tenant.token("submitter", CALLERS, "--bound-object-kind", "Secret", "--bound-object-name", "binding")
    clients = {"bound": door.client(tenant, bound)}
    assert list(clients["bound"].list()) == []
    for audience in (TRAINERS, "https://kubernetes.default.svc"):
        with pytest.raises(Unauthenticated, match="not accepted"):
            door.client(tenant, tenant.token("submitter", audience)).get("x")
    with pytest.raises(Unauthenticated, match="not accepted"):
        door.client(tenant, f"{bound[:-4]}AAAA").get("x")
    cluster.kubectl("delete", "secret", "binding", namespace=tenant.namespace)  # ends the token that is bound to it
    deadline = time.monotonic() + 2 * KEPT_S + 10  # the API server itself remembers good tokens for ten seconds
    while time.monotonic() < deadline:
        try:
            list(clients["bound"].list())
            time.sleep(0.2)
        except Unauthenticated:
            break
    else:
        raise AssertionError("a revoked token goes on")


def test_an_expired_token_is_refused_to_the_second(
    tenant: Tenant, service_account: Configuration, open_door: Callable[..., Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API server gives none that lasts less than ten minutes; so the clock is moved, which only this looks at."""
    door = open_door(service_account)
    client = door.client(tenant, tenant.token("reader", CALLERS, "--duration", "10m"))
    assert list(client.list()) == []
    clock = time.time
    monkeypatch.setattr("hone.rpc.auth.time.time", lambda: clock() + 590)
    assert list(client.list()) == []
    monkeypatch.setattr("hone.rpc.auth.time.time", lambda: clock() + 601)
    with pytest.raises(Unauthenticated, match="expired"):
        list(client.list())


def test_a_right_that_is_taken_away_ends_calls_and_streams_and_one_that_is_given_begins_at_once(
    tenant: Tenant, service_account: Configuration, open_door: Callable[..., Door]
) -> None:
    door = open_door(service_account)
    client = door.client(tenant, tenant.token("reader"))
    assert list(client.list()) == []
    tenant.revoke("reader")
    begun = time.monotonic()
    with pytest.raises(Refused):
        next(client.watch_all())
    assert time.monotonic() - begun < KEPT_S + 1
    with pytest.raises(Refused):
        list(client.list())
    tenant.apply(binding("reader", tenant.namespace))
    time.sleep(2 * NO_KEPT_S)
    assert list(client.list()) == []


def test_an_api_server_that_is_away_keeps_nobody_out_who_was_looked_up_and_calls_nobody_a_stranger(
    cluster: Cluster, tenant: Tenant, service_account: Configuration, open_door: Callable[..., Door]
) -> None:
    proxy = FaultProxy(cluster.kubeconfig)
    door = open_door(proxy.configuration)
    known = door.client(tenant, tenant.token("reader"))
    fresh = door.client(tenant, tenant.token("reader"))
    assert list(known.list()) == []
    with proxy.down():
        assert list(known.list()) == []
        for client in (fresh, known):
            time.sleep(KEPT_S if client is known else 0)
            with pytest.raises(grpc.RpcError) as failed:
                client._stub.ListJobs(list_request(tenant), metadata=client._access.metadata())
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert list(known.list()) == [] and list(fresh.list()) == []
    proxy.close()


def test_a_service_whose_own_token_is_revoked_calls_nobody_a_stranger(
    tenant: Tenant,
    service_account: Configuration,
    open_door: Callable[..., Door],
    caplog: pytest.LogCaptureFixture,
) -> None:
    door = open_door(service_account)
    known = door.client(tenant, tenant.token("reader"))
    assert list(known.list()) == []
    service_account.api_key = {"authorization": "Bearer revoked"}
    assert list(known.list()) == []
    fresh = door.client(tenant, tenant.token("reader"))
    with pytest.raises(grpc.RpcError) as failed:
        fresh._stub.ListJobs(list_request(tenant), metadata=fresh._access.metadata())
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "service's credentials" in caplog.text


def list_request(tenant: Tenant) -> pb.ListJobsRequest:
    return pb.ListJobsRequest(parent=f"namespaces/{tenant.namespace}")


def test_a_pod_reports_for_its_own_attempt_and_calls_nothing_else(
    cluster: Cluster, tenant: Tenant, service_account: Configuration, open_door: Callable[..., Door],
    make_spec: Callable[..., JobSpec], tmp_path: Path,
) -> None:  # fmt: skip
    platform = Platform.model_validate(
        {"image": "nowhere.example/trainer:1", "store": {"uri": "s3://bucket"}, "namespaces": [tenant.namespace]}
    )
    tenant.apply(*render_tenant(tenant.namespace, platform))
    backend = KubernetesBackend(platform, Api(load_configuration()))
    assert backend.wait_until_ready(10)
    door = open_door(service_account, backend)
    submitter = door.client(tenant, tenant.token("submitter"))
    runs = {}
    for job_id in ("one", "two"):
        submitter.submit(quick(make_spec, steps=3000, pause_ms=20), job_id=job_id)
        runs[job_id] = attempt_of(door, tenant, job_id, platform, make_spec)
        backend.ensure(*runs[job_id])
    pods = {job_id: pod_of(cluster, tenant, job_id) for job_id in runs}
    token = tmp_path / "token"

    def report(job_id: str, as_pod_of: str) -> int:
        pod = pods[as_pod_of]["metadata"]
        bound = ("--bound-object-kind", "Pod", "--bound-object-name", pod["name"], "--bound-object-uid", pod["uid"])
        token.write_text(tenant.token("hone-trainer", TRAINERS, *bound))
        reporter = Reporter(door.server.address, runs[job_id][0], token_file=token)
        try:
            return reporter.send([Event(seq=10_000, time=now(), type=EventType.NOTE, message="hello")])
        finally:
            reporter.close()

    assert report("one", as_pod_of="one") >= 0
    assert report("two", as_pod_of="two") >= 0
    with pytest.raises(Refused, match=r"may not report for .*/jobs/two"):
        report("two", as_pod_of="one")
    with pytest.raises(Unauthenticated):
        door.client(tenant, token.read_text()).get("one")
    token.write_text(tenant.token("hone-trainer", TRAINERS))
    reporter = Reporter(door.server.address, runs["one"][0], token_file=token)
    with pytest.raises(Refused, match="of no pod"):
        reporter.send([Event(seq=10_000, time=now(), type=EventType.NOTE, message="hello")])
    reporter.close()
    cluster.kubectl("delete", "jobs", "--all", namespace=tenant.namespace)
    backend.close()
    for job_id in runs:
        submitter.cancel(job_id)
        submitter.wait(job_id, timeout_s=60)


def attempt_of(
    door: Door, tenant: Tenant, job_id: str, platform: Platform, make_spec: Callable[..., JobSpec]
) -> tuple[Run, Any]:
    """The attempt that the service recorded, as the cluster's backend would run it."""
    deadline = time.monotonic() + 30
    while not (job := door.server.service.store.get(tenant.namespace, job_id)).attempts:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    planned = plan_here(make_spec(), platform.hardware())
    run = Run(
        namespace=tenant.namespace,
        job=job_id,
        attempt=1,
        nonce=job.attempts[0].nonce,
        spec=planned.spec,
        launch=planned.plan.launch,
        store="s3://bucket",
        inputs={},
    )
    return run, planned.plan


def pod_of(cluster: Cluster, tenant: Tenant, job_id: str) -> Json:
    """The pod that the Job controller made; it never runs, its image is nowhere."""
    deadline = time.monotonic() + 30
    while not (found := cluster.kubectl.items("pods", "-l", f"hone.dev/job={job_id}", namespace=tenant.namespace)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found[0]


def now() -> datetime:
    return datetime.now(UTC)
