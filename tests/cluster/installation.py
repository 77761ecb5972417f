"""Hone on the cluster as its charts install it: one release, its tenants, and what a caller outside needs.

    with install(cluster, tmp_path, tenants=("test-a",)) as hone:
        hone.wait_until_ready()

Everything that it makes is removed at the end. For tests of the charts, and for whoever needs a service on the cluster.
"""

import base64
import contextlib
import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hone import Client

from .harness.access import Cluster
from .harness.api import KubectlFailed, wait_until
from .harness.places import BIN, NODES, ROOT, RUN

SERVICE_CHART, TENANT_CHART = ROOT / "helm/hone", ROOT / "helm/hone-tenant"
SUBMITTER = "submitter"
"""ServiceAccount of each tenant's namespace that may submit there."""
_PORT = 7465

Json = dict[str, Any]


class HelmFailed(AssertionError):
    """helm ended with an error; the text is its own."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A release of helm/hone."""

    cluster: Cluster
    release: str
    namespace: str
    tenants: tuple[str, ...]
    directory: Path
    """Where its certificate is: ca.crt, tls.crt, tls.key."""
    values: Json = field(default_factory=dict)
    """What it was installed with."""

    @property
    def ca(self) -> Path:
        """Who signed the service's certificate."""
        return self.directory / "ca.crt"

    @property
    def address(self) -> str:
        """Where callers on this machine reach it, across its restarts: a port of a node."""
        service = self.cluster.kubectl.get("service", self.release, namespace=self.namespace)
        return f"{_node_address(self.cluster)}:{service['spec']['ports'][0]['nodePort']}"

    def token(self, tenant: str, *, account: str = SUBMITTER, audience: str = "hone") -> str:
        """A token for an account of a tenant's namespace."""
        words = ("create", "token", account, "--audience", audience, "--duration", "1h")
        return self.cluster.kubectl(*words, namespace=tenant).strip()

    def client(self, tenant: str) -> Client:
        """A caller who may submit in a tenant's namespace; close it."""
        return Client(self.address, namespace=tenant, token=self.token(tenant), tls_ca=self.ca)

    def upgrade(self, *words: str, **values: Any) -> None:
        """`helm upgrade --install --wait` with the values it has and these, which replace whole keys."""
        self.values.update(values)
        where = ("upgrade", "--install", self.release, str(SERVICE_CHART), "-n", self.namespace)
        _helm_with_values(self.cluster, self.values, *where, "--wait", "--timeout", "3m", *words)

    def helm(self, *words: str, timeout_s: float = 180) -> str:
        """helm, in the namespace of the release."""
        return helm(self.cluster, *words, "-n", self.namespace, timeout_s=timeout_s)

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        """Return when the Deployment has rolled out."""
        words = ("rollout", "status", f"deployment/{self.release}", f"--timeout={timeout_s:.0f}s")
        self.cluster.kubectl(*words, namespace=self.namespace, timeout_s=timeout_s + 10)

    def pod(self) -> Json:
        """The one pod of the service that is not on its way out."""
        selector = f"app.kubernetes.io/instance={self.release},app.kubernetes.io/component=service"
        pods = self.cluster.kubectl.items("pods", "-l", selector, namespace=self.namespace)
        (pod,) = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        return pod

    def logs(self) -> str:
        """What the service said."""
        return self.cluster.kubectl("logs", f"deployment/{self.release}", namespace=self.namespace)


