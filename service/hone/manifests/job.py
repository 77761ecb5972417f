"""The Job of one attempt: its labels, how it ends, and how it is spread over nodes. pod.py has what runs in it.

A managed Job is one attempt: whatever fails in it ends it, and the service alone decides on another. A Job that people
apply by hand has nobody to decide: Kubernetes starts its pod again by the rules that stand in it.
"""

import re
from typing import Any

from hone import __version__
from hone.cluster import Cluster
from hone.errors import InvalidRequest, Violation
from hone.job import Failure, Plan
from hone.manifests import names
from hone.manifests.pod import render_pod_template
from hone.plan import Planned
from hone.run import FAILURE_CLASSES, Run, TrainerExit, is_retried, spec_hash
from hone.spec.sources import sources

_NO_JOBS = "a manifest is applied where no service knows other jobs: name the output's own address (hone get JOB)."
MAX_HOST_NAME = 63
"""Characters in the host name of a pod: the Job's name, a hyphen, the number of the node."""
MOST_YAML, REST_BYTES = 10, 8 * 1024
"""A request as YAML has at most so many bytes for one of its JSON (lists of digits, each on an indented line); and what
stands beside it in the annotation has at most so many, with all the checkpoints that it may go on from."""


def render_job(run: Run, plan: Plan, cluster: Cluster, *, managed: bool) -> dict[str, Any]:
    """The Job. Raises InvalidRequest when the request is longer than an annotation may be, or a name longer than a host
    name; what else a cluster refuses, refusals.py tells before."""
    name = job_name(run, managed=managed)
    _check_name(name, plan.launch.nodes)
    text = run.to_yaml()
    _check_size(run, text)
    labels = _labels(run, cluster, managed=managed)
    digest = {names.ANNOTATION_SPEC_HASH: spec_hash(run.spec)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": run.namespace,
            "labels": {**labels, **_queue_labels(run)},
            "annotations": digest,
        },
        "spec": {
            **_ending(run, plan, cluster, managed=managed),
            **_nodes(plan),
            "template": render_pod_template(
                run,
                plan,
                cluster,
                job_name=name,
                labels=labels,
                annotations={**digest, names.ANNOTATION_SPEC: text},
                managed=managed,
            ),
        },
    }


def check_renderable(run: Run, plan: Plan, *, managed: bool) -> None:
    """What render_job would raise. A short request is not written as YAML for it, which takes longer than the rest."""
    _check_name(job_name(run, managed=managed), plan.launch.nodes)
    if MOST_YAML * len(run.spec.model_dump_json().encode()) + REST_BYTES > names.MAX_SPEC_BYTES:
        _check_size(run, run.to_yaml())


def applied_run(planned: Planned, cluster: Cluster, *, namespace: str) -> Run:
    """The Run of a Job that people apply: nobody counts its attempts, and the same request gives the same Run.

    Raises InvalidRequest for outputs of other jobs, which only a service can find.
    """
    unknown = [Violation(path=path, value=text, message=_NO_JOBS) for path, text in sources(planned.spec, scheme="job")]
    if unknown:
        raise InvalidRequest(unknown)
    return Run(
        namespace=namespace,
        job=planned.spec.name,
        attempt=1,
        nonce=spec_hash(planned.spec)[:20],
        spec=planned.spec,
        launch=planned.plan.launch,
        store=cluster.store.uri,
        inputs={},
    )


def job_name(run: Run, *, managed: bool) -> str:
    """`<job>-a<attempt>`, or the job's id alone where nobody counts attempts."""
    return f"{run.job}-a{run.attempt}" if managed else run.job


