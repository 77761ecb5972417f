"""The charts, as Helm renders them: what is required is asked for, what is unknown refused, rights as few as said."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hone import __version__
from hone.cluster import parse_cluster
from hone.manifests import names

from ..integration.servers import BIN, find_tool

ROOT = Path(__file__).parents[2]
SERVICE, TENANT = ROOT / "helm/hone", ROOT / "helm/hone-tenant"
CHARTS = (SERVICE, TENANT)
GIVEN = (
    "image.repository=registry.example.com/hone-service",
    "cluster.image=registry.example.com/hone-trainer:1",
    "cluster.store.uri=s3://models/hone",
    "tls.existingSecret=hone-tls",
)
POSTGRES = (*GIVEN, "database.existingSecret=hone-database")
HELM = find_tool("helm")
Manifest = dict[str, Any]

needs_helm = pytest.mark.skipif(HELM is None, reason="there is no helm: `make cluster` builds it, or put it on PATH")


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(HELM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def template(chart: Path, *values: str, release: str = "hone") -> subprocess.CompletedProcess[str]:
    given = [word for value in values for word in ("--set", value)]
    return helm("template", release, chart, "--namespace", "hone-system", "--kube-version", "1.29.0", *given)


def render(chart: Path, *values: str) -> dict[tuple[str, str], Manifest]:
    """(kind, name) → object."""
    answer = template(chart, *values)
    assert answer.returncode == 0, answer.stderr
    objects = [document for document in yaml.safe_load_all(answer.stdout) if document]
    found = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    assert len(found) == len(objects)
    return found


def pod_of(objects: dict[tuple[str, str], Manifest]) -> Manifest:
    spec: Manifest = objects["Deployment", "hone"]["spec"]["template"]["spec"]
    return spec


# --- without helm


def test_the_schema_holds_the_current_fields_of_the_platform(tmp_path: Path) -> None:
    made = tmp_path / "schema.json"
    subprocess.run([ROOT / ".venv/bin/python", ROOT / "tools/chart_schema.py", made], check=True, timeout=60)
    assert made.read_text() == (SERVICE / "values.schema.json").read_text()


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_a_chart_has_the_version_of_the_package(chart: Path) -> None:
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    assert (about["version"], about["appVersion"]) == (__version__, __version__)


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_every_value_is_in_the_schema_and_every_level_of_it_is_closed(chart: Path) -> None:
    schema = json.loads((chart / "values.schema.json").read_text())
    values = yaml.safe_load((chart / "values.yaml").read_text())
    assert values.keys() == schema["properties"].keys()
    for level in _levels(schema):
        assert level["additionalProperties"] is False


def _levels(schema: Any) -> list[Manifest]:
    if isinstance(schema, list):
        return [level for item in schema for level in _levels(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if isinstance(schema.get("properties"), dict) else []
    return own + [level for item in schema.values() for level in _levels(item)]


def test_the_tenant_chart_and_the_renderer_name_the_same_things() -> None:
    values = yaml.safe_load((TENANT / "values.yaml").read_text())
    workers = (TENANT / "templates/workers-service.yaml").read_text()
    helpers = (TENANT / "templates/_helpers.tpl").read_text()
    assert values["serviceAccount"]["name"] == names.TRAINER_ACCOUNT
    assert f"name: {names.WORKERS_SERVICE}\n" in workers
    for label, value in ((names.LABEL_PART_OF, names.PART_OF), (names.LABEL_COMPONENT, names.COMPONENT_TRAINER)):
        assert f"{label}: {value}\n" in helpers.partition('define "tenant.trainers"')[2]


# --- with helm


@needs_helm
@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_with_every_value_given_it_renders_as_it_did(chart: Path, golden: Callable[[str, str], None]) -> None:
    given = ROOT / f"tests/golden/charts/{chart.name}.values.yaml"
    answer = helm("template", "hone", chart, "--namespace", "hone-system", "--kube-version", "1.29.0", "-f", given)
    assert answer.returncode == 0, answer.stderr
    golden(f"charts/{chart.name}.yaml", answer.stdout)


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_those_are_all_the_values_there_are(chart: Path) -> None:
    given = yaml.safe_load((ROOT / f"tests/golden/charts/{chart.name}.values.yaml").read_text())
    values = yaml.safe_load((chart / "values.yaml").read_text())
    if chart == SERVICE:
        given["persistence"] = values["persistence"]  # PostgreSQL stands in its place
        del given["cluster"], values["cluster"]
    assert _paths(given) >= _paths(values)


def _paths(values: Any, path: str = "") -> set[str]:
    if not isinstance(values, dict) or not values:
        return {path}
    return {found for key, value in values.items() for found in _paths(value, f"{path}.{key}")} | {path}


@needs_helm
@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
@pytest.mark.parametrize("sample", [False, True], ids=["defaults", "sample"])
def test_helm_finds_nothing_to_complain_about(chart: Path, sample: bool) -> None:
    answer = helm("lint", "--strict", chart, *(["--values", chart / "sample.yaml"] if sample else []))
    assert answer.returncode == 0, answer.stdout
    assert "[WARNING]" not in answer.stdout


@needs_helm
def test_what_is_committed_in_k8s_is_rendered_from_the_charts(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([ROOT / "tools/k8s.sh", tmp_path], check=True, env=environment, timeout=60)
    for made in sorted(tmp_path.iterdir()):
        assert made.read_text() == (ROOT / "k8s" / made.name).read_text(), f"run tools/k8s.sh: {made.name}"


@needs_helm
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("image.repository", "docker build --target service"),
        ("cluster.image", "docker build --target trainer"),
        ("cluster.store.uri", "s3://bucket/prefix"),
        ("tls.existingSecret", "kubernetes.io/tls"),
    ],
)
def test_what_is_required_is_asked_for_with_the_way_to_get_it(missing: str, message: str) -> None:
    answer = template(SERVICE, *(value for value in GIVEN if not value.startswith(missing)))
    assert answer.returncode != 0
    assert f"{missing} is missing" in answer.stderr
    assert message in answer.stderr


@needs_helm
@pytest.mark.parametrize(
    ("chart", "value"),
    [
        (SERVICE, "replicas=2"),
        (SERVICE, "image.registry=x"),
        (SERVICE, "cluster.imagePullPolicy=Always"),
        (SERVICE, "cluster.store.bucket=x"),
        (SERVICE, "metrics.serviceMonitor.namespace=x"),
        (SERVICE, "logLevel=loud"),
        (TENANT, "networkPolicy.ingress=x"),
        (TENANT, "store.existingSecret=x"),
        (TENANT, "networkPolicy.egress[0].cidr=example.com"),
    ],
)
def test_a_value_that_is_not_known_is_refused(chart: Path, value: str) -> None:
    answer = template(chart, *(GIVEN if chart == SERVICE else ()), value)
    assert answer.returncode != 0
    assert "don't meet the specifications of the schema" in answer.stderr


@needs_helm
def test_the_service_reads_the_values_as_they_stand() -> None:
    objects = render(SERVICE, *GIVEN, "cluster.namespaces={team-a,team-b}", "cluster.node_memory_bytes=10000000000")
    cluster = parse_cluster(yaml.safe_load(objects["ConfigMap", "hone"]["data"]["config.yaml"]))
    assert cluster.namespaces == ("team-a", "team-b")
    assert cluster.node_memory_bytes == 10_000_000_000
    assert cluster.report is not None
    assert cluster.report.address == "hone.hone-system.svc:7465"


@needs_helm
def test_a_report_address_of_the_platform_is_kept() -> None:
    objects = render(SERVICE, *GIVEN, "cluster.report.address=hone.example.com:443")
    config = yaml.safe_load(objects["ConfigMap", "hone"]["data"]["config.yaml"])
    assert config["report"] == {"address": "hone.example.com:443"}


@needs_helm
@pytest.mark.parametrize("values", [GIVEN, POSTGRES], ids=["sqlite", "postgresql"])
def test_what_pods_read_at_their_start_restarts_them_when_it_changes(values: tuple[str, ...]) -> None:
    def annotations(*more: str) -> Any:
        deployment = render(SERVICE, *values, *more)["Deployment", "hone"]
        return deployment["spec"]["template"]["metadata"]["annotations"]

    assert annotations() == annotations()
    assert annotations() != annotations("cluster.namespaces={team-a}")


@needs_helm
def test_sqlite_is_one_process_at_a_time_on_a_volume_that_outlives_the_release() -> None:
    objects = render(SERVICE, *GIVEN)
    assert objects["Deployment", "hone"]["spec"]["strategy"] == {"type": "Recreate"}
    claim = objects["PersistentVolumeClaim", "hone-data"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    home = next(volume for volume in pod_of(objects)["volumes"] if volume["name"] == "home")
    assert home["persistentVolumeClaim"] == {"claimName": "hone-data"}


@needs_helm
def test_postgresql_comes_by_reference_and_needs_no_volume() -> None:
    objects = render(SERVICE, *POSTGRES)
    assert objects["Deployment", "hone"]["spec"]["strategy"]["type"] == "RollingUpdate"
    assert not any(kind == "PersistentVolumeClaim" for kind, _ in objects)
    variables = {variable["name"]: variable for variable in pod_of(objects)["containers"][0]["env"]}
    reference = variables["HONE_DATABASE"]["valueFrom"]
    assert reference == {"secretKeyRef": {"name": "hone-database", "key": "url"}}


@needs_helm
def test_the_service_passes_restricted_pod_security_as_any_user() -> None:
    objects = render(SERVICE, *GIVEN)
    pods = [pod_of(objects), objects["Pod", "hone-test-health"]["spec"]]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "runAsUser" not in pod["securityContext"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@needs_helm
def test_the_service_may_do_this_in_a_tenants_namespace_and_nothing_more() -> None:
    role = render(SERVICE, *GIVEN)["ClusterRole", "hone-tenant"]
    may = {
        (group, resource): sorted(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert may == {
        ("batch", "jobs"): ["create", "delete", "get", "list", "patch", "watch"],
        ("", "pods"): ["get", "list", "watch"],
        ("", "pods/log"): ["get"],
        ("", "events"): ["list", "watch"],
        ("kueue.x-k8s.io", "workloads"): ["list", "watch"],
    }


@needs_helm
def test_everywhere_the_service_may_only_ask_who_somebody_is_and_what_they_may() -> None:
    objects = render(SERVICE, *GIVEN)
    bindings = [item for (kind, _), item in objects.items() if kind in ("ClusterRoleBinding", "RoleBinding")]
    assert [binding["roleRef"]["name"] for binding in bindings] == ["system:auth-delegator"]


@needs_helm
def test_the_tenants_grant_is_for_one_account_in_its_own_namespace() -> None:
    objects = render(TENANT, "service.name=hone", "service.namespace=platform")
    binding = objects["RoleBinding", "hone-service"]
    assert binding["metadata"]["namespace"] == "hone-system"
    assert binding["roleRef"]["name"] == "hone-tenant"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "hone", "namespace": "platform"}]
    assert not any(kind.startswith("Cluster") for kind, _ in objects)


@needs_helm
def test_a_tenant_without_a_service_grants_nothing() -> None:
    objects = render(TENANT, "service.name=")
    assert not any(kind == "RoleBinding" for kind, _ in objects)
    rules = objects["NetworkPolicy", "hone-trainers"]["spec"]["egress"]
    assert not any("namespaceSelector" in peer for rule in rules for peer in rule.get("to", []))


@needs_helm
def test_a_trainers_account_has_no_token_and_no_rights() -> None:
    objects = render(TENANT, "users.groups={team-a}")
    assert objects["ServiceAccount", "hone-trainer"]["automountServiceAccountToken"] is False
    bound = [subject for (kind, _), item in objects.items() if kind == "RoleBinding" for subject in item["subjects"]]
    assert not any(subject["name"] == "hone-trainer" for subject in bound)


@needs_helm
def test_a_store_key_is_taken_whole_or_not_at_all() -> None:
    assert not any(kind == "Secret" for kind, _ in render(TENANT))
    objects = render(TENANT, "store.accessKeyId=key", "store.secretAccessKey=secret")
    assert objects["Secret", "hone-store"]["data"].keys() == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert "store.secretAccessKey is missing" in template(TENANT, "store.accessKeyId=key").stderr


@needs_helm
def test_optional_objects_are_there_when_asked_for() -> None:
    optional = {"ServiceMonitor", "ResourceQuota", "LimitRange"}
    assert not optional & {kind for kind, _ in [*render(SERVICE, *GIVEN), *render(TENANT)]}
    service = render(SERVICE, *GIVEN, "metrics.serviceMonitor.enabled=true")
    tenant = render(TENANT, "resourceQuota.hard.pods=4", "limitRange.limits[0].type=Pod")
    assert optional <= {kind for kind, _ in [*service, *tenant]}


@needs_helm
def test_every_namespaced_object_says_where_it_belongs() -> None:
    for chart, values in ((SERVICE, GIVEN), (TENANT, ())):
        for (kind, name), item in render(chart, *values).items():
            assert kind.startswith("Cluster") or item["metadata"].get("namespace") == "hone-system", (kind, name)
