"""The pod of one node of an attempt: one container, restricted, with its request, its token and room to write.

It works under any user id and with a read-only root: what is written goes to one scratch volume, seen as /work and as
/tmp. Secrets are taken by reference. The pod has no rights in the cluster; the one token in it is good for reports.
"""

from collections.abc import Mapping
from typing import Any

from hone.cluster import WORK_VOLUME, Cluster
from hone.job import Plan
from hone.manifests import names
from hone.manifests.environment import environment
from hone.manifests.placement import placement
from hone.manifests.resources import resources, shm_bytes, size
from hone.run import Run

TOKEN_LIFE_S = 3600
"""The kubelet renews the token when four fifths of this are over."""
DEADLINE_MARGIN_S = 60
"""A managed pod outlives its deadline by this: the service is there first, and says why."""

_CONFIG, _TOKEN, _SHM = "hone", "token", "shm"


def render_pod_template(
    run: Run,
    plan: Plan,
    cluster: Cluster,
    *,
    job_name: str,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    managed: bool,
) -> dict[str, Any]:
    """The pod template; pods of managed Jobs report to the service that the platform names."""
    reports = managed and cluster.report is not None
    return {
        "metadata": {
            "labels": {"sidecar.istio.io/inject": "false", **labels},
            "annotations": {**_platform_annotations(run, plan, cluster), **annotations},
        },
        "spec": {
            "restartPolicy": "Never",
            **_deadline(run, margin_s=DEADLINE_MARGIN_S if managed else 0),
            "terminationGracePeriodSeconds": cluster.grace_period_s,
            "serviceAccountName": cluster.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **({"subdomain": names.WORKERS_SERVICE} if plan.launch.nodes > 1 else {}),
            **placement(run, plan, cluster),
            "securityContext": _pod_security(cluster),
            **_pull_secrets(cluster),
            "containers": [_container(run, plan, cluster, job_name=job_name, reports=reports)],
            "volumes": _volumes(plan, cluster, reports=reports),
        },
    }


def _platform_annotations(run: Run, plan: Plan, cluster: Cluster) -> dict[str, str]:
    annotations = dict(cluster.annotations)
    if not cluster.safe_to_evict:
        annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "false"
        annotations["karpenter.sh/do-not-disrupt"] = "true"
    if cluster.topology_label and run.spec.scheduling.queue and plan.launch.nodes > 1:
        annotations[names.ANNOTATION_QUEUE_TOPOLOGY] = cluster.topology_label
    return annotations


def _deadline(run: Run, *, margin_s: int) -> dict[str, int]:
    """On the pod, whose clock starts when it has a node: a Job's own would count the wait for one too."""
    deadline = run.spec.scheduling.deadline
    return {"activeDeadlineSeconds": deadline + margin_s} if deadline else {}


def _pod_security(cluster: Cluster) -> dict[str, Any]:
    """Restricted. No user and no group are named: the image's own, or what the cluster chooses."""
    group = {"fsGroup": cluster.fs_group, "fsGroupChangePolicy": "OnRootMismatch"} if cluster.fs_group else {}
    return {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, **group}


def _pull_secrets(cluster: Cluster) -> dict[str, Any]:
    secrets = [{"name": name} for name in cluster.image_pull_secrets]
    return {"imagePullSecrets": secrets} if secrets else {}


def _container(run: Run, plan: Plan, cluster: Cluster, *, job_name: str, reports: bool) -> dict[str, Any]:
    return {
        "name": names.CONTAINER,
        "image": cluster.image,
        "imagePullPolicy": cluster.image_pull_policy,
        "command": ["python", "-m", "hone_trainer", "pod"],
        "env": environment(run, plan, cluster, job_name=job_name, reports=reports),
        "resources": resources(plan, cluster),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_MESSAGE_FILE,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _volume_mounts(cluster, reports=reports),
    }


def _volume_mounts(cluster: Cluster, *, reports: bool) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": _CONFIG, "mountPath": names.CONFIG_DIRECTORY, "readOnly": True},
        {"name": WORK_VOLUME, "mountPath": names.WORK_DIRECTORY},
        {"name": WORK_VOLUME, "mountPath": "/tmp", "subPath": names.TEMPORARY_DIRECTORY},
        {"name": _SHM, "mountPath": "/dev/shm"},
    ]
    if reports:
        mounts.append({"name": _TOKEN, "mountPath": names.TOKEN_DIRECTORY, "readOnly": True})
    return [*mounts, *(dict(mount) for mount in cluster.volume_mounts)]


def _volumes(plan: Plan, cluster: Cluster, *, reports: bool) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": _CONFIG, "projected": {"sources": _config_sources(cluster, reports)}}]
    if WORK_VOLUME not in [volume["name"] for volume in cluster.volumes]:
        volumes.append({"name": WORK_VOLUME, "emptyDir": {}})
    volumes.append({"name": _SHM, "emptyDir": {"medium": "Memory", "sizeLimit": size(shm_bytes(plan.launch, cluster))}})
    if reports:
        token = {"audience": names.AUDIENCE_REPORTS, "expirationSeconds": TOKEN_LIFE_S, "path": "token"}
        volumes.append({"name": _TOKEN, "projected": {"sources": [{"serviceAccountToken": token}]}})
    return [*volumes, *(dict(volume) for volume in cluster.volumes)]


def _config_sources(cluster: Cluster, reports: bool) -> list[dict[str, Any]]:
    """The request, from the pod's own annotation, and the certificate authorities."""
    # apiVersion is the default, and said: kubectl compares this list as a whole, and would find it changed every time
    field = {"apiVersion": "v1", "fieldPath": f"metadata.annotations['{names.ANNOTATION_SPEC}']"}
    sources: list[dict[str, Any]] = [{"downwardAPI": {"items": [{"path": "run.yaml", "fieldRef": field}]}}]
    report_ca = cluster.report.ca_config_map if cluster.report and reports else None
    for config_map, file in ((cluster.ca_config_map, names.CA_FILE), (report_ca, names.REPORT_CA_FILE)):
        if config_map:
            item = {"key": config_map.key, "path": file.rpartition("/")[2]}
            sources.append({"configMap": {"name": config_map.name, "items": [item]}})
    return sources
