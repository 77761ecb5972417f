"""SIGKILL of the service at every named point of create, observe, report, finish and delete, on a real cluster.

No acknowledged job is lost, none is run twice, no event is missing or doubled, nothing is stuck for more than ten
seconds after the restart. Each case has a `hone serve` of its own, killed once at its point; callers come by gRPC and
ask again. How often something ran is asked of others than the service: the events of the Job controller, and the log.

CI has every point once. `make soak` draws scenarios and points for SOAK_MINUTES, by SOAK_SEED, and prints its counts.
"""

import os
import queue
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from hone.backends.kubernetes.objects import ANNOTATION_ENDING
from hone.errors import NotFound
from hone.job import Event, EventType, Job, State
from hone.machine import plan_here
from hone.manifests import applied_run, render_job
from hone.spec import JobSpec
from hone.spec.parse import parse
from hone.storage import ArtifactStore, Credentials, JobLayout, open_store, verify_directory

from .harness.access import Cluster
from .harness.api import wait_until
from .harness.places import HOST_ADDRESS
from .installation import make_certificate
from .killed_service import KilledService, Outages, Tenant

STUCK_S = 10.0
"""So long after the restart, at most, until the next thing happens."""
RUN_S = 120.0
"""So long a pod may take here, with all that runs beside it."""
SLOTS = 4
"""Cases at once, each in a namespace of its own."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What a caller does, and how it ends."""

    labels: dict[str, str]
    """For the trainer that stand_in.py plays."""
    ends: State
    steps: int | None = None
    """Steps that the trainer tells of; None: as many as it came to."""
    attempts: int = 1
    deletes: bool = False


SCENARIOS = {
    "finish": Scenario(labels={"steps": "4", "uploads": "yes"}, ends=State.SUCCEEDED, steps=4),
    "fail": Scenario(labels={"steps": "2", "ending": "11"}, ends=State.FAILED, steps=2),
    "retry": Scenario(labels={"steps": "2", "ending": "15"}, ends=State.FAILED, steps=2, attempts=2),
    "cancel": Scenario(labels={"steps": "3000", "pause_ms": "20"}, ends=State.CANCELLED),
    "report": Scenario(
        labels={"steps": "20", "pause_ms": "150", "reports": "yes", "uploads": "yes"}, ends=State.SUCCEEDED, steps=20
    ),
    "delete": Scenario(labels={"steps": "1", "uploads": "yes"}, ends=State.SUCCEEDED, steps=1, deletes=True),
    "foreign": Scenario(labels={"steps": "10", "pause_ms": "200", "uploads": "yes"}, ends=State.SUCCEEDED),
}
POINTS = [
    ("finish", "create-before-commit"),
    ("finish", "create-after-commit"),
    ("finish", "change-before-commit:1"),
    ("finish", "change-after-commit:1"),
    ("finish", "attempt-recorded"),
    ("finish", "observed:1"),
    ("finish", "job-create"),
    ("finish", "job-created"),
    ("finish", "change-before-commit:2"),
    ("finish", "change-after-commit:2"),
    ("finish", "observed:2"),
    ("finish", "change-before-commit:3"),
    ("finish", "change-after-commit:3"),
    ("finish", "change-before-commit:4"),
    ("finish", "events-stored"),
    ("finish", "logs-read"),
    ("finish", "outputs-read-back"),
    ("finish", "finished"),
    ("finish", "job-delete"),
    ("finish", "job-deleted"),
    ("finish", "attempt-let-go"),
    ("report", "report-stored:1"),
    ("report", "report-stored:2"),
    ("report", "change-before-commit:5"),
    ("report", "finished"),
    ("fail", "logs-read"),
    ("fail", "attempt-ended"),
    ("fail", "job-deleted"),
    ("retry", "attempt-ended:1"),
    ("retry", "job-delete:1"),
    ("retry", "attempt-recorded:2"),
    ("retry", "job-created:2"),
    ("cancel", "log-rescued"),
    ("cancel", "job-end"),
    ("cancel", "job-ended"),
    ("cancel", "stop-asked:1"),
    ("cancel", "stop-asked:2"),
    ("cancel", "logs-read"),
    ("delete", "runs-removed"),
    ("delete", "artifacts-deleted"),
    ("delete", "bury-before-commit"),
    ("delete", "bury-after-commit"),
    ("foreign", "create-before-commit"),
    ("foreign", "create-after-commit"),
    ("foreign", "change-before-commit:1"),
    ("foreign", "change-after-commit:1"),
    ("foreign", "change-after-commit:2"),
]
"""Commits are numbered in the order in which one job has them; how many there are after the first few varies."""
_numbers = count(1)