def _labels(run: Run, cluster: Cluster, *, managed: bool) -> dict[str, str]:
    """Of the Job and of its pods. Keys of requests have no prefix, so none of ours is theirs to set."""
    return {
        "app.kubernetes.io/name": "hone-trainer",
        "app.kubernetes.io/instance": run.job,  # not a release: trackers by label would prune running jobs
        "app.kubernetes.io/version": _label_value(__version__),
        names.LABEL_COMPONENT: names.COMPONENT_TRAINER,
        names.LABEL_PART_OF: names.PART_OF,
        names.LABEL_MANAGED_BY: names.MANAGED_BY_HONE if managed else names.MANAGED_BY_KUBECTL,
        names.LABEL_JOB: run.job,
        names.LABEL_ATTEMPT: str(run.attempt),
        names.LABEL_METHOD: run.spec.method.name,
        **run.spec.labels,
        **cluster.labels,
    }


def _label_value(text: str) -> str:
    """A version may hold `+`, a label may not."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:63].strip("._-")


def _queue_labels(run: Run) -> dict[str, str]:
    """Kueue suspends a Job that has them, and starts it when its turn has come. On the Job only: on pods they would
    mean that each pod queues for itself."""
    scheduling = run.spec.scheduling
    if not scheduling.queue:
        return {}
    labels = {names.LABEL_QUEUE: scheduling.queue}
    if scheduling.priority:
        labels[names.LABEL_QUEUE_PRIORITY] = scheduling.priority
    if scheduling.deadline:
        labels[names.LABEL_QUEUE_MAX_SECONDS] = str(scheduling.deadline)
    return labels


def _ending(run: Run, plan: Plan, cluster: Cluster, *, managed: bool) -> dict[str, Any]:
    """How often a pod is started again, and how long the Job stays.

    A managed Job waits for the service, which deletes it when status and logs are stored. The pods of a gang are never
    replaced one by one: the others hold the state of a world that is gone.
    """
    replaced = {"podReplacementPolicy": "Failed"}  # a second pod of a rank starts only when the first has ended
    if managed:
        return {"backoffLimit": 0, **replaced}
    stay = {"ttlSecondsAfterFinished": cluster.ttl_seconds_after_finished}
    if plan.launch.nodes > 1:
        return {"backoffLimit": 0, **replaced, **stay}
    limit = {"backoffLimit": run.spec.scheduling.max_attempts - 1}
    return {**limit, "podFailurePolicy": _pod_failure_policy(), **replaced, **stay}


def _pod_failure_policy() -> dict[str, Any]:
    """A disruption costs no attempt; what would end the same way again ends the Job; the rest is counted."""
    hopeless = [int(code) for code in TrainerExit if code != TrainerExit.SUCCEEDED and not _may_help(code)]
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {
                "action": "FailJob",
                "onExitCodes": {"containerName": names.CONTAINER, "operator": "In", "values": hopeless},
            },
        ]
    }


def _may_help(code: TrainerExit) -> bool:
    return is_retried(Failure(failure_class=FAILURE_CLASSES[code], message="", exit_code=code))


def _nodes(plan: Plan) -> dict[str, Any]:
    nodes = plan.launch.nodes
    return {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes} if nodes > 1 else {}


def _check_name(name: str, nodes: int) -> None:
    longest = len(f"{name}-{nodes - 1}") if nodes > 1 else len(name)
    if longest > MAX_HOST_NAME:
        message = f"{name!r} is too long: with the number of a node it must fit {MAX_HOST_NAME} characters."
        raise InvalidRequest([Violation(path="name", value=name, message=message)])


def _check_size(run: Run, text: str) -> None:
    size = len(text.encode())
    if size <= names.MAX_SPEC_BYTES:
        return
    path, longest = max(_texts(run.spec.to_mapping()), key=lambda item: len(item[1].encode()))
    message = (
        f"the request has {size:,} bytes as YAML, an annotation takes {names.MAX_SPEC_BYTES:,}, and this text alone "
        f"has {len(longest.encode()):,}: shorten it, or put it into the files of the model or the data set."
    )
    raise InvalidRequest([Violation(path=path, message=message)])


def _texts(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [text for name, inner in value.items() for text in _texts(inner, f"{path}.{name}".lstrip("."))]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner, path)]
    return [(path, value)] if isinstance(value, str) else []
