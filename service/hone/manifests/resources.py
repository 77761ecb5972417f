"""What a pod asks for: the plan's figures and the platform's additions, as Kubernetes quantities.

Requests equal limits, so that a pod is evicted last and its trainer knows how much it has.
"""

import math
from typing import Any

from hone.cluster import WORK_VOLUME, Cluster
from hone.job import Launch, Plan

GPU_RESOURCE = "nvidia.com/gpu"
MIB, GIB = 1024**2, 1024**3
SUPERVISOR_BYTES = 512 * MIB
"""The trainer's own process beside the ranks: Python, boto3, parts of outputs on their way to the store."""
STEP_BYTES = 64 * MIB
"""Sizes are rounded up to this."""
LOG_BYTES = GIB
"""Disk of the node for logs, where the scratch space is a volume of its own."""


def resources(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """Requests and limits of the container; GPUs have no request of their own."""
    launch = plan.launch
    own_volume = WORK_VOLUME in [volume["name"] for volume in cluster.volumes]
    asked = {
        "cpu": cores(
            cluster.cpus_per_gpu * launch.gpus_per_node
            if launch.gpus_per_node
            else cluster.cpus_per_process * launch.processes_per_node
        ),
        "memory": size(plan.host_memory_bytes + SUPERVISOR_BYTES + shm_bytes(launch, cluster)),
        "ephemeral-storage": size(LOG_BYTES if own_volume else plan.disk_bytes + cluster.scratch_bytes),
    }
    gpus = {GPU_RESOURCE: str(launch.gpus_per_node)} if launch.gpus_per_node else {}
    return {"requests": asked, "limits": {**asked, **gpus}}


def shm_bytes(launch: Launch, cluster: Cluster) -> int:
    """Size of /dev/shm: 64 MB, the usual, break NCCL without a word."""
    if cluster.shm_bytes:
        return cluster.shm_bytes
    return launch.gpus_per_node * GIB if launch.gpus_per_node else launch.processes_per_node * GIB // 4


def size(size_bytes: int) -> str:
    """`7424Mi`, `16Gi`: rounded up, in the largest unit without a fraction, as the API server would write it."""
    mebibytes = math.ceil(size_bytes / STEP_BYTES) * STEP_BYTES // MIB
    return f"{mebibytes // 1024}Gi" if mebibytes % 1024 == 0 else f"{mebibytes}Mi"


def cores(number: float) -> str:
    """`4`, `500m`."""
    thousandths = math.ceil(number * 1000)
    return str(thousandths // 1000) if thousandths % 1000 == 0 else f"{thousandths}m"
