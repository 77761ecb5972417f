"""What a namespace needs once, before manifests that were rendered for kubectl run in it.

The chart helm/hone-tenant brings the same and more (rights, network policy, credentials); this is for people who have
no chart.
"""

from typing import Any

from hone.cluster import Cluster
from hone.manifests import names

_LABELS = {names.LABEL_PART_OF: names.PART_OF, names.LABEL_MANAGED_BY: names.MANAGED_BY_KUBECTL}


def render_tenant(namespace: str, cluster: Cluster) -> list[dict[str, Any]]:
    """The ServiceAccount of the pods, unless it is the namespace's own, and the headless Service of gangs."""
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": cluster.service_account, "namespace": namespace, "labels": dict(_LABELS)},
        "automountServiceAccountToken": False,
    }
    workers = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": names.WORKERS_SERVICE, "namespace": namespace, "labels": dict(_LABELS)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the ranks meet before any of them is ready
            "selector": {
                names.LABEL_COMPONENT: names.COMPONENT_TRAINER,
                names.LABEL_PART_OF: names.PART_OF,
            },
        },
    }
    return [*([account] if cluster.service_account != "default" else []), workers]
