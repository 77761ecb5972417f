"""What a platform decides about the pods that train: image, store, where they report, where they run, as whom.

One YAML file, written by whoever runs the cluster. The chart puts it into a ConfigMap for the service (HONE_CLUSTER);
`hone render --config` takes it, or the chart's values, which hold it under `cluster:`. A secret appears as the name of
a Kubernetes Secret only; text that looks like one is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote

from pydantic import Field, ValidationError

from hone.errors import InvalidRequest, Violation
from hone.gpus import MIN_MEMORY_BYTES, GpuProfile, Interconnect, load_profiles
from hone.plan import Hardware
from hone.plan.coefficients import Coefficients
from hone.spec.faults import faults, rest_of
from hone.spec.part import Float, Int, Label, Part, Seconds, Words, setting
from hone.spec.secret import secret_message, secrets
from hone.spec.words import (
    Address,
    Bytes,
    DataKey,
    FreeKey,
    Image,
    Key,
    Namespace,
    ObjectName,
    StoreUri,
    Url,
    Variable,
)
from hone.spec.yaml_file import read_documents, single_fault

GIB = 1024**3
KEY = "cluster"
"""Where the chart's values hold the configuration."""
VOLUME_KINDS = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
"""What restricted Pod Security allows."""
WORK_VOLUME = "work"
"""A volume of this name takes the place of the scratch space."""
OWN_VOLUMES = ("hone", "token", "shm")
OWN_PATHS = ("/work", "/tmp", "/dev", "/etc/hone", "/var/run/secrets")
"""Where every pod has mounts of its own."""


class ConfigMapKey(Part):
    """A file in a ConfigMap of the tenant's namespace."""

    name: ObjectName
    """Name of the ConfigMap."""
    key: DataKey = setting("ca.crt", origin="Hone")
    """Key in it that holds the file: certificates in PEM."""


class SecretKey(Part):
    """One value in a Secret of the tenant's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: DataKey
    """Key in it."""


class StoreAccess(Part):
    """The artefact store, as trainer pods reach it."""

    uri: StoreUri
    """`s3://bucket/prefix`; `file:///directory` only below a volume of `volume_mounts` that all nodes share."""
    endpoint: Url | None = setting(None, origin="AWS")
    """Address of an S3-compatible store."""
    region: Label | None = setting(None, origin="boto3's own")
    """Region of the bucket."""
    secret_name: ObjectName | None = setting(None, origin="workload identity of the service account")
    """Secret in the tenant's namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""


class Report(Part):
    """The service that trainer pods report to."""

    address: Address
    """host:port, as in `hone.hone-system.svc:7465`; TLS always."""
    ca_config_map: ConfigMapKey | None = setting(None, origin="cluster.ca_config_map, else the image's own")
    """Certificate authority that signed the service's certificate, in each tenant's namespace."""


class Proxy(Part):
    """HTTP proxy of the pods; the workers, the service and cluster names never go through it."""

    http_proxy: Url | None = setting(None, origin="none")
    """For http:// addresses."""
    https_proxy: Url | None = setting(None, origin="none")
    """For https:// addresses: the Hub, and an S3 store that is not named in no_proxy."""
    no_proxy: Words = setting((), origin="none")
    """Hosts, domains and networks that are reached directly, besides the cluster's own."""


class HubAccess(Part):
    """The Hugging Face Hub, or a mirror of it."""

    endpoint: Url | None = setting(None, origin="huggingface.co")
    """Address of a mirror."""
    token_secret: SecretKey | None = setting(None, origin="none: public repositories only")
    """The token, by reference; a push needs one that may write."""


