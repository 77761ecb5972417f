"""What a cluster cannot run of a request that is right in itself; told before anything is made, all at once.

Called by the Kubernetes backend before a job is recorded, and by `hone render`.
"""

from collections.abc import Iterator

from hone.checkpoints import MAX_RESUME_POINTS
from hone.cluster import Cluster
from hone.errors import InvalidRequest, Violation
from hone.job import Plan
from hone.manifests.job import check_renderable
from hone.run import ResumePoint, Run
from hone.spec import JobSpec
from hone.spec.rewards import forbidden_functions
from hone.spec.sources import sources
from hone.spec.words import OWN_LABELS

MAX_ID = "x" * 50
"""The longest id of a job."""
_POINT = ResumePoint(step=999_999, place="attempt-999/claim-999/checkpoints/step-999999", sha256="f" * 64)


def refuse(spec: JobSpec, plan: Plan, cluster: Cluster) -> None:
    """Raise InvalidRequest with every violation. `spec` is the resolved request."""
    found = [*_files(spec, cluster), *_labels(spec, cluster), *_gpus(plan, cluster)]
    if not cluster.python_rewards:
        found += forbidden_functions(spec)
    try:
        check_renderable(longest_run(spec, plan, cluster), plan, managed=True)
    except InvalidRequest as error:
        found += error.violations
    if found:
        raise InvalidRequest(found)


def longest_run(spec: JobSpec, plan: Plan, cluster: Cluster) -> Run:
    """An attempt whose names are as long as can be, after as many checkpoints as it may go on from."""
    return Run(
        namespace="x" * 63,
        job=MAX_ID,
        attempt=999,
        nonce=MAX_ID,
        spec=spec,
        launch=plan.launch,
        store=cluster.store.uri,
        inputs={},
        resume=(_POINT,) * MAX_RESUME_POINTS,
    )


def _files(spec: JobSpec, cluster: Cluster) -> Iterator[Violation]:
    """file:// sources that no pod would see."""
    for path, source in sources(spec, scheme="file"):
        if not cluster.holds_path(source.removeprefix("file://")):
            mounts = ", ".join(str(mount["mountPath"]) for mount in cluster.volume_mounts)
            below = f", or a file below {mounts}, which the platform mounts" if mounts else ""
            message = "a pod has no such file: put it into the store and name s3://bucket/key, or name "
            message += f"hf://organisation/name{below}."
            yield Violation(path=path, value=source, message=message)


def _labels(spec: JobSpec, cluster: Cluster) -> Iterator[Violation]:
    for key, value in spec.labels.items():
        path = f"labels.{key}"
        if key in OWN_LABELS:
            yield Violation(path=path, value=value, message=f"{key} is set by Kubernetes: choose another key.")
        elif cluster.labels.get(key, value) != value:
            message = f"is {cluster.labels[key]!r} for every job of this platform: remove it."
            yield Violation(path=path, value=value, message=message)


def _gpus(plan: Plan, cluster: Cluster) -> Iterator[Violation]:
    if not plan.gpu:
        return
    most, asked = cluster.profiles()[plan.gpu].gpus_per_node, plan.launch.gpus_per_node
    if asked > most:
        message = f"{asked} is more than a node with {plan.gpu} has: at most {most}; use more nodes (compute.nodes)."
        yield Violation(path="compute.gpus_per_node", value=asked, message=message)
