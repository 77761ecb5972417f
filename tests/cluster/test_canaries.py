"""No secret is in anything that an installation writes: jobs run, others fail on the secrets themselves, and then all
that was written is searched for every secret that took part.

Each place is also searched for a word that must be there, or it was not searched at all.
"""

import json
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hone import Client
from hone.errors import HoneError, InvalidRequest
from hone.job import FailureClass, State

from .failing import Place, administrator
from .harness import process
from .harness.access import Cluster, Database
from .inputs import upload_inputs
from .installation import Installation, install

PLATFORM = {
    "node_memory_bytes": "2Gi",
    "scratch_bytes": "256Mi",
    "grace_period_s": 5,
    "hub": {"endpoint": "http://127.0.0.1:9", "token_secret": {"name": "hub", "key": "token"}},
}
HUB_TOKEN = f"hf_{'canary' * 6}"
HUB_PASSWORD = "canary-user-info"
WRONG_KEY = "canary-wrong-secret-key"
SEEN = "not-a-secret"
"""A label of a job: what a place shows that shows anything of it."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """An installation whose service and pods hold canaries."""

    main: Place
    wrong_key: Place
    objects: Path
    """Where the S3 server keeps what was stored."""
    database: Database
    tokens: tuple[str, ...]
    """Of the callers."""

    @property
    def canaries(self) -> tuple[str, ...]:
        """Everything that must be found nowhere."""
        s3_key, database_url = self.main.cluster.s3.secret_key, self.database.pod_url
        password = database_url.partition("@")[0].rpartition(":")[2]
        return (
            HUB_TOKEN,
            HUB_PASSWORD,
            WRONG_KEY,
            s3_key,
            password,
            *(token.rpartition(".")[2] for token in self.tokens),
        )


@pytest.fixture
def ground(cluster: Cluster, database: Database, tmp_path: Path) -> Iterator[Ground]:
    """The service on PostgreSQL, with a tenant whose key is right and one whose key is not."""
    code = secrets.token_hex(3)
    bucket, right, wrong = f"canaries-{code}", f"right-{code}", f"wrong-{code}"
    objects = cluster.s3.make_bucket(bucket)
    (tmp_path / "inputs").mkdir()
    request = {**upload_inputs(cluster.s3, bucket, tmp_path / "inputs"), "labels": {"canary": SEEN}}
    reference = {"secretKeyRef": {"name": "hub", "key": "endpoint"}}
    values: dict[str, Any] = {"cluster": PLATFORM, "env": [{"name": "HF_ENDPOINT", "valueFrom": reference}]}
    with (
        cluster.new_namespace(right),
        cluster.new_namespace(wrong),
        install(
            cluster, tmp_path, tenants=(right, wrong), bucket=bucket, database_url=database.pod_url, values=values,
            wait=False,
        ) as hone,
    ):  # fmt: skip
        _secret(hone, hone.namespace, "hub", endpoint=f"http://user:{HUB_PASSWORD}@127.0.0.1:9")
        for tenant in (right, wrong):
            _secret(hone, tenant, "hub", token=HUB_TOKEN)
        patch = json.dumps({"stringData": {"AWS_SECRET_ACCESS_KEY": WRONG_KEY}})
        cluster.kubectl("patch", "secret", "hone-store", "-p", patch, namespace=wrong)
        hone.wait_until_ready()
        api, places, tokens = administrator(cluster), [], []
        for tenant in (right, wrong):
            tokens.append(hone.token(tenant))
            client = Client(hone.address, namespace=tenant, token=tokens[-1], tls_ca=hone.ca)
            places.append(Place(hone=hone, tenant=tenant, request=request, api=api, client=client))
        with places[0].client, places[1].client:
            yield Ground(main=places[0], wrong_key=places[1], objects=objects, database=database, tokens=tuple(tokens))


def test_no_secret_is_found_in_anything_that_is_written(ground: Ground) -> None:
    refused = _refusals(ground)
    job = ground.main.submit("succeeds")
    pod = ground.main.reach(job, "training")
    assert HUB_TOKEN in _variables(ground, pod, "HF_TOKEN")
    assert any(HUB_PASSWORD in value for value in _variables(ground, ground.main.hone.pod(), "HF_ENDPOINT"))
    running = _objects(ground)
    pod_log = ground.main.kubectl("logs", f"job/{job}-a1", "--tail=-1")
    assert ground.main.client.wait(job, timeout_s=180).state == State.SUCCEEDED
    failed = ground.wrong_key.submit("fails")
    ended = ground.wrong_key.client.wait(failed, timeout_s=180)
    assert ended.failure and ended.failure.failure_class == FailureClass.INFRA, ended.state_reason
    written = {
        "refusals": refused,
        "objects of Kubernetes": running + _objects(ground),
        "the pod's log": pod_log,
        "the job": f"{ground.main.client.get(job)} {ended}",
        "events": str(list(ground.main.client.events()) + list(ground.wrong_key.client.events())),
        "the kept log": "".join(ground.main.client.logs(job)),
        "the service's log": ground.main.hone.logs(),
        "metrics": ground.main.monitor("/metrics") + ground.main.monitor("/readyz"),
        "the database": _dump(ground.database),
        "the store": "".join(
            path.read_bytes().decode(errors="replace")
            for path in (ground.objects / "hone").rglob("*")
            if path.is_file()
        ),
    }
    shown = {
        "the pod's log": "trainable params",
        "the kept log": "trainable params",
        "the service's log": "for callers whom Kubernetes knows",
        "events": "secret key is not the one",
        "metrics": ground.main.tenant,
        "refusals": "looks like a Hugging Face token",
    }
    for place, text in written.items():
        assert shown.get(place, SEEN) in text, f"{place}: nothing was searched"
        found = [canary for canary in ground.canaries if canary in text]
        assert not found, f"{place}: {found}"


def _variables(ground: Ground, pod: dict[str, Any], name: str) -> set[str]:
    """A variable of the processes in a pod: the canaries take part."""
    return {process.variable_of(pid, name) for pid in ground.main.cluster.processes_of(pod)}


def _refusals(ground: Ground) -> str:
    """What a caller reads whose request holds a token, or whose model cannot be looked at for the Hub's sake."""
    said = []
    for changes in ({"labels": {"note": HUB_TOKEN}}, {"model": {"source": "hf://organisation/model"}}):
        with pytest.raises(HoneError) as refused:
            ground.main.submit("refused", **changes)
        violations = refused.value.violations if isinstance(refused.value, InvalidRequest) else ()
        said.append(f"{refused.value} {' '.join(map(str, violations))}")
    return " ".join(said)


def _objects(ground: Ground) -> str:
    """Everything in the three namespaces but Secrets, and what Helm remembers of the releases."""
    hone, kubectl = ground.main.hone, ground.main.cluster.kubectl
    kinds = "jobs,pods,configmaps,events,deployments,services,serviceaccounts,rolebindings"
    namespaces = (hone.namespace, ground.main.tenant, ground.wrong_key.tenant)
    found = [kubectl("get", kinds, "-o", "yaml", namespace=namespace) for namespace in namespaces]
    return "".join(found) + hone.helm("get", "all", hone.release)


def _dump(database: Database) -> str:
    """The whole database as text."""
    done = subprocess.run(
        ["pg_dump", "--no-owner", database.url], capture_output=True, text=True, check=False, errors="replace"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _secret(hone: Installation, namespace: str, name: str, **values: str) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": values}
    hone.cluster.kubectl.apply(secret, namespace=namespace)