@dataclass(kw_only=True)
class Field:
    """Where cases are played: tenants, each for one case at a time."""

    directory: Path
    artifacts: ArtifactStore
    outages: Outages
    tenants: "queue.Queue[Tenant]" = field(default_factory=queue.Queue)

    def play(self, scenario: str, point: str) -> bool:
        """One case; whether its point was reached. Raises what was wrong, with the service's log."""
        tenant = self.tenants.get()
        try:
            with KilledService(tenant, self.directory, crash_at=point) as service:
                try:
                    Case(self, tenant, service, SCENARIOS[scenario], is_foreign=scenario == "foreign").play()
                except BaseException as error:
                    error.add_note(f"{scenario} {point}, {service.home}: {service.log[-6000:]}")
                    raise
                return service.is_killed
        finally:
            tenant.cluster.kubectl("delete", "jobs", "--all", namespace=tenant.namespace)
            self.tenants.put(tenant)


class Case:
    """One job, from its submission to its end, whenever the service is killed meanwhile."""

    def __init__(
        self, place: Field, tenant: Tenant, service: KilledService, scenario: Scenario, *, is_foreign: bool
    ) -> None:
        self.place, self.tenant, self.service, self.scenario = place, tenant, service, scenario
        self.is_foreign = is_foreign
        self.printed = 0
        """Steps that its trainer told of before it was cancelled."""
        self.kubectl = tenant.cluster.kubectl

    def play(self) -> None:
        """Do what the caller does, look at everything on the way, and at what is left."""
        job_id = self.apply() if self.is_foreign else self.submit()
        self.promptly("nothing is made of it", lambda: self.get(job_id).state != State.PENDING)
        if self.scenario.ends == State.CANCELLED:
            self.cancel(job_id)
        job = self.to_the_end(job_id)
        if not self.is_foreign:
            self.promptly("its Jobs stay", lambda: not self.jobs_there())
        if self.scenario.deletes:
            self.delete(job_id)
            self.promptly("it is not deleted", lambda: self.is_gone(job_id))
        self.wait_for_the_kill()
        if self.scenario.deletes:
            self.assert_nothing_is_left(job)
        else:
            self.assert_told_once(self.get(job_id))
        self.assert_ran_once(job)

    def submit(self) -> str:
        spec = _spec(f"job-{next(_numbers)}", self.scenario)
        job = self.service.ask(lambda client: client.submit(spec, request_id="the one request"))
        again = self.service.ask(lambda client: client.submit(spec, request_id="the one request"))
        assert again.id == job.id
        return job.id

    def apply(self) -> str:
        """As `hone render | kubectl apply` does; the service sees it begin."""
        self.service.wait_until_ready()
        platform = self.tenant.platform
        planned = plan_here(_spec(f"applied-{next(_numbers)}", self.scenario), platform.hardware())
        run = applied_run(planned, platform, namespace=self.tenant.namespace)
        self.kubectl.apply(render_job(run, planned.plan, platform, managed=False), namespace=run.namespace)
        self.promptly("it is not shown", lambda: not self.is_gone(run.job))
        return run.job

    def cancel(self, job_id: str) -> None:
        """While it trains; what it said until then must not be lost."""
        self.printed = wait_until("it trains", lambda: self.pod_log().count("[rank 0] step "), timeout_s=RUN_S)
        self.service.ask(lambda client: client.cancel(job_id))

    def delete(self, job_id: str) -> None:
        """Killed before it could answer, it may have done what was asked by the time it is asked again."""
        try:
            self.service.ask(lambda client: client.delete(job_id, artifacts=True))
        except NotFound:
            assert self.service.is_killed

    def to_the_end(self, job_id: str) -> Job:
        """Its last state, which came soon after its pod's end."""
        deadline = time.monotonic() + RUN_S
        while not (job := self.get(job_id)).state.is_terminal:
            assert time.monotonic() < deadline, f"still {job.state}: {job.state_reason}"
            time.sleep(0.1)
        assert job.end_time and job.attempts[-1].end_time
        self.service.wait_until_ready()
        since = max(job.attempts[-1].end_time.timestamp(), self.service.ready_at, self.place.outages.last)
        assert job.end_time.timestamp() - since < STUCK_S
        return job

    def promptly(self, what: str, look: Callable[[], bool]) -> None:
        """Within the time that is allowed after a restart, or after an outage of the API server."""
        began = time.time()
        while not look():
            self.service.look_after()
            since = max(began, self.service.ready_at, self.place.outages.last)
            assert not self.service.ready_at or time.time() - since < STUCK_S, f"{what}: not within {STUCK_S:.0f} s"
            time.sleep(0.1)

    def wait_for_the_kill(self) -> None:
        """Some points come after everything that a caller sees; then it is up again."""
        deadline = time.monotonic() + 5
        while not self.service.is_killed and time.monotonic() < deadline:
            self.service.look_after()
            time.sleep(0.1)
        self.service.ask(lambda client: list(client.list()))

    def get(self, job_id: str) -> Job:
        return self.service.ask(lambda client: client.get(job_id))

    def is_gone(self, job_id: str) -> bool:
        try:
            self.get(job_id)
        except NotFound:
            return True
        return False

    def jobs_there(self) -> list[dict[str, Any]]:
        return self.kubectl.items("jobs", namespace=self.tenant.namespace)

    def pod_log(self) -> str:
        words = ("logs", "--tail=-1", "-l", "app.kubernetes.io/part-of")
        return self.kubectl(*words, namespace=self.tenant.namespace)

    def assert_told_once(self, job: Job) -> None:
        """One job; its record holds every line of its trainers', once and in order, and every state once."""
        (listed,) = self.service.ask(lambda client: list(client.list()))
        assert (listed.id, job.state, job.observed) == (job.id, self.scenario.ends, self.is_foreign), job.state_reason
        assert len(job.attempts) == self.scenario.attempts
        events = self.service.ask(lambda client: list(client.events()))
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert {event.job for event in events} == {job.id}
        told = [(event.fields["state"], event.message) for event in events if event.type == EventType.STATE]
        assert all(first != second for first, second in pairwise(told))
        entered = Counter(state for state, _ in groupby(state for state, _ in told))
        assert told[-1][0] == job.state and entered[job.state] == 1
        assert max(entered.values()) <= len(job.attempts), told
        failures = [event.attempt for event in events if event.type == EventType.FAILURE]
        assert failures == ([n + 1 for n in range(len(job.attempts))] if job.state == State.FAILED else [])
        for attempt in job.attempts:
            self.assert_log_kept(job, attempt.number)
            if not self.is_foreign:
                self.assert_attempt_told([event for event in events if event.attempt == attempt.number])
        if job.state == State.SUCCEEDED:
            (output,) = job.outputs
            layout = JobLayout(job.namespace, job.id)
            verify_directory(self.place.artifacts, layout.adapter, digest=output.sha256)

    def assert_attempt_told(self, events: Sequence[Event]) -> None:
        told = [event.message for event in events if event.type not in (EventType.STATE, EventType.FAILURE)]
        steps = len([event for event in events if event.type == EventType.PROGRESS])
        assert steps == self.scenario.steps if self.scenario.steps else steps >= self.printed
        uploads = ["adapter is complete"] if "uploads" in self.scenario.labels else []
        assert told == ["training", *(f"step {n + 1}" for n in range(steps)), *uploads]

    def assert_log_kept(self, job: Job, attempt: int) -> None:
        log = self.service.ask(lambda client: "".join(client.logs(job.id, attempt=attempt)))
        assert log.count("the trainer starts\n") == 1 and log.count("step 1 of rank 0\n") == 1

    def assert_ran_once(self, job: Job) -> None:
        """One Job for each attempt, one pod for each Job, as the Job controller tells; a foreign one is untouched."""
        for attempt in job.attempts:
            name = job.id if self.is_foreign else f"{job.id}-a{attempt.number}"
            made = f"involvedObject.kind=Job,involvedObject.name={name},reason=SuccessfulCreate"
            events = self.kubectl.items("events", f"--field-selector={made}", namespace=job.namespace)
            assert [event["count"] for event in events] == [1], events
        left = self.jobs_there()
        if self.is_foreign:
            assert [(mine["metadata"]["name"], mine["metadata"]["uid"]) for mine in left] == [(job.id, job.uid)]
            assert ANNOTATION_ENDING not in left[0]["metadata"]["annotations"]
        else:
            assert left == []

    def assert_nothing_is_left(self, job: Job) -> None:
        """The record, its logs and its artefacts; one event says so."""
        assert self.service.ask(lambda client: list(client.list())) == []
        events = self.service.ask(lambda client: list(client.events()))
        assert [event.fields.get("deleted") for event in events] == ["true"]
        assert list(self.place.artifacts.list_objects(JobLayout(job.namespace, job.id).root)) == []