@contextlib.contextmanager
def install(
    cluster: Cluster,
    directory: Path,
    *,
    tenants: Sequence[str] = (),
    bucket: str = "",
    database_url: str = "",
    values: Mapping[str, Any] | None = None,
    wait: bool = True,
) -> Iterator[Installation]:
    """Install the service, on SQLite or the PostgreSQL of a URL, and helm/hone-tenant in each tenant's namespace.

    The namespaces of tenants exist already. `bucket` exists too, and is written to by all of them with one key.
    """
    release = f"hone-{secrets.token_hex(3)}"
    make_certificate(directory, [f"DNS:{release}.{release}.svc", f"IP:{_node_address(cluster)}"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.new_namespace(release))
        hone = Installation(
            cluster=cluster,
            release=release,
            namespace=release,
            tenants=tuple(tenants),
            directory=directory,
            values=_values(cluster, tenants, bucket, dict(values or {})),
        )
        _make_tls_secret(hone)
        if database_url:
            _apply_secret(cluster, release, "hone-database", {"url": database_url})
            hone.values["database"] = {"existingSecret": "hone-database"}
        else:
            stack.enter_context(_volume(cluster, release, f"{release}-data"))
        if cluster.is_ours:
            _apply_secret(cluster, release, "hone-store", _store_key(cluster))
            hone.values["store"] = {"existingSecret": "hone-store"}
        for tenant in tenants:
            stack.enter_context(_tenant(hone, tenant))
        stack.callback(_uninstall, hone)
        words = ["--wait", "--timeout", "3m"] if wait else []
        _helm_with_values(cluster, hone.values, "install", release, str(SERVICE_CHART), "-n", release, *words)
        yield hone


def helm(cluster: Cluster, *words: str, stdin: str | None = None, timeout_s: float = 240) -> str:
    """Run helm; its standard output. Raises HelmFailed with what it said."""
    program = BIN / "helm"
    command = [str(program if program.exists() else "helm"), "--kubeconfig", str(cluster.kubeconfig), *words]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise HelmFailed(f"helm {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def make_certificate(directory: Path, names: Sequence[str]) -> None:
    """ca.crt, tls.crt and tls.key in a directory; names as openssl writes them: DNS:example.com, IP:192.0.2.1."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    (directory / "tls.ext").write_text(f"subjectAltName={','.join(names)}\n")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=Hone CA")
    openssl("req", *key, "-keyout", "tls.key", "-out", "tls.csr", "-subj", "/CN=hone")
    signer = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "tls.ext")
    openssl("x509", "-req", "-in", "tls.csr", *signer, "-out", "tls.crt")


def _store_key(cluster: Cluster) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key}


def _node_address(cluster: Cluster) -> str:
    """Where this machine reaches ports of nodes; ours open them on loopback only."""
    if cluster.is_ours:
        return "127.0.0.1"
    addresses = cluster.kubectl.items("nodes")[0]["status"]["addresses"]
    return next(str(found["address"]) for found in addresses if found["type"] == "InternalIP")


def _values(cluster: Cluster, tenants: Sequence[str], bucket: str, changes: Json) -> Json:
    repository, _, tag = cluster.service_image.rpartition(":")
    store: Json = {"uri": f"s3://{bucket or 'models'}/hone", "secret_name": "hone-store"}
    if cluster.is_ours:
        store["endpoint"] = cluster.s3.pod_endpoint
    own = {
        "image": {"repository": repository, "tag": tag},
        "tls": {"existingSecret": "hone-tls"},
        "service": {"type": "NodePort"},
        "logLevel": "debug",
        "cluster": {
            "image": cluster.trainer_image,
            "store": store,
            "namespaces": list(tenants),
            **changes.pop("cluster", {}),
        },
    }
    return {**own, **changes}


@contextlib.contextmanager
def _tenant(hone: Installation, namespace: str) -> Iterator[None]:
    cluster = hone.cluster
    if cluster.is_ours:
        _apply_secret(cluster, namespace, "hone-store", _store_key(cluster))
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": SUBMITTER}}
    cluster.kubectl.apply(account, namespace=namespace)
    values = {
        "service": {"name": hone.release, "namespace": hone.namespace},
        "users": {"serviceAccounts": [{"name": SUBMITTER}]},
        "ca": {"service": {"bundle": hone.ca.read_text()}},
    }
    _helm_with_values(cluster, values, "install", "hone-tenant", str(TENANT_CHART), "-n", namespace)
    try:
        yield
    finally:
        with contextlib.suppress(HelmFailed):
            helm(cluster, "uninstall", "hone-tenant", "-n", namespace, "--ignore-not-found")


@contextlib.contextmanager
def _volume(cluster: Cluster, release: str, claim: str) -> Iterator[None]:
    """A volume for the service's claim, where the cluster has nobody who makes volumes."""
    if not cluster.is_ours:
        yield
        return
    with volume(cluster, release, claim):
        yield


@contextlib.contextmanager
def volume(cluster: Cluster, namespace: str, claim: str) -> Iterator[Path]:
    """A directory of node-a as a volume for one claim; gone at the end."""
    name = f"{namespace}-{claim}"
    directory = RUN / "volumes" / name
    directory.mkdir(parents=True)
    terms = [{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [NODES[0].name]}]}]
    spec = {
        "capacity": {"storage": "20Gi"},
        "accessModes": ["ReadWriteOncePod"],
        "persistentVolumeReclaimPolicy": "Retain",
        "local": {"path": str(directory)},
        "nodeAffinity": {"required": {"nodeSelectorTerms": terms}},
        "claimRef": {"namespace": namespace, "name": claim},
    }
    cluster.kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec})
    try:
        yield directory
    finally:
        cluster.kubectl("delete", "pv", name, "--wait=false", "--ignore-not-found")
        shutil.rmtree(directory, ignore_errors=True)


def _make_tls_secret(hone: Installation) -> None:
    files = {name: (hone.directory / name).read_text() for name in ("tls.crt", "tls.key")}
    _apply_secret(hone.cluster, hone.namespace, "hone-tls", files, kind="kubernetes.io/tls")


def _apply_secret(
    cluster: Cluster, namespace: str, name: str, values: Mapping[str, str], *, kind: str = "Opaque"
) -> None:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": kind, "data": data}
    cluster.kubectl.apply(secret, namespace=namespace)


def _helm_with_values(cluster: Cluster, values: Json, *words: str) -> None:
    helm(cluster, *words, "--values", "-", stdin=json.dumps(values))


def _uninstall(hone: Installation) -> None:
    with contextlib.suppress(HelmFailed):
        helm(hone.cluster, "uninstall", hone.release, "-n", hone.namespace, "--ignore-not-found")


def wait_for_end(cluster: Cluster, namespace: str, job: str, *, timeout_s: float) -> str:
    """Complete or Failed: how a Job ended."""

    def look() -> str | None:
        with contextlib.suppress(KubectlFailed):
            conditions = cluster.kubectl.get("job", job, namespace=namespace)["status"].get("conditions", ())
            return next((c["type"] for c in conditions if c["type"] in ("Complete", "Failed")), None)
        return None

    return wait_until(f"Job {job} ends", look, timeout_s=timeout_s)
