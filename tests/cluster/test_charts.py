"""The charts on a real API server: taken to the letter, granting what they say, and harmless to jobs."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hone import Client
from hone.job import EventType, State
from hone.manifests import names

from .harness.access import Cluster
from .harness.api import wait_until
from .harness.places import ROOT
from .inputs import upload_inputs
from .installation import SERVICE_CHART, SUBMITTER, TENANT_CHART, Installation, helm, install

GOLDEN = ROOT / "tests/golden/charts"
UNKNOWN_TO_THE_CLUSTER = ("ServiceMonitor",)


@pytest.mark.parametrize("values", ["sample", "everything"])
@pytest.mark.parametrize("chart", [SERVICE_CHART, TENANT_CHART], ids=lambda chart: chart.name)
def test_the_api_server_takes_what_a_chart_renders_to_the_letter(
    cluster: Cluster, namespace: str, chart: Path, values: str
) -> None:
    given = chart / "sample.yaml" if values == "sample" else GOLDEN / f"{chart.name}.values.yaml"
    text = helm(cluster, "template", "dry-run", str(chart), "-n", namespace, "-f", str(given), "--kube-version=1.34.4")
    objects = [item for item in yaml.safe_load_all(text) if item and item["kind"] not in UNKNOWN_TO_THE_CLUSTER]
    answer = cluster.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=yaml.safe_dump_all(objects)
    )
    assert len(answer.splitlines()) == len(objects)


@pytest.fixture(scope="module")
def installed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Both charts with one tenant, without waiting for the service itself."""
    with (
        cluster.new_namespace(f"test-{secrets.token_hex(4)}") as tenant,
        install(cluster, tmp_path_factory.mktemp("hone"), tenants=(tenant,), wait=False) as hone,
    ):
        yield hone


MAY = (
    "create batch/jobs",
    "get batch/jobs",
    "list batch/jobs",
    "watch batch/jobs",
    "patch batch/jobs",
    "delete batch/jobs",
    "get /pods",
    "list /pods",
    "watch /pods",
    "get /pods/log",
    "list /events",
    "watch /events",
    "list kueue.x-k8s.io/workloads",
    "watch kueue.x-k8s.io/workloads",
)
MAY_NOT = (
    "get /secrets",
    "list /secrets",
    "get /configmaps",
    "create /pods",
    "delete /pods",
    "create /pods/exec",
    "create /serviceaccounts/token",
    "list /nodes",
    "update batch/jobs",
    "create rbac.authorization.k8s.io/rolebindings",
)
REVIEWS = ("create authentication.k8s.io/tokenreviews", "create authorization.k8s.io/subjectaccessreviews")


def test_the_service_may_do_what_it_needs_in_its_tenants_and_nothing_elsewhere(installed: Installation) -> None:
    account = f"system:serviceaccount:{installed.namespace}:{installed.release}"
    assert _allowed(installed.cluster, account, installed.tenants[0]) == set(MAY)
    for elsewhere in ("default", installed.namespace):
        assert _allowed(installed.cluster, account, elsewhere) == set()
    assert _allowed(installed.cluster, account, "default", REVIEWS) == set(REVIEWS)


def test_a_trainers_account_may_do_nothing(installed: Installation) -> None:
    account = f"system:serviceaccount:{installed.tenants[0]}:hone-trainer"
    assert _allowed(installed.cluster, account, installed.tenants[0]) == set()


def test_who_is_named_in_the_values_may_submit_here_and_nowhere_else(installed: Installation) -> None:
    account = f"system:serviceaccount:{installed.tenants[0]}:{SUBMITTER}"
    here = _allowed(installed.cluster, account, installed.tenants[0])
    assert "create batch/jobs" in here
    assert not {words for words in here if "secrets" in words or words.startswith("create /")}
    assert _allowed(installed.cluster, account, installed.namespace) == set()


def test_the_grant_goes_with_the_tenants_chart(installed: Installation) -> None:
    account = f"system:serviceaccount:{installed.namespace}:{installed.release}"
    with installed.cluster.new_namespace(f"test-{secrets.token_hex(4)}") as tenant:
        assert _allowed(installed.cluster, account, tenant) == set()
        service = f"service.name={installed.release},service.namespace={installed.namespace}"
        helm(installed.cluster, "install", "hone-tenant", str(TENANT_CHART), "-n", tenant, "--set", service)
        assert _allowed(installed.cluster, account, tenant) == set(MAY)
        helm(installed.cluster, "uninstall", "hone-tenant", "-n", tenant)
        assert _allowed(installed.cluster, account, tenant) == set()