class Toleration(Part):
    """A taint that pods tolerate, in Kubernetes' own words."""

    key: Key | None = None
    """Key of the taint; absent with operator Exists: every taint."""
    operator: Literal["Equal", "Exists"] = setting("Equal", origin="Kubernetes")
    """How the value is compared."""
    value: Label | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent: every effect."""
    tolerationSeconds: Int | None = setting(None, origin="for ever", unit="seconds")
    """How long a NoExecute taint is tolerated."""


class Gpu(Part):
    """One kind of GPU, and the nodes that hold it."""

    memory_bytes: Bytes = Field(ge=MIN_MEMORY_BYTES)
    """What CUDA reports as total memory."""
    gpus_per_node: Int = Field(ge=1, le=1024)
    """GPUs of one node."""
    interconnect: Interconnect
    """Between the GPUs of one node."""
    bf16: bool
    """Whether the hardware computes in bfloat16."""
    dense_tflops: Float = Field(gt=0, lt=1e6)
    """TFLOP/s without sparsity, in bf16, or in float32 where there is no bf16."""
    product_label: Label
    """Value of the node label nvidia.com/gpu.product."""
    node_labels: dict[Key, Label] = setting({}, origin="nvidia.com/gpu.product: product_label")
    """Labels of its nodes, where they carry others, as cloud.google.com/gke-accelerator."""


class Measured(Part):
    """What `hone calibrate` measured of one kind of GPU; its entry of calibration.json."""

    fragmentation: Float = Field(ge=0, le=1)
    """Share that the caching allocator holds and cannot use."""
    margin: Float = Field(ge=0, le=1)
    """Share of the memory kept free."""
    flops_low: Float | None = setting(None, origin="20 % of the peak", unit="FLOP/s")
    """What training reached at least."""
    flops_high: Float | None = setting(None, origin="42 % of the peak", unit="FLOP/s")
    """What training reached at most."""
    source: str = setting("", origin="not told")
    """When and by what it was measured."""


class Cluster(Part):
    """The platform's configuration."""

    image: Image
    """The trainer image, best by digest. There is no default registry: build it from the Dockerfile (target trainer)
    and push it to a registry that the nodes reach."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = setting("IfNotPresent", origin="Kubernetes")
    """When a node pulls it."""
    image_pull_secrets: tuple[ObjectName, ...] = setting((), origin="none")
    """Secrets of the tenant's namespace to pull with."""
    store: StoreAccess
    """The artefact store."""
    report: Report | None = setting(None, origin="nobody listens")
    """The service that pods report to; absent for manifests that people apply by hand."""
    hub: HubAccess = setting(HubAccess(), origin="huggingface.co")
    """Where hf:// sources come from, and where outputs are pushed to (output.hub)."""
    ca_config_map: ConfigMapKey | None = setting(None, origin="the image's own")
    """Bundle of certificate authorities for every connection of the pod, the public ones that it needs included."""
    proxy: Proxy | None = setting(None, origin="none")
    """HTTP proxy."""
    environment: dict[Variable, str] = setting({}, origin="none")
    """Further variables of the trainer, as NCCL_SOCKET_IFNAME or MLFLOW_TRACKING_URI; no secrets."""
    secret_environment: dict[Variable, SecretKey] = setting({}, origin="none")
    """The same by reference to Secrets of the tenant's namespace, as WANDB_API_KEY or MLFLOW_TRACKING_TOKEN."""

    python_rewards: bool = setting(False, origin="Hone")
    """Whether a request's own Python functions (rewards.python) may run in the trainer: code of whoever submits, with
    the rights of the pod and the store's credentials. Without it, code runs behind an http scorer."""
    namespaces: tuple[Namespace, ...] = setting((), origin="none")
    """Namespaces of the tenants, each with the tenant chart installed."""
    service_account: ObjectName = setting("hone-trainer", origin="the tenant chart")
    """ServiceAccount of the pods; they hold none of its rights."""
    priority_class_name: ObjectName | None = setting(None, origin="the cluster's default")
    """PriorityClass of the pods."""
    runtime_class_name: ObjectName | None = setting(None, origin="the nodes' default")
    """RuntimeClass of the pods."""
    scheduler_name: ObjectName | None = setting(None, origin="Kubernetes' own")
    """Scheduler of the pods."""
    fs_group: Int | None = setting(None, origin="the cluster's choice", ge=1)
    """Group that owns mounted volumes; leave it out on OpenShift, which chooses one."""
    tolerations: tuple[Toleration, ...] = setting((), origin="none")
    """Taints that every pod tolerates; pods with GPUs also tolerate nvidia.com/gpu."""
    node_selector: dict[Key, Label] = setting({}, origin="none")
    """Labels of the nodes that pods may run on."""
    topology_label: Key | None = setting(None, origin="none")
    """Label that names a node's rack or block: the pods of one job stand together in one where there is room."""
    labels: dict[FreeKey, Label] = setting({}, origin="none")
    """Labels of every Job and pod, as for cost accounts; a request cannot change one."""
    annotations: dict[FreeKey, str] = setting({}, origin="none")
    """Annotations of every pod."""
    volumes: tuple[dict[str, Any], ...] = setting((), origin="none")
    """Further volumes in Kubernetes' own words; one named `work` takes the place of the scratch space on the node."""
    volume_mounts: tuple[dict[str, Any], ...] = setting((), origin="none")
    """Where the trainer sees them; file:// sources may stand below these paths."""

    cpus_per_gpu: Float = setting(3.0, origin="the smallest cloud nodes have 4 for a GPU", unit="cores", gt=0)
    """CPU cores that a pod asks for with each GPU."""
    cpus_per_process: Float = setting(1.0, origin="Hone", unit="cores", gt=0)
    """CPU cores that a pod without GPUs asks for with each training process."""
    node_memory_bytes: Bytes = setting(8 * GIB, origin="half of a common node", unit="bytes", ge=MIN_MEMORY_BYTES)
    """Memory that a node without GPUs can give to one pod; training on CPUs is planned into it."""
    scratch_bytes: Bytes = setting(8 * GIB, origin="Hone", unit="bytes", ge=0)
    """Disk for data sets, caches and logs, on top of what the plan counts for weights and outputs."""
    shm_bytes: Bytes | None = setting(
        None, origin="1 GiB for each GPU, 256 MiB for each process without", unit="bytes", ge=64 * 1024**2
    )
    """Size of /dev/shm, which counts as memory."""
    grace_period_s: Seconds = setting(120, origin="the warning of spot machines", unit="seconds", ge=1)
    """Time between SIGTERM and SIGKILL: enough to write and upload a checkpoint."""
    rendezvous_s: Seconds = setting(
        300, origin="Hone: longer than a scheduler needs that has room", unit="seconds", ge=1
    )
    """How long the pods of one job wait for each other before the attempt ends and frees what it holds."""
    start_deadline_s: Seconds = setting(600, origin="Hone: longer than a large image needs", unit="seconds", ge=1)
    """How long a pod may hold its place whose container cannot be started: no image, no Secret, no volume."""
    gang_deadline_s: Seconds = setting(120, origin="Hone", unit="seconds", ge=2)
    """How long pods of a gang hold their places for one that finds none: each gang between half and one and a half of
    it, so that of two that hold each other one gives way."""
    ttl_seconds_after_finished: Seconds = setting(604_800, origin="7 days", unit="seconds", ge=0)
    """How long a Job that was applied by hand stays after its end. The service deletes its own."""
    safe_to_evict: bool = setting(False, origin="Hone: training is lost time")
    """Whether the cluster autoscaler and Karpenter may move a running pod to save a node."""
    gpu_profiles: dict[str, Gpu] = setting({}, origin="those that Hone ships")
    """Kinds of GPUs to plan with, by the name that requests use."""
    calibration: dict[str, Measured] = setting({}, origin="not calibrated")
    """What was measured of kinds of GPUs, by the same names."""

    def profiles(self) -> Mapping[str, GpuProfile]:
        """The GPU profiles that requests are planned with."""
        return {
            name: GpuProfile(name=name, **gpu.model_dump(exclude={"node_labels"}))
            for name, gpu in self.gpu_profiles.items()
        } or _shipped_profiles()

    def node_labels(self, gpu: str) -> Mapping[str, str]:
        """Labels of the nodes that hold a kind of GPU."""
        named = self.gpu_profiles[gpu].node_labels if gpu in self.gpu_profiles else {}
        return named or {"nvidia.com/gpu.product": self.profiles()[gpu].product_label}

    def hardware(self) -> Hardware:
        """What requests are planned with: this cluster, whatever machine does the planning."""
        measured = {name: Coefficients(**found.model_dump()) for name, found in self.calibration.items()}
        memory = self.node_memory_bytes
        return Hardware(profiles=self.profiles(), cpu_cores=0, memory_bytes=memory, measured=measured)

    def holds_path(self, path: str) -> bool:
        """Whether a path is seen in the pod through a mounted volume of the platform."""
        wanted = PurePosixPath(unquote(path))
        roots = [str(mount.get("mountPath")) for mount in self.volume_mounts]
        return ".." not in wanted.parts and any(wanted.is_relative_to(root) for root in roots)


