"""Whether a Job of the right name is ours: by its nonce, and by what cannot be changed once it is made."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hone.backends.kubernetes.lookalike import first_difference, is_of
from hone.cluster import Cluster
from hone.job import Plan
from hone.machine import plan_here
from hone.manifests import render_job
from hone.run import Run
from hone.spec import JobSpec

CLUSTER = Cluster.model_validate(
    {"image": "registry.example.com/hone-trainer:1", "store": {"uri": "s3://bucket", "secret_name": "store"}}
)


@pytest.fixture
def made(make_spec: Callable[..., JobSpec]) -> tuple[Run, Plan]:
    planned = plan_here(make_spec(compute={"gpus_per_node": 0, "nodes": 2}), CLUSTER.hardware())
    run = Run(
        namespace="team-a",
        job="sft-1",
        attempt=2,
        nonce="5e1f",
        spec=planned.spec,
        launch=planned.plan.launch,
        store="s3://bucket",
        inputs={},
    )
    return run, planned.plan


def as_served(body: dict[str, Any]) -> dict[str, Any]:
    """What an API server and a platform's webhooks make of it."""
    found = copy.deepcopy(body)
    found["metadata"] |= {"uid": "u", "resourceVersion": "7", "creationTimestamp": "2026-11-24T12:00:00Z"}
    found["spec"] |= {"suspend": True, "selector": {"matchLabels": {}}, "manualSelector": False}
    pod = found["spec"]["template"]["spec"]
    pod |= {"dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler", "tolerations": [{"key": "x"}]}
    pod["containers"][0]["env"].append({"name": "ADDED", "value": "by a webhook"})
    pod["containers"].insert(0, {"name": "sidecar", "image": "s"})
    return found


def test_what_a_server_and_a_platform_add_makes_no_difference(made: tuple[Run, Plan]) -> None:
    run, plan = made
    body = render_job(run, plan, CLUSTER, managed=True)
    found = as_served(body)
    assert first_difference(body, found) == "" and is_of(run, found)
    found["spec"]["template"]["spec"]["containers"][1]["image"] = "registry.example.com/hone-trainer@sha256:" + "0" * 64
    assert first_difference(body, found) == ""


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda spec: spec.update(backoffLimit=3), "spec.backoffLimit"),
        (lambda spec: spec.update(completions=4), "spec.completions"),
        (lambda spec: spec.pop("completionMode"), "spec.completionMode"),
        (lambda spec: _pod(spec).update(serviceAccountName="admin"), "spec.template.spec.serviceAccountName"),
        (lambda spec: _pod(spec).update(restartPolicy="OnFailure"), "spec.template.spec.restartPolicy"),
        (lambda spec: _container(spec).update(name="other"), "spec.template.spec.containers[trainer]"),
        (lambda spec: _container(spec).update(command=["sh"]), "spec.template.spec.containers[trainer].command"),
        (lambda spec: _container(spec).update(args=["x"]), "spec.template.spec.containers[trainer].args"),
        (lambda spec: _container(spec).update(image="evil"), "spec.template.spec.containers[trainer].image"),
        (
            lambda spec: _variable(spec, "HONE_SPEC_FILE").update(value="/tmp/x"),
            "spec.template.spec.containers[trainer].env[HONE_SPEC_FILE]",
        ),
        (
            lambda spec: _variable(spec, "AWS_ACCESS_KEY_ID")["valueFrom"]["secretKeyRef"].update(name="other"),
            "spec.template.spec.containers[trainer].env[AWS_ACCESS_KEY_ID]",
        ),
        (
            lambda spec: spec["template"]["metadata"]["annotations"].update({"hone.dev/spec": "nonce: 5e1f"}),
            "spec.template.metadata.annotations[hone.dev/spec]",
        ),
    ],
)
def test_what_somebody_else_made_differs_somewhere(
    made: tuple[Run, Plan], change: Callable[[dict[str, Any]], Any], path: str
) -> None:
    run, plan = made
    body = render_job(run, plan, CLUSTER, managed=True)
    found = as_served(body)
    change(found["spec"])
    assert first_difference(body, found) == path


def test_another_nonce_is_another_job_whatever_the_annotations_of_the_job_itself_say(made: tuple[Run, Plan]) -> None:
    run, plan = made
    found = as_served(render_job(run, plan, CLUSTER, managed=True))
    text = found["spec"]["template"]["metadata"]["annotations"]["hone.dev/spec"]
    found["metadata"]["annotations"]["hone.dev/spec"] = text
    found["spec"]["template"]["metadata"]["annotations"]["hone.dev/spec"] = text.replace("5e1f", "0000")
    assert not is_of(run, found)


@pytest.mark.parametrize("nonce", ["0", "123456", "1e10", "0x1f", "true", "deadbeef"])
def test_a_nonce_is_read_as_it_was_written(made: tuple[Run, Plan], nonce: str) -> None:
    run, plan = made
    run = replace(run, nonce=nonce)
    assert is_of(run, as_served(render_job(run, plan, CLUSTER, managed=True)))


def _pod(spec: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = spec["template"]["spec"]
    return pod


def _container(spec: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = _pod(spec)["containers"][1]
    return container


def _variable(spec: dict[str, Any], name: str) -> dict[str, Any]:
    return next(variable for variable in _container(spec)["env"] if variable["name"] == name)
