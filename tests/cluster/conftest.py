"""The cluster that tests here share. They run one after the other: some stop what all of them need."""

import os
import secrets
import subprocess
from collections.abc import Generator, Iterator

import pytest

from .harness import access
from .harness.access import Cluster, Database
from .harness.failure import CannotStart

_failed = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of this directory on one worker."""
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember a failure for the fixtures that end after it."""
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster of KUBECONFIG, or the one of `make cluster`; without either the test is skipped."""
    try:
        found = access.find()
    except CannotStart as error:
        pytest.skip(str(error))
    if found is None:
        pytest.skip("there is no cluster: `make cluster` makes one, or set KUBECONFIG")
    return found


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace under enforce=restricted; after a failure, what was in it is printed."""
    with cluster.new_namespace(f"test-{secrets.token_hex(4)}") as name:
        yield name
        if request.node.stash.get(_failed, False):
            describe(cluster, name)


@pytest.fixture
def database(cluster: Cluster) -> Iterator[Database]:
    """A fresh PostgreSQL database beside the cluster."""
    with cluster.new_database(f"test_{secrets.token_hex(4)}") as fresh:
        yield fresh


def describe(cluster: Cluster, namespace: str) -> None:
    """Pods, events and the last lines of every pod, into the report of the test that failed."""
    command = [cluster.kubectl.program, f"--kubeconfig={cluster.kubeconfig}", "-n", namespace]
    for words in (["get", "jobs,pods", "-o", "wide"], ["get", "events", "--sort-by=.lastTimestamp"]):
        subprocess.run([*command, *words], check=False)
    for pod in cluster.kubectl.items("pods", namespace=namespace):
        subprocess.run([*command, "logs", pod["metadata"]["name"], "--all-containers", "--tail=30"], check=False)
