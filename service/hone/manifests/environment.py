"""The variables of a trainer's container, in the order in which people look for them."""

from collections.abc import Iterator
from typing import Any

from hone.cluster import Cluster
from hone.job import Plan
from hone.manifests import names
from hone.run import ENV_PYTHON_REWARDS, Run

NEVER_PROXIED = ("localhost", "127.0.0.1", ".svc", ".cluster.local")

Variable = dict[str, Any]


def environment(run: Run, plan: Plan, cluster: Cluster, *, job_name: str, reports: bool) -> list[Variable]:
    """Every variable of the container; values of Secrets by reference."""
    return [
        *_pod(plan, cluster),
        *_gang(plan, cluster, job_name),
        *(_report(cluster) if reports else ()),
        *_store(cluster),
        *_hub(cluster),
        *_trust(cluster),
        *_proxy(cluster, reports=reports),
        *_places(),
        *(_value(name, value) for name, value in cluster.environment.items()),
        *(_secret(name, secret.name, secret.key) for name, secret in cluster.secret_environment.items()),
    ]


def _pod(plan: Plan, cluster: Cluster) -> Iterator[Variable]:
    yield _value(names.ENV_SPEC_FILE, names.SPEC_FILE)
    yield _value(names.ENV_WORK, names.WORK_DIRECTORY)
    yield _field(names.ENV_POD_NAME, "metadata.name")
    yield _field(names.ENV_POD_UID, "metadata.uid")
    yield _field(names.ENV_POD_NAMESPACE, "metadata.namespace")
    yield _value(names.ENV_GRACE_S, str(cluster.grace_period_s))
    yield _value(names.ENV_GPUS, str(plan.launch.gpus_per_node))
    if cluster.python_rewards:
        yield _value(ENV_PYTHON_REWARDS, "1")
    yield _limit(names.ENV_CPU_LIMIT, "limits.cpu")
    yield _limit(names.ENV_MEMORY_LIMIT_BYTES, "limits.memory")


def _gang(plan: Plan, cluster: Cluster, job_name: str) -> Iterator[Variable]:
    if plan.launch.nodes > 1:
        yield _value(names.ENV_MAIN_ADDRESS, f"{job_name}-0.{names.WORKERS_SERVICE}")
        yield _value(names.ENV_MAIN_PORT, str(names.MAIN_PORT))
        yield _value(names.ENV_RENDEZVOUS_S, str(cluster.rendezvous_s))


def _report(cluster: Cluster) -> Iterator[Variable]:
    if cluster.report is None:
        return
    yield _value(names.ENV_REPORT_ADDRESS, cluster.report.address)
    yield _value(names.ENV_REPORT_TOKEN_FILE, names.TOKEN_FILE)
    if cluster.report.ca_config_map:
        yield _value(names.ENV_REPORT_CA_FILE, names.REPORT_CA_FILE)
    elif cluster.ca_config_map:
        yield _value(names.ENV_REPORT_CA_FILE, names.CA_FILE)


def _store(cluster: Cluster) -> Iterator[Variable]:
    store = cluster.store
    if store.endpoint:
        yield _value("AWS_ENDPOINT_URL_S3", store.endpoint)
    if store.region:
        yield _value("AWS_DEFAULT_REGION", store.region)
    if store.secret_name:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            yield _secret(name, store.secret_name, name)


def _hub(cluster: Cluster) -> Iterator[Variable]:
    if cluster.hub.endpoint:
        yield _value("HF_ENDPOINT", cluster.hub.endpoint)
    if token := cluster.hub.token_secret:
        yield _secret("HF_TOKEN", token.name, token.key)


def _trust(cluster: Cluster) -> Iterator[Variable]:
    """The bundle for each of the libraries that open connections: Python's ssl and httpx, requests, boto3, gRPC."""
    if cluster.ca_config_map:
        for name in (
            "SSL_CERT_FILE",
            "REQUESTS_CA_BUNDLE",
            "AWS_CA_BUNDLE",
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
        ):
            yield _value(name, names.CA_FILE)


def _proxy(cluster: Cluster, *, reports: bool) -> Iterator[Variable]:
    """In both spellings: libraries differ in which they read."""
    proxy = cluster.proxy
    if proxy is None:
        return
    direct = [*NEVER_PROXIED, *proxy.no_proxy]
    if cluster.report and reports:
        direct.append(cluster.report.address.rpartition(":")[0])
    values = {
        "HTTP_PROXY": proxy.http_proxy,
        "HTTPS_PROXY": proxy.https_proxy,
        "NO_PROXY": ",".join(dict.fromkeys(direct)),
    }
    for name, value in values.items():
        if value:
            yield _value(name, value)
            yield _value(name.lower(), value)


def _places() -> Iterator[Variable]:
    """Everything that writes, writes below /work. USER: a user id that the image does not know has no name."""
    work = names.WORK_DIRECTORY
    yield _value("HOME", f"{work}/home")
    yield _value("USER", "hone")
    yield _value("TMPDIR", f"{work}/{names.TEMPORARY_DIRECTORY}")
    yield _value("HF_HOME", f"{work}/huggingface")
    yield _value("TRITON_CACHE_DIR", f"{work}/cache/triton")
    yield _value("TORCHINDUCTOR_CACHE_DIR", f"{work}/cache/inductor")


def _value(name: str, value: str) -> Variable:
    return {"name": name, "value": value}


def _field(name: str, path: str) -> Variable:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _limit(name: str, resource: str) -> Variable:
    return {"name": name, "valueFrom": {"resourceFieldRef": {"resource": resource}}}


def _secret(name: str, secret: str, key: str) -> Variable:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
