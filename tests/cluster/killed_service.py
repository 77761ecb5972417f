"""`hone serve` on a real cluster, in a process that a test kills and starts again, and the tenant that it serves.

Used by test_kills.py. Callers and pods come over TLS with tokens of the cluster, as where the chart installed it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hone.cluster import Cluster as Platform
from hone.errors import Unavailable
from hone.home import owner
from hone.manifests import render_tenant
from hone.rpc.client import Client

from .harness.access import Cluster
from .harness.places import HOST_ADDRESS

SERVE = "import asyncio; from hone.rpc.server import serve; from hone.settings import Settings; "
SERVE += "asyncio.run(serve(Settings()))"
STAND_IN = Path(__file__).with_name("stand_in.py")
ACCOUNT = "caller"

_Answer = TypeVar("_Answer")


@dataclass(kw_only=True)
class Tenant:
    """A namespace that one service after another has for itself, at one address."""

    cluster: Cluster
    namespace: str
    bucket: str
    certificates: Path
    """Directory of ca.crt, tls.crt and tls.key for HOST_ADDRESS."""
    port: int = field(default_factory=lambda: _free_port())
    token: str = ""

    @property
    def address(self) -> str:
        """Where its services listen: pods reach it."""
        return f"{HOST_ADDRESS}:{self.port}"

    @property
    def platform(self) -> Platform:
        """The stand-in lies where the image looks for modules first."""
        return Platform.model_validate(
            {
                "image": self.cluster.service_image,
                "image_pull_policy": "Never",
                "store": {
                    "uri": f"s3://{self.bucket}/hone",
                    "endpoint": self.cluster.s3.pod_endpoint,
                    "region": "us-east-1",
                    "secret_name": "store",
                },
                "report": {"address": self.address, "ca_config_map": {"name": "hone-ca"}},
                "namespaces": [self.namespace],
                "volumes": [{"name": "stand-in", "configMap": {"name": "stand-in"}}],
                "volume_mounts": [{"name": "stand-in", "mountPath": "/home/hone"}],
                "scratch_bytes": 64 << 20,
                "grace_period_s": 5,
                "cpus_per_process": 0.4,
            }
        )

    def furnish(self) -> None:
        """What pods find there, and an account that may submit."""
        keys = {"AWS_ACCESS_KEY_ID": self.cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": self.cluster.s3.secret_key}
        rules = [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list"]}]
        subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": self.namespace}
        role_ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": ACCOUNT}
        self.cluster.kubectl.apply(
            _object("v1", "ConfigMap", "stand-in", data={"hone_trainer.py": STAND_IN.read_text()}),
            _object("v1", "ConfigMap", "hone-ca", data={"ca.crt": (self.certificates / "ca.crt").read_text()}),
            _object("v1", "Secret", "store", stringData=keys),
            _object("v1", "ServiceAccount", ACCOUNT),
            _object("rbac.authorization.k8s.io/v1", "Role", ACCOUNT, rules=rules),
            _object("rbac.authorization.k8s.io/v1", "RoleBinding", ACCOUNT, roleRef=role_ref, subjects=[subject]),
            *render_tenant(self.namespace, self.platform),
            namespace=self.namespace,
        )
        words = ("create", "token", ACCOUNT, "--audience", "hone", "--duration", "12h")
        self.token = self.cluster.kubectl(*words, namespace=self.namespace).strip()


class KilledService:
    """One home, served by a process that ends at its point, and then by another that does not."""

    def __init__(self, tenant: Tenant, directory: Path, *, crash_at: str) -> None:
        self.tenant, self.crash_at = tenant, crash_at
        self.home = Path(tempfile.mkdtemp(prefix="home-", dir=directory))
        self.is_killed = False
        """Whether it reached its point."""
        self.ready_at = 0.0
        """When the service that is there now listened first."""
        config = self.home / "cluster.yaml"
        config.write_text(yaml.safe_dump(tenant.platform.model_dump(mode="json", exclude_none=True)))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
        self._environment = {
            **kept,
            "HONE_HOME": str(self.home),
            "HONE_CLUSTER": str(config),
            "HONE_ADDRESS": tenant.address,
            "HONE_TLS_CERT": str(tenant.certificates / "tls.crt"),
            "HONE_TLS_KEY": str(tenant.certificates / "tls.key"),
            "KUBECONFIG": str(tenant.cluster.kubeconfig),
            "AWS_ACCESS_KEY_ID": tenant.cluster.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": tenant.cluster.s3.secret_key,
        }
        self._log = (self.home / "log").open("ab")
        self._process = self._start(crash_at)
        self.client = Client(
            tenant.address, namespace=tenant.namespace, token=tenant.token, tls_ca=tenant.certificates / "ca.crt"
        )

    def __enter__(self) -> "KilledService":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    @property
    def log(self) -> str:
        """What both processes wrote."""
        return (self.home / "log").read_text(encoding="utf-8")

    def ask(self, call: Callable[[Client], _Answer], *, timeout_s: float = 60) -> _Answer:
        """Call it until it answers, whether it is killed meanwhile or not."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.look_after()
            try:
                return call(self.client)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def look_after(self) -> None:
        """Start it again where it was killed; note when it listens."""
        code = self._process.poll()
        if code is not None:
            assert code == -signal.SIGKILL and not self.is_killed, f"it ended with {code}: {self.log}"
            self.is_killed, self.ready_at = True, 0.0
            self._process = self._start("")
        if not self.ready_at:
            found = owner(self.home)
            if found and found.pid == self._process.pid and found.address:
                self.ready_at = time.time()

    def wait_until_ready(self, *, timeout_s: float = 60) -> None:
        """Until the one that is there now listens."""
        deadline = time.monotonic() + timeout_s
        while not self.ready_at:
            assert time.monotonic() < deadline, f"it does not listen: {self.log}"
            time.sleep(0.05)
            self.look_after()

    def _start(self, crash_at: str) -> "subprocess.Popen[bytes]":
        environment = {**self._environment, "HONE_CRASH_AT": crash_at}
        return subprocess.Popen([sys.executable, "-c", SERVE], env=environment, stderr=self._log, stdout=self._log)


class Outages:
    """Notes when the API server last refused connections: others on this cluster stop it, and that is no fault here."""

    def __init__(self) -> None:
        self.last = 0.0
        """Seconds since 1970; 0 when it always answered."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no longer."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.2):
            try:
                socket.create_connection(("127.0.0.1", 6443), timeout=1).close()
            except OSError:
                self.last = time.time()


def _object(version: str, kind: str, name: str, **rest: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **rest}


def _free_port() -> int:
    with socket.create_server((HOST_ADDRESS, 0)) as probe:
        return int(probe.getsockname()[1])
