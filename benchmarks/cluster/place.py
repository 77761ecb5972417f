"""What bench.py measures with: namespaces of its own, a `hone serve` process in front of one, and an eye on its Jobs.

The service is a process of this tree behind TLS, its callers come with a token that Kubernetes looks up, and jobs are
recorded in SQLite (WAL, synchronous=FULL). Everything is gone at the end, whatever happened.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import RESTClientObject
from kubernetes.config import load_kube_config
from tests.cluster.harness.access import Cluster
from tests.cluster.harness.api import wait_until
from tests.cluster.installation import make_certificate

from hone.cluster import Cluster as Platform
from hone.home import owner
from hone.rpc.access import Access

CALLER = "caller"
_SERVE = Path(__file__).with_name("serve.py")
_METADATA = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cluster, a directory, and the namespaces that were made here."""

    cluster: Cluster
    directory: Path
    namespaces: list[str] = field(default_factory=list)

    def new_namespace(self) -> str:
        """Empty, with an account that may submit."""
        name = f"bench-{secrets.token_hex(4)}"
        self.namespaces.append(name)
        rules = [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list"]}]
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": CALLER}
        subject = {"kind": "ServiceAccount", "name": CALLER, "namespace": name}
        self.cluster.kubectl.apply(_object("v1", "Namespace", name))
        self.cluster.kubectl.apply(
            _object("v1", "ServiceAccount", CALLER),
            _object("rbac.authorization.k8s.io/v1", "Role", CALLER, rules=rules),
            _object("rbac.authorization.k8s.io/v1", "RoleBinding", CALLER, roleRef=role, subjects=[subject]),
            namespace=name,
        )
        return name

    def token(self, namespace: str) -> str:
        """Of the account that may submit there."""
        words = ("create", "token", CALLER, "--audience", "hone", "--duration", "2h")
        return self.cluster.kubectl(*words, namespace=namespace).strip()

    def platform(self, namespace: str) -> Platform:
        """No pod ever runs: nothing has to be behind the image and the volume."""
        shared = self.directory / "artifacts"
        return Platform.model_validate(
            {
                "image": "registry.example.com/hone/trainer:none",
                "store": {"uri": shared.as_uri()},
                "namespaces": [namespace],
                "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}],
                "volume_mounts": [{"name": "shared", "mountPath": str(shared)}],
            }
        )

    def empty(self, namespace: str) -> None:
        """Delete its Jobs by one request, and wait until they are gone."""
        kubectl = self.cluster.kubectl
        kubectl("delete", "--raw", f"/apis/batch/v1/namespaces/{namespace}/jobs", timeout_s=300)
        wait_until("the Jobs are gone", lambda: not kubectl.items("jobs", namespace=namespace), timeout_s=300)


@contextlib.contextmanager
def open_place(cluster: Cluster) -> Iterator[Place]:
    """A place; its namespaces are deleted at the end. Not below /tmp, where pods have a mount of their own."""
    place = Place(cluster=cluster, directory=Path(tempfile.mkdtemp(prefix="hone-bench-", dir="/var/tmp")))
    (place.directory / "artifacts").mkdir()
    make_certificate(place.directory, ["IP:127.0.0.1"])
    try:
        yield place
    finally:
        for namespace in place.namespaces:
            cluster.kubectl("delete", "namespace", namespace, "--wait=false", "--ignore-not-found")
        shutil.rmtree(place.directory, ignore_errors=True)


class Service:
    """A `hone serve` for one namespace. It may be started again, in front of another address of the API server."""

    def __init__(self, place: Place, namespace: str) -> None:
        self._place, self.namespace = place, namespace
        self._home = place.directory / namespace
        self._home.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._token = place.token(namespace)

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, api_url: str = "") -> None:
        """Start it, and wait until it listens. `api_url` is one without TLS and authentication."""
        config = self._home / "cluster.yaml"
        config.write_text(
            yaml.safe_dump(self._place.platform(self.namespace).model_dump(mode="json", exclude_none=True))
        )
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HONE_")},
            "HONE_HOME": str(self._home),
            "HONE_CLUSTER": str(config),
            "HONE_ADDRESS": f"127.0.0.1:{_free_port()}",
            "HONE_TLS_CERT": str(self._place.directory / "tls.crt"),
            "HONE_TLS_KEY": str(self._place.directory / "tls.key"),
            "HONE_AUTH": "kubernetes",
            "KUBECONFIG": str(self._kubeconfig(api_url) if api_url else self._place.cluster.kubeconfig),
        }
        log = self._home / "log"
        with log.open("ab") as lines:
            self._process = subprocess.Popen([sys.executable, str(_SERVE)], env=environment, stdout=lines, stderr=lines)
        while not ((found := owner(self._home)) and found.pid == self._process.pid and found.address):
            assert self._process.poll() is None, f"the service did not start: {log.read_text()}"
            time.sleep(0.05)
        self.address = found.address

    def stop(self) -> None:
        """End it; its jobs stay."""
        if self._process:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(30)
            self._process = None

    @property
    def access(self) -> Access:
        """For a caller."""
        return Access(token=self._token, tls_ca=self._place.directory / "ca.crt")

    def memory_mib(self) -> tuple[float, float]:
        """Resident memory of the process now, and the most that it ever had."""
        assert self._process
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        kib = {line.split()[0]: int(line.split()[1]) for line in status.splitlines() if line.startswith("Vm")}
        return kib["VmRSS:"] / 1024, kib["VmHWM:"] / 1024

    def processor_s(self) -> float:
        """Processor time of the process so far."""
        assert self._process
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _kubeconfig(self, api_url: str) -> Path:
        data = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "counted", "cluster": {"server": api_url}}],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [{"name": "counted", "context": {"cluster": "counted", "user": "nobody"}}],
            "current-context": "counted",
        }
        path = self._home / "kubeconfig"
        path.write_text(yaml.safe_dump(data))
        return path


