"""docs/failures.md lists what the backend says, in its words."""

import re
from pathlib import Path
from typing import Any

import pytest

from hone.backends.kubernetes.observe import Limits

from .test_kubernetes_observe import job, look, pod, runs, unplaced, waits, warning, workload

PAGE = (Path(__file__).parents[2] / "docs/failures.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \|", PAGE.partition("## Failed")[0], flags=re.MULTILINE)
BY_ENSURE = ("Its Job is not admitted", "Namespace …", "… has no right", "Pod … of a deleted Job")
"""Said while a Job is made; tests/cluster/test_backend.py shows them."""

NODES = "0/2 nodes are available: 2"
SITUATIONS: list[dict[str, Any]] = [
    {"pods": [unplaced(f"{NODES} Insufficient nvidia.com/gpu.")]},
    {"pods": [unplaced(f"{NODES} Insufficient cpu, memory.")]},
    {"pods": [unplaced(f"{NODES} Insufficient ephemeral-storage.")]},
    {"pods": [unplaced(f"{NODES} node(s) didn't match Pod's node affinity/selector.")]},
    {"pods": [unplaced(f"{NODES} node(s) had untolerated taint {{a: b}}.")]},
    {"pods": [unplaced(f"{NODES} node(s) were unschedulable.")]},
    {"pods": [unplaced("pod has unbound immediate PersistentVolumeClaims")]},
    {"pods": [unplaced('persistentvolumeclaim "x" not found')]},
    {"pods": [pod(state=runs(), phase="Running"), unplaced("none", 1)], "job": job(nodes=2)},
    {"pods": [pod(node="", conditions=[])]},
    *(
        {"warnings": warning("job-uid", "FailedCreate", f'Error creating: pods "x" is forbidden: {why}')}
        for why in (
            "exceeded quota: q",
            'violates PodSecurity "restricted"',
            'admission webhook "x" denied the request',
            "ValidatingAdmissionPolicy 'x' denied request",
            'serviceaccount "hone-trainer" not found',
            "no PriorityClass with name x was found",
            'RuntimeClass "x" not found',
        )
    ),
    {"pods": [pod(state=waits("ErrImagePull", "not found"))]},
    {"pods": [pod(state=waits("CreateContainerConfigError", 'secret "x" not found'))]},
    {"pods": [pod(state=waits("CreateContainerConfigError", "couldn't find key x in Secret y"))]},
    {"pods": [pod(state=waits("CreateContainerError", "no"))]},
    {"pods": [pod(state=waits("ContainerCreating"))], "warnings": warning("pod-0", "FailedMount", "no")},
    {"pods": [pod(state=waits("ContainerCreating"))], "warnings": warning("pod-0", "FailedCreatePodSandBox", "no")},
    {"pods": [pod(state=waits("ContainerCreating"))]},
    {"job": job(suspend=True, queue="q"), "workload": workload(), "has_kueue": True},
    {"job": job(suspend=True, queue="q"), "has_kueue": True},
    {"job": job(suspend=True, queue="q")},
    {"job": job(suspend=True)},
]


def pattern(part: str) -> str:
    """A reason as the page writes it: … is anything, and so are N and M."""
    text = (
        re.escape(part.strip()).replace(r"…\ ", ".*").replace("…", ".*").replace(r"N\ of\ its\ M", r"\d+\ of\ its\ \d+")
    )
    return text + ".*"


def reasons() -> list[str]:
    found = []
    for situation in SITUATIONS:
        facts = {**situation}
        found.append(look(facts.pop("job", job()), *facts.pop("pods", ()), **facts).seen.reason)
    return found


@pytest.mark.parametrize("row", [row for row in ROWS[2:] if not row.startswith(BY_ENSURE)])
def test_every_row_is_said_by_the_backend(row: str) -> None:
    assert any(re.fullmatch(pattern(row), reason) for reason in reasons())


@pytest.mark.parametrize("reason", reasons())
def test_everything_that_is_said_stands_on_the_page(reason: str) -> None:
    assert any(re.fullmatch(pattern(row), reason) for row in ROWS[2:])


def test_the_page_states_the_deadlines_that_hold() -> None:
    limits = Limits()
    assert f"after {limits.start_s / 60:.0f} minutes" in PAGE
    assert f"after {limits.gang_s / 120:.0f} to {limits.gang_s / 40:.0f} minutes" in PAGE
