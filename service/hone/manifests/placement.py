"""Where pods go: nodes with the planned GPU, one node for each pod of a gang, and what the platform adds."""

from typing import Any

from hone.cluster import Cluster
from hone.job import Plan
from hone.manifests import names
from hone.manifests.resources import GPU_RESOURCE
from hone.run import Run


def placement(run: Run, plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """Fields of the pod that the scheduler reads."""
    named = {
        "schedulerName": cluster.scheduler_name,
        "priorityClassName": cluster.priority_class_name,
        "runtimeClassName": cluster.runtime_class_name,
        "nodeSelector": dict(cluster.node_selector),
        "tolerations": _tolerations(plan, cluster),
        "affinity": {**_node_affinity(plan, cluster), **_pod_affinity(run, plan, cluster)},
    }
    return {name: value for name, value in named.items() if value}


def _tolerations(plan: Plan, cluster: Cluster) -> list[dict[str, Any]]:
    gpus = [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}] if plan.gpu else []
    return [*gpus, *(toleration.model_dump(exclude_none=True) for toleration in cluster.tolerations)]


def _node_affinity(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """By the platform's own profile; a request only names it."""
    if not plan.gpu:
        return {}
    labels = cluster.node_labels(plan.gpu)
    expressions = [{"key": key, "operator": "In", "values": [value]} for key, value in labels.items()]
    terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _pod_affinity(run: Run, plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """Pods of a gang never share a node: each has the plan of a whole one."""
    if plan.launch.nodes == 1:
        return {}
    mates = {"matchLabels": {names.LABEL_JOB: run.job, names.LABEL_ATTEMPT: str(run.attempt)}}
    apart = {"labelSelector": mates, "topologyKey": "kubernetes.io/hostname"}
    affinity: dict[str, Any] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    if cluster.topology_label and not run.spec.scheduling.queue:  # with a queue, Kueue places them
        near = {"labelSelector": mates, "topologyKey": cluster.topology_label}
        preferred = [{"weight": 100, "podAffinityTerm": near}]
        affinity["podAffinity"] = {"preferredDuringSchedulingIgnoredDuringExecution": preferred}
    return affinity