class Eye:
    """Sees when each Job of a namespace appeared: a watch of its own, of metadata alone, in a thread."""

    def __init__(self, place: Place, namespace: str) -> None:
        self.seen: dict[str, float] = {}
        """Name of a Job → time.perf_counter() at which the API server told of it."""
        self._news = threading.Condition()
        configuration = configuration_of(place.cluster.kubeconfig)
        url = f"{configuration.host}/apis/batch/v1/namespaces/{namespace}/jobs?watch=true&timeoutSeconds=3600"
        self._answer = RESTClientObject(configuration).pool_manager.request(
            "GET", url, headers={"Accept": _METADATA}, preload_content=False, timeout=urllib3.Timeout(read=3600)
        )
        threading.Thread(target=self._look, name="eye", daemon=True).start()

    def close(self) -> None:
        """Look no longer."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._answer.shutdown()

    def wait(self, count: int, *, timeout_s: float = 300) -> None:
        """Until so many have been seen. Raises TimeoutError."""
        with self._news:
            if not self._news.wait_for(lambda: len(self.seen) >= count, timeout_s):
                raise TimeoutError(f"{len(self.seen)} of {count} Jobs after {timeout_s:.0f} s")

    def _look(self) -> None:
        rest = b""
        with contextlib.suppress(OSError, ValueError, urllib3.exceptions.HTTPError):  # it was shut
            while data := self._answer.read1(1 << 20):
                now = time.perf_counter()
                *lines, rest = (rest + data).split(b"\n")
                for event in map(json.loads, lines):
                    if event["type"] == "ADDED":
                        with self._news:
                            self.seen[event["object"]["metadata"]["name"]] = now
                            self._news.notify()


def configuration_of(kubeconfig: Path | str) -> Configuration:
    """For a client of the API server."""
    configuration = Configuration()
    load_kube_config(str(kubeconfig), client_configuration=configuration)
    return configuration


def _object(version: str, kind: str, name: str, **rest: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **rest}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