def _spec(name: str, scenario: Scenario) -> JobSpec:
    return parse(
        {
            "name": name,
            "model": {"source": "hf://HuggingFaceTB/SmolLM2-135M"},
            "dataset": {"source": "hf://organisation/rows"},
            "method": {"sft": {"max_length": 64}},
            "adapter": {"lora": {}},
            "training": {"micro_batch_size": 1},
            "compute": {"gpus_per_node": 0, "processes_per_node": 1},
            "scheduling": {"max_attempts": scenario.attempts},
            "labels": scenario.labels,
        }
    )


@pytest.fixture(scope="module")
def ground(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Furnished namespaces, and a bucket for all of them."""
    directory = tmp_path_factory.mktemp("kills")
    make_certificate(directory, [f"IP:{HOST_ADDRESS}"])
    code = secrets.token_hex(3)
    s3 = cluster.s3
    s3.make_bucket(f"kills-{code}")
    credentials = Credentials(access_key=s3.access_key, secret_key=s3.secret_key)
    artifacts = open_store(f"s3://kills-{code}/hone", endpoint=s3.endpoint, region="us-east-1", credentials=credentials)
    with ExitStack() as stack:
        stack.callback(artifacts.close)
        made = Field(directory=directory, artifacts=artifacts, outages=stack.enter_context(closing(Outages())))
        for number in range(SLOTS):
            namespace = stack.enter_context(cluster.new_namespace(f"kills-{code}-{number}"))
            tenant = Tenant(cluster=cluster, namespace=namespace, bucket=f"kills-{code}", certificates=directory)
            tenant.furnish()
            made.tenants.put(tenant)
        yield made


@pytest.fixture(scope="module")
def played(ground: Field, request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], "Future[bool]"]]:
    """Every case that was asked for; several are under way at once."""
    asked: list[Any] = [item for item in request.session.items if getattr(item, "originalname", "") == _TEST]
    with ThreadPoolExecutor(SLOTS) as pool:
        cases = [(item.callspec.params["scenario"], item.callspec.params["point"]) for item in asked]
        yield {case: pool.submit(ground.play, *case) for case in cases}
        pool.shutdown(cancel_futures=True)


_TEST = "test_a_service_killed_anywhere_is_taken_up_where_it_was"


@pytest.mark.parametrize(("scenario", "point"), POINTS, ids=[f"{scenario}-{point}" for scenario, point in POINTS])
def test_a_service_killed_anywhere_is_taken_up_where_it_was(
    played: dict[tuple[str, str], "Future[bool]"], scenario: str, point: str
) -> None:
    assert played[(scenario, point)].result(), "the point was never reached"


@pytest.mark.skipif("SOAK_MINUTES" not in os.environ, reason="`make soak` runs it")
@pytest.mark.timeout(0)
def test_a_service_killed_at_random_is_taken_up_where_it_was(ground: Field, capfd: pytest.CaptureFixture[str]) -> None:
    minutes, seed = float(os.environ["SOAK_MINUTES"]), int(os.environ.get("SOAK_SEED") or secrets.randbelow(10**6))
    deadline = time.monotonic() + minutes * 60
    choice, counts, failures = random.Random(seed), Counter[str](), list[BaseException]()
    names = sorted({(scenario, point.partition(":")[0]) for scenario, point in POINTS})

    def draw(scenario: str, point: str) -> None:
        if time.monotonic() > deadline or failures:
            return
        try:
            counts["killed" if ground.play(scenario, point) else "not reached"] += 1
        except BaseException as error:
            failures.append(error)

    with ThreadPoolExecutor(SLOTS) as pool:
        while time.monotonic() < deadline and not failures:
            batch = [(*choice.choice(names), choice.choice((1, 1, 1, 2, 3, 5))) for _ in range(SLOTS)]
            list(pool.map(lambda case: draw(case[0], f"{case[1]}:{case[2]}"), batch))
    with capfd.disabled():
        sys.stdout.write(f"\nSOAK_SEED={seed}, {minutes:g} minutes: {dict(counts)}, {len(failures)} failed\n")
    if failures:
        raise failures[0]
