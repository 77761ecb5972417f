"""What to do about a sentence of Kubernetes that is known by a part of it. Data only; docs/failures.md shows it.

In each table the first part that is found counts, without regard to case.
"""

from collections.abc import Sequence

Table = Sequence[tuple[str, str]]

_SMALLER = "a smaller request starts sooner."
_POLICY = "A policy of the platform refuses it: ask who runs the cluster."
_CREDENTIALS = "The registry wants credentials: cluster.image_pull_secrets, and that Secret in this namespace."
_UNREACHABLE = "The node cannot reach the registry: check cluster.image and the node's network."

UNPLACED: Table = (
    (
        "Insufficient nvidia.com/gpu",
        "It starts when one node has so many GPUs free; fewer start sooner: compute.gpus_per_node.",
    ),
    (
        "Insufficient ephemeral-storage",
        f"It starts when a node has so much scratch space; {_SMALLER} A platform can give `work` a volume of its own.",
    ),
    ("Insufficient", f"It starts when a node has so much free; {_SMALLER}"),
    ("Too many pods", "It starts when a node may hold one more pod."),
    ("unbound immediate", "The claim waits for a volume: `kubectl describe pvc` says for which."),
    ("persistentvolumeclaim", "Create that claim in the namespace, or take its volume out of cluster.volumes."),
    (
        "didn't match Pod's node affinity",
        "No free node has the labels of the GPU's profile or of cluster.node_selector: name another compute.gpu, or "
        "mend the profile's labels.",
    ),
    ("untolerated taint", "The platform can allow these nodes: cluster.tolerations."),
    ("were unschedulable", "Nodes are cordoned: `kubectl uncordon` brings them back."),
    ("no nodes available", "The cluster has no node that takes pods."),
    ("gate", "It waits for whoever set its scheduling gate."),
)
"""The scheduler's."""

NOT_ADMITTED: Table = (
    ("exceeded quota", "It starts when quota is free: end what is not needed, or have the ResourceQuota raised."),
    ("failed quota", "The namespace's ResourceQuota asks for limits that the platform has not set."),
    (
        "violates PodSecurity",
        "An override of the platform (cluster.*) breaks the Pod Security level of the namespace: take it out.",
    ),
    ("admission webhook", _POLICY),
    ("ValidatingAdmissionPolicy", _POLICY),
    ("serviceaccount", "Install the tenant chart in this namespace: it brings the service account."),
    ("PriorityClass", "Create that priority class, or correct cluster.priority_class_name."),
    ("RuntimeClass", "Create that runtime class, or correct cluster.runtime_class_name."),
    ("is being terminated", "The namespace is being deleted: use one that stays."),
)
"""The Job controller's, which could not make the pods."""

NOT_STARTED: Table = (
    ("couldn't find key", "The Secret or ConfigMap lacks that key: add it."),
    ("non-existent config key", "The Secret or ConfigMap lacks that key: add it."),
    ("runAsNonRoot", "The image runs as root: use the trainer image that Hone's Dockerfile builds."),
    ("configmap", "Create that ConfigMap in the namespace; the tenant chart brings the platform's."),
    ("secret", "Create that Secret in the namespace; the tenant chart brings the store's."),
    ("RuntimeHandler", "The node does not know that runtime class: correct cluster.runtime_class_name."),
    ("plugin type", "The node's network is at fault: ask who runs the cluster."),
    ("executable file not found", "That image is no trainer image: correct cluster.image."),
    ("no such file or directory", "That image is no trainer image: correct cluster.image."),
)
"""The kubelet's, which could not make the container."""

NO_IMAGE: Table = (
    ("pull policy of Never", "Load the image onto the node, or set cluster.image_pull_policy to IfNotPresent."),
    ("InvalidImageName", "Correct cluster.image."),
    ("unauthorized", _CREDENTIALS),
    ("authorization failed", _CREDENTIALS),
    ("denied", _CREDENTIALS),
    ("forbidden", _CREDENTIALS),
    ("no such host", _UNREACHABLE),
    ("dial tcp", _UNREACHABLE),
    ("timeout", _UNREACHABLE),
    ("no space left", "The node's disk is full: images are kept there until the kubelet clears them."),
    ("not found", "Push the image, or correct cluster.image."),
)
"""The kubelet's, which could not pull the image."""


def remedy(table: Table, sentence: str) -> str:
    """What to do about it; empty where nothing is known."""
    lower = sentence.lower()
    return next((fix for part, fix in table if part.lower() in lower), "")