def _allowed(cluster: Cluster, account: str, namespace: str, asked: tuple[str, ...] = (*MAY, *MAY_NOT)) -> set[str]:
    """What the API server says that an account may do, of what is asked: verb, group and resource."""
    reviews = []
    for words in asked:
        verb, _, what = words.partition(" ")
        group, _, resource = what.partition("/")
        resource, _, subresource = resource.partition("/")
        attributes = {"verb": verb, "group": group, "resource": resource, "subresource": subresource}
        spec = {"user": account, "resourceAttributes": {**attributes, "namespace": namespace}}
        reviews.append({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec})
    bundle = json.dumps({"apiVersion": "v1", "kind": "List", "items": reviews})
    template = '-o=jsonpath={.status.allowed}{"\\n"}'
    answers = cluster.kubectl("create", template, "-f", "-", stdin=bundle).split()
    return {words for words, answer in zip(asked, answers, strict=True) if answer == "true"}


@pytest.fixture(params=["sqlite", "postgresql"])
def training(
    request: pytest.FixtureRequest, cluster: Cluster, namespace: str, tmp_path: Path
) -> Iterator[tuple[Installation, str]]:
    """A service on either database, and the id of a job of its tenant that trains until somebody ends it."""
    cluster.s3.make_bucket(namespace)
    (tmp_path / "inputs").mkdir()
    spec = upload_inputs(cluster.s3, namespace, tmp_path / "inputs")
    spec["training"] |= {"max_steps": 1_000_000, "gradient_accumulation_steps": 1}
    url = request.getfixturevalue("database").pod_url if request.param == "postgresql" else ""
    with install(cluster, tmp_path, tenants=(namespace,), bucket=namespace, database_url=url) as hone:
        with hone.client(namespace) as client:
            job = client.submit(spec).id
            wait_until("it trains", lambda: _last_step(client, job), timeout_s=180)
        yield hone, job


@pytest.mark.timeout(600)
def test_upgrade_rollback_and_uninstall_leave_a_running_job_alone(
    training: tuple[Installation, str], cluster: Cluster, namespace: str
) -> None:
    hone, job = training
    trainer = _trainer(cluster, namespace, job)["metadata"]["uid"]

    service = hone.pod()["metadata"]["uid"]
    hone.helm("test", hone.release)
    hone.upgrade(logLevel="info")
    upgraded = hone.pod()["metadata"]["uid"]
    hone.helm("rollback", hone.release, "--wait", "--timeout", "3m")
    assert len({service, upgraded, hone.pod()["metadata"]["uid"]}) == 3
    with hone.client(namespace) as client:
        assert client.get(job).state == State.RUNNING

    hone.helm("uninstall", hone.release, "--wait", "--timeout", "3m")
    found = _trainer(cluster, namespace, job)
    assert (found["metadata"]["uid"], found["status"]["phase"]) == (trainer, "Running")
    hone.upgrade()
    with hone.client(namespace) as client:
        reached = _last_step(client, job)
        wait_until("it reports again", lambda: _last_step(client, job) > reached, timeout_s=60)
        assert _trainer(cluster, namespace, job)["metadata"]["uid"] == trainer
        client.cancel(job)
        ended = client.wait(job, timeout_s=120)
        assert (ended.state, len(ended.attempts)) == (State.CANCELLED, 1)
        steps = [event.step for event in client.events(job) if event.type == EventType.PROGRESS]
        assert steps == list(range(1, len(steps) + 1))


def _last_step(client: Client, job: str) -> int:
    progress = client.get(job).progress
    return progress.step if progress else 0


def _trainer(cluster: Cluster, namespace: str, job: str) -> dict[str, Any]:
    (pod,) = cluster.kubectl.items("pods", "-l", f"{names.LABEL_JOB}={job}", namespace=namespace)
    return pod


def test_whole_numbers_of_the_values_stay_whole_when_helm_reuses_them(installed: Installation) -> None:
    platform = {**installed.values["cluster"], "node_memory_bytes": 10_000_000_000}
    values = json.dumps({**installed.values, "cluster": platform, "fsGroup": 1_000_650_000})
    where = (installed.release, str(SERVICE_CHART), "-n", installed.namespace)
    helm(installed.cluster, "upgrade", *where, "--values", "-", stdin=values)
    helm(installed.cluster, "upgrade", *where, "--reuse-values", "--set", "logLevel=info")
    config = installed.cluster.kubectl.get("configmap", installed.release, namespace=installed.namespace)
    assert yaml.safe_load(config["data"]["config.yaml"])["node_memory_bytes"] == 10_000_000_000
    deployment = installed.cluster.kubectl.get("deployment", installed.release, namespace=installed.namespace)
    assert deployment["spec"]["template"]["spec"]["securityContext"]["fsGroup"] == 1_000_650_000