@cache
def _shipped_profiles() -> Mapping[str, GpuProfile]:
    return load_profiles()


def load_cluster(path: Path, *, image: str = "", store_uri: str = "") -> Cluster:
    """The configuration in a YAML file: plain, or in a chart's values under `cluster:`.

    `image` and `store_uri` take the place of what the file has. Raises InvalidRequest with every violation.
    """
    documents = read_documents(path)
    data = documents[0] if len(documents) == 1 else None
    if not isinstance(data, dict):
        message = f"{path} holds no platform configuration: one mapping with image and store is expected."
        raise single_fault("", None, message)
    inner = data.get(KEY)
    if isinstance(inner, dict):
        return parse_cluster({**data, KEY: _replaced(inner, image, store_uri)})
    return parse_cluster(_replaced(data, image, store_uri))


def _replaced(data: dict[str, Any], image: str, store_uri: str) -> dict[str, Any]:
    changed = {**data, "image": image} if image else data
    if not store_uri:
        return changed
    store = data.get("store")
    return {**changed, "store": {**(store if isinstance(store, dict) else {}), "uri": store_uri}}


def parse_cluster(data: Mapping[str, Any]) -> Cluster:
    """Check a configuration. Raises InvalidRequest with every violation; paths are those of the given mapping."""
    nested = data.get(KEY)
    if isinstance(nested, Mapping):
        try:
            return parse_cluster(nested)
        except InvalidRequest as error:
            moved = [replace(violation, path=f"{KEY}.{violation.path}".rstrip(".")) for violation in error.violations]
            raise InvalidRequest(moved) from error
    try:
        cluster = Cluster.model_validate(data)
    except ValidationError as error:
        raise InvalidRequest([*faults(error, Cluster), *_further(data, error)]) from error
    if found := list(_rules(cluster)):
        raise InvalidRequest(found)
    return cluster


