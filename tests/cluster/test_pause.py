"""A pause on a real cluster: nothing of the job stays, and the next attempt is another Job with what was saved."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hone.backends.kubernetes.client import Api
from hone.job import Job, State
from hone.jobs import Jobs
from hone.machine import plan_here
from hone.manifests.names import ANNOTATION_SPEC
from hone.reconcile import Reconciler
from hone.spec import JobSpec
from hone.spec.sources import sources, with_sources
from hone.storage import open_store
from hone.store import Store

from .fault_proxy import FaultProxy
from .test_backend import MIB, House, house, proxy, wait_for

__all__ = ["house", "proxy"]


@pytest.fixture
def jobs(house: House, proxy: FaultProxy, tmp_path: Path) -> Iterator[Jobs]:
    """The use cases and a reconciler over the Kubernetes backend."""
    store = Store(f"sqlite:///{tmp_path / 'hone.db'}")
    artifacts = open_store((tmp_path / "artifacts").as_uri())
    backend = house.backend(api=Api(proxy.configuration))
    planned = plan_here(house.make_spec(compute={"gpus_per_node": 0}), house.platform().hardware())
    small = replace(planned.plan, host_memory_bytes=64 * MIB, disk_bytes=16 * MIB)
    reconciler = Reconciler(store, backend, artifacts, grace_s=5)
    reconciler.start()
    yield Jobs(store, backend, artifacts, planner=lambda spec: replace(planned, spec=spec, plan=small))
    reconciler.stop()
    store.close()


def test_a_paused_job_holds_nothing_and_its_next_attempt_is_another_job(
    house: House, proxy: FaultProxy, jobs: Jobs
) -> None:
    asked_to_end: set[str] = set()

    def log_is_gone(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        """The log of a pod whose Job was ended may go before anybody reads what the trainer said last."""
        if method == "PATCH" and "/jobs/" in path:
            asked_to_end.add(path.partition("?")[0].rpartition("/")[2])
        is_log = any(f"/pods/{job}-" in path for job in asked_to_end) and "/log?" in path
        return (404, {}) if is_log else None

    proxy.answer = log_is_gone
    job = jobs.create(house.namespace, in_a_bucket(house.make_spec(labels=LABELS)))
    wait_for(lambda: b"step 1 " in b"".join(jobs.logs(house.namespace, job.id)))
    assert jobs.pause(house.namespace, job.id).state == State.PAUSING
    job = wait_for(lambda: reached(jobs, job, State.PAUSED))
    (attempt,) = job.attempts
    assert (attempt.state, attempt.counted) == (State.CANCELLED, False)
    assert attempt.failure and attempt.failure.exit_code == 17
    assert asked_to_end == {f"{job.id}-a1"}
    assert job.state_reason == "It is paused, and goes on from step 7 when it is resumed."
    wait_for(lambda: not kept(house, "jobs") and not kept(house, "pods"))
    assert b"the trainer starts" in b"".join(jobs.logs(house.namespace, job.id))
    jobs.resume(house.namespace, job.id)
    job = wait_for(lambda: reached(jobs, job, State.RUNNING))
    (made,) = kept(house, "jobs")
    assert made["metadata"]["name"] == f"{job.id}-a2"
    run = yaml.safe_load(made["spec"]["template"]["metadata"]["annotations"][ANNOTATION_SPEC])
    (saved,) = jobs.checkpoints(house.namespace, job.id)
    assert run["resume"] == [{"step": 7, "place": saved.place, "sha256": saved.sha256}]
    jobs.cancel(house.namespace, job.id)
    wait_for(lambda: reached(jobs, job, State.CANCELLED))


LABELS = {"steps": "4000", "pause_ms": "50", "checkpoints": "yes"}


def in_a_bucket(spec: JobSpec) -> JobSpec:
    """The request with sources that a pod could read."""
    return with_sources(spec, {text: f"s3://bucket/{Path(text).name}" for _, text in sources(spec, scheme="file")})


def reached(jobs: Jobs, job: Job, state: State) -> Job | None:
    found = jobs.get(job.namespace, job.id)
    assert found.state == state or not found.state.is_terminal, found.state_reason
    return found if found.state == state else None


def kept(house: House, kind: str) -> list[dict[str, Any]]:
    return house.cluster.kubectl.items(kind, namespace=house.namespace)