def _further(data: Mapping[str, Any], error: ValidationError) -> list[Violation]:
    """What else is wrong once the faulty fields are left out."""
    rest = rest_of(data, error, Cluster, stand_ins=_STAND_INS)
    return list(_rules(rest)) if rest else []


_STAND_INS: Mapping[str | int, Any] = {"image": "x", "store": {"uri": "s3://xxx"}, "uri": "s3://xxx"}


def _rules(cluster: Cluster) -> Iterator[Violation]:
    for path, kind in secrets(cluster.model_dump(mode="json")):
        yield Violation(path=path, message=secret_message(kind))
    yield from _volume_rules(cluster)
    for name in cluster.environment.keys() & cluster.secret_environment.keys():
        yield Violation(path=f"secret_environment.{name}", message="stands under environment too: give one.")
    uri = cluster.store.uri
    if uri.startswith("file://"):
        if not cluster.holds_path(uri.removeprefix("file://")):
            yield Violation(path="store.uri", value=uri, message="no volume of volume_mounts holds this directory: "
                            "mount one that all nodes share, or write s3://bucket/prefix.")  # fmt: skip
        for name in ("endpoint", "region", "secret_name"):
            if value := getattr(cluster.store, name):
                yield Violation(path=f"store.{name}", value=value, message="belongs to an s3:// store: remove it.")


def _volume_rules(cluster: Cluster) -> Iterator[Violation]:
    volumes = [volume.get("name") for volume in cluster.volumes]
    for index, volume in enumerate(cluster.volumes):
        yield from _volume(f"volumes.{index}", volume)
    for index, mount in enumerate(cluster.volume_mounts):
        yield from _volume_mount(f"volume_mounts.{index}", mount, volumes)
    for name in {name for name in volumes if volumes.count(name) > 1}:
        yield Violation(path="volumes", value=name, message=f"{name!r} is the name of several volumes.")


def _volume(path: str, volume: Mapping[str, Any]) -> Iterator[Violation]:
    name, kinds = volume.get("name"), sorted(volume.keys() - {"name"})
    if not isinstance(name, str) or name in OWN_VOLUMES:
        yield Violation(path=f"{path}.name", value=name, message=f"{name!r} is no free name: give each volume its own.")
    if len(kinds) != 1 or kinds[0] not in VOLUME_KINDS:
        given = " and ".join(kinds) or "nothing"
        yield Violation(path=path, value=kinds, message=f"{given} is given: restricted Pod Security takes one of "
                        f"{', '.join(VOLUME_KINDS)}.")  # fmt: skip


def _volume_mount(path: str, mount: Mapping[str, Any], volumes: list[Any]) -> Iterator[Violation]:
    name, place = mount.get("name"), mount.get("mountPath")
    if name not in volumes:
        yield Violation(path=f"{path}.name", value=name, message=f"{name!r} is not the name of one of the volumes.")
    if name == WORK_VOLUME:
        yield Violation(path=f"{path}.name", value=name, message="work is mounted at /work already: remove the mount.")
    if not isinstance(place, str) or not place.startswith("/") or place == "/":
        yield Violation(path=f"{path}.mountPath", value=place, message=f"{place!r} is not an absolute path.")
    elif own := next((own for own in OWN_PATHS if _overlap(place, own)), ""):
        yield Violation(path=f"{path}.mountPath", value=place, message=f"{place!r} meets {own}, which the pod has "
                        "already: choose another path.")  # fmt: skip


def _overlap(one: str, other: str) -> bool:
    first, second = PurePosixPath(one), PurePosixPath(other)
    return first.is_relative_to(second) or second.is_relative_to(first)
