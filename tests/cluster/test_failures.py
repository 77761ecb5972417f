"""What can happen to a job on a cluster, through a whole installation with the real trainer: each ends in its class,
with a sentence that a stranger can act on, within its time.

The table is the one of docs/operations.md, "What happens to a job when …", which a test holds equal to CASES. Each case
brings its misfortune about and yields the job; what the job says is held against the table; then the case goes on.
Cases of one act run side by side; an act begins when the one before is over, because it takes away what that needs.
"""

import json
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import boto3
import pytest

from hone.job import FailureClass, Job, State

from .failing import START_S, Place, Ranks, administrator, matches
from .harness.access import S3, Cluster
from .harness.places import ROOT
from .inputs import upload_inputs
from .installation import Installation, install

PAGE = ROOT / "docs/operations.md"
SLOTS = 5
"""Cases at once; some of them only wait."""
GIVEN_UP_S = 20
"""What the platform here allows for a container that cannot be started (cluster.start_deadline_s)."""
PLATFORM = {
    "node_memory_bytes": "2Gi",
    "scratch_bytes": "256Mi",
    "cpus_per_process": 0.5,
    "gang_deadline_s": 600,
    "grace_period_s": 5,
    "start_deadline_s": GIVEN_UP_S,
}
OUTAGE_S = 30.0
AGAIN = "attempt 2"
FREE = "attempt 2; this one does not count"
ENDS = "it has failed"
RUNS = "it counts as running; after that step, or with the node back, attempt 2"
WAITS = "it waits"
WELL = "it succeeds"
API_AWAY = "[-] kubernetes: … The API server … cannot be reached"
NOT_ACCEPTED = "[-] kubernetes: … does not accept the service's credentials: … restart it"

Told = Iterator[str]
Bring = Callable[["Stage"], Told]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the page, and what brings it about."""

    name: str
    bring: Bring
    what: str
    says: str
    """The failure's message, or the reason of its state; … is anything."""
    failure: FailureClass | None
    then: str
    within_s: int
    act: int
    is_slow: bool

    def row(self) -> str:
        """As the page has it."""
        return f"| {self.what} | {self.failure or ''} | {self.says} | {self.then} | {self.within_s} s |"

    def is_told(self, job: Job) -> bool:
        """Whether the job says what the page promises."""
        if self.then in (WAITS, RUNS):
            states = {WAITS: (State.QUEUED, State.PENDING), RUNS: (State.RUNNING,)}[self.then]
            return job.state in states and matches(self.says, job.state_reason)
        if self.then == WELL:
            return job.state == State.SUCCEEDED and matches(self.says, job.state_reason)
        first = job.attempts[0] if job.attempts else None
        if first is None or first.failure is None:
            return False
        assert first.failure.failure_class == self.failure, first.failure
        assert matches(self.says, first.failure.message), first.failure
        assert first.failure.next_step, first.failure
        assert first.counted == (self.then != FREE), first
        return job.state == State.FAILED if self.then == ENDS else not job.state.is_terminal


CASES: list[Case] = []


def happens(
    what: str,
    *,
    says: str,
    then: str,
    within_s: int,
    failure: FailureClass | None = None,
    act: int = 1,
    slow: bool = False,
) -> Callable[[Bring], Bring]:
    """Make a row of a function."""

    def add(bring: Bring) -> Bring:
        name = bring.__name__.removeprefix("_").replace("_", "-")
        CASES.append(
            Case(
                name=name, bring=bring, what=what, says=says, failure=failure, then=then, within_s=within_s, act=act,
                is_slow=slow,
            )
        )  # fmt: skip
        return bring

    return add


@dataclass(kw_only=True)
class Stage:
    """Where cases are played."""

    main: Place
    no_secret: Place
    wrong_key: Place
    no_quota: Place
    no_image: Place
    """A tenant of another installation, which names an image that is not there."""
    bucket: str
    s3: S3
    elsewhere: Lock = field(default_factory=Lock)
    """Held by who uses that installation: one case takes its service away."""

    def play(self, case: Case) -> float:
        """One case; after how many seconds the page's sentence was told."""
        under_way = case.bring(self)
        job = next(under_way)
        began = time.monotonic()
        place = self.place_of(job)
        try:
            place.wait(job, case.says, lambda: case.is_told(place.client.get(job)), timeout_s=case.within_s)
            seconds = time.monotonic() - began
            assert next(under_way, None) is None
            return seconds
        except BaseException as error:
            error.add_note(f"{case.name}: {place.describe(job)}")
            raise
        finally:
            under_way.close()
            place.end(job)

    def place_of(self, job: str) -> Place:
        """By the job's name."""
        places = {"secret": self.no_secret, "key": self.wrong_key, "quota": self.no_quota, "image": self.no_image}
        return places.get(job.partition("-")[0], self.main)


# Misfortunes of a pod.


@happens(
    "a rank of it never comes", failure=FailureClass.INTERNAL,
    says="The launcher did not do what was planned: not all processes came within 60 s, the plan says 2 …", then=ENDS,
    within_s=180,
)  # fmt: skip
def _rank_missing(stage: Stage) -> Told:
    two = {"gpus_per_node": 0, "processes_per_node": 2}
    job = stage.main.submit("world", compute=two)
    stage.main.kill(stage.main.reach(job, "loading"), "worker", rank=1, number=signal.SIGSTOP)
    yield job


@happens(
    "a node of a gang fails", failure=FailureClass.INFRA, says="The worker of rank 1 was killed by SIGKILL.",
    then=AGAIN, within_s=30,
)  # fmt: skip
def _gang(stage: Stage) -> Told:
    job = stage.main.train("gang", compute={"gpus_per_node": 0, "processes_per_node": 1, "nodes": 2})
    stage.main.kill(stage.main.pod(job, index=1), "worker", rank=1)
    yield job
    assert not [pod for pod in stage.main.pods(job) if _is_of(pod, 1) and pod["status"]["phase"] == "Running"]
    stage.main.second_attempt_trains(job)


@happens(
    "its process needs more memory than its pod may use", failure=FailureClass.OOM,
    says="Pod … needed more memory than its limit, and the kernel killed it (OOMKilled).", then=ENDS, within_s=180,
)  # fmt: skip
def _out_of_memory(stage: Stage) -> Told:
    row = json.dumps({"prompt": "much ", "completion": "too much " * 700_000})  # the most that one row may hold
    body = f"{row}\n" * 7  # which are encoded together
    _store(stage).put_object(Bucket=stage.bucket, Key="inputs/huge/train.jsonl", Body=body.encode())
    yield stage.main.submit("memory", dataset={"source": f"s3://{stage.bucket}/inputs/huge"})


@happens(
    "its pod writes more to disk than it asked for", failure=FailureClass.INFRA, says="Node … put pod … out: …",
    then=AGAIN, within_s=180, slow=True,
)  # fmt: skip
def _disk_used_up(stage: Stage) -> Told:
    job = stage.main.train("disk", training={"max_steps": 1_000_000, "gradient_accumulation_steps": 64})
    full = stage.main.cluster.directory_of(stage.main.pod(job), "work") / "full"
    full.write_bytes(b"x" * (700 << 20))
    yield job


@happens(
    "its trainer is killed while it downloads", failure=FailureClass.INFRA,
    says="The trainer's supervisor was killed by SIGKILL.", then=AGAIN, within_s=30,
)  # fmt: skip
def _killed_in_download(stage: Stage) -> Told:
    job = stage.main.submit("download")
    stage.main.kill_in(job, "loading", "supervisor")
    yield job


@happens(
    "a worker is killed while it reads data", failure=FailureClass.INFRA,
    says="The worker of rank 0 was killed by SIGKILL.", then=AGAIN, within_s=30,
)  # fmt: skip
def _killed_in_data(stage: Stage) -> Told:
    job = stage.main.submit("data")
    stage.main.kill_in(job, "data", "worker")
    yield job


@happens(
    "its container's first process is killed while it trains", failure=FailureClass.INFRA,
    says="The trainer of pod … was killed from outside (SIGKILL).", then=AGAIN, within_s=30,
)  # fmt: skip
def _killed_in_training(stage: Stage) -> Told:
    job = stage.main.train("training")
    stage.main.kill_in(job, "training", "main")
    yield job


@happens(
    "a worker is killed while it saves", failure=FailureClass.INFRA,
    says="The worker of rank 0 was killed by SIGKILL.", then=AGAIN, within_s=30,
)  # fmt: skip
def _killed_in_saving(stage: Stage) -> Told:
    job = stage.main.submit("saving")
    stage.main.kill_in(job, "saving", "worker")
    yield job


@happens(
    "its trainer is killed while it uploads", failure=FailureClass.INFRA,
    says="The trainer's supervisor was killed by SIGKILL.", then=AGAIN, within_s=30,
)  # fmt: skip
def _killed_in_uploading(stage: Stage) -> Told:
    job = stage.main.submit("uploading")
    stage.main.kill_in(job, "uploading", "supervisor")
    yield job
    assert stage.main.client.wait(job, timeout_s=START_S).state == State.SUCCEEDED


@happens(
    "somebody deletes its pod", failure=FailureClass.PREEMPTED, says="Pod … on node … was deleted by somebody.",
    then=FREE, within_s=30,
)  # fmt: skip
def _pod_deleted(stage: Stage) -> Told:
    job = stage.main.train("pod")
    stage.main.kubectl("delete", "pod", _name(stage.main.pod(job)), "--wait=false")
    yield job


@happens(
    "somebody deletes its Job", failure=FailureClass.PREEMPTED, says="Job … was deleted by somebody.", then=FREE,
    within_s=30,
)  # fmt: skip
def _job_deleted(stage: Stage) -> Told:
    job = stage.main.train("job")
    stage.main.kubectl("delete", "job", f"{job}-a1", "--wait=false")
    yield job


@happens(
    "its pod is evicted", failure=FailureClass.PREEMPTED,
    says="Pod … on node … was evicted: its node was drained, or somebody asked for it. …", then=FREE, within_s=30,
)  # fmt: skip
def _evicted(stage: Stage) -> Told:
    job = stage.main.train("evicted")
    stage.main.evict(stage.main.pod(job))
    yield job


@happens(
    "its data set is empty", failure=FailureClass.DATA, says="The data set s3://… is empty: it holds no row.",
    then=ENDS, within_s=180,
)  # fmt: skip
def _no_rows(stage: Stage) -> Told:
    _store(stage).put_object(Bucket=stage.bucket, Key="inputs/empty/train.jsonl", Body=b"")
    yield stage.main.submit("empty", dataset={"source": f"s3://{stage.bucket}/inputs/empty"})


# What keeps it from starting.


@happens(
    "no node has the GPU that it names", says="No node takes it: … node affinity/selector… compute.gpu", then=WAITS,
    within_s=15,
)  # fmt: skip
def _unschedulable(stage: Stage) -> Told:
    yield stage.main.submit("gpu", compute={"gpu": "A100-80GB", "gpus_per_node": 1})


@happens(
    "the namespace's ResourceQuota is used up", says="Its pods are not admitted: … exceeded quota: … raised.",
    then=WAITS, within_s=15,
)  # fmt: skip
def _quota(stage: Stage) -> Told:
    yield stage.no_quota.submit("quota")


@happens(
    "its image is not there", says="Its image cannot be pulled on node … Load the image onto the node, …", then=WAITS,
    within_s=15,
)  # fmt: skip
def _image_missing(stage: Stage) -> Told:
    with stage.elsewhere:
        job = stage.no_image.submit("image")
        yield job
        _gives_up(stage.no_image, job)


@happens(
    "the Secret with the store's key is not there",
    says='Its container cannot be made on node …: secret "hone-store" not found. Create that Secret …', then=WAITS,
    within_s=15,
)  # fmt: skip
def _secret_missing(stage: Stage) -> Told:
    job = stage.no_secret.submit("secret")
    yield job
    _gives_up(stage.no_secret, job)


@happens(
    "the store does not accept the tenant's key", failure=FailureClass.INFRA,
    says="s3://…: the secret key is not the one of access key …", then=ENDS, within_s=180,
)  # fmt: skip
def _key_wrong(stage: Stage) -> Told:
    yield stage.wrong_key.submit("key")


# The service loses its right to ask.


@happens(
    "the service's token is revoked",
    says="It cannot be seen to at the moment, … The API server does not accept the service's credentials: …",
    then=WAITS, within_s=30,
)  # fmt: skip
def _token_revoked(stage: Stage) -> Told:
    place, hone = stage.no_image, stage.no_image.hone
    with stage.elsewhere:
        before = place.submit("image-before")
        place.wait(before, "it is seen to", lambda: place.client.get(before).state == State.QUEUED)
        listed = {job.id for job in place.client.list()}
        address = place.address()
        hone.cluster.kubectl("delete", "serviceaccount", hone.release, namespace=hone.namespace)
        time.sleep(11)  # the API server remembers for ten seconds that a token was good
        job = place.submit("image-token")
        yield job
        assert {found.id for found in place.client.list()} == {job, *listed}
        place.wait(job, "/readyz says it", lambda: _line(place, address, NOT_ACCEPTED), timeout_s=15)
        assert 'hone_up{what="kubernetes"} 0.0' in place.monitor("/metrics", address=address)
        hone.upgrade()
        hone.cluster.kubectl("rollout", "restart", f"deployment/{hone.release}", namespace=hone.namespace)
        hone.wait_until_ready()
        place.wait(job, "it is seen to again", lambda: place.client.get(job).state == State.QUEUED, timeout_s=60)
        for known in (before, job):
            place.end(known)
            assert len(place.client.get(known).attempts) == 1


# What befalls a node, or the whole cluster.


@happens(
    "its node is drained", failure=FailureClass.PREEMPTED,
    says="Pod … on node … was evicted: its node was drained, or somebody asked for it. …", then=FREE, within_s=30,
)  # fmt: skip
def _drained(stage: Stage) -> Told:
    place = stage.main
    job = place.train("drained")
    node = place.pod(job)["spec"]["nodeName"]
    words = ("--delete-emptydir-data", "--ignore-daemonsets", f"--pod-selector=hone.dev/job={job}", "--timeout=60s")
    try:
        place.cluster.kubectl("drain", node, "--skip-wait-for-delete-timeout=1", *words, timeout_s=70)
        yield job
        place.second_attempt_trains(job)
        assert place.pod(job, attempt=2)["spec"]["nodeName"] != node
    finally:
        place.cluster.kubectl("uncordon", node)


@happens(
    "its node dies without a word",
    says="Node … does not confirm that pod … has ended. If that machine is off for good: `kubectl taint nodes … "
    "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute`, or `kubectl delete node …`. …",
    then=RUNS, within_s=120, act=3,
)  # fmt: skip
def _node_dead(stage: Stage) -> Told:
    place = stage.main
    job = _on_node_b(place, "dead")
    taint = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    with place.cluster.node_dead("node-b"):
        yield job
        assert taint in place.client.get(job).state_reason
        place.kubectl("taint", "nodes", "node-b", taint)
        try:
            found = place.second_attempt_trains(job)
        finally:
            place.kubectl("taint", "nodes", "node-b", f"{taint}-")
    failure = found.attempts[0].failure
    assert failure and failure.failure_class == FailureClass.INFRA and not found.attempts[0].counted


@happens(
    "its node is cut off, and comes back", says="Node … does not confirm that pod … has ended. …", then=RUNS,
    within_s=120, act=4, slow=True,
)  # fmt: skip
def _node_silent(stage: Stage) -> Told:
    place = stage.main
    job = _on_node_b(place, "silent")
    with place.cluster.node_silent("node-b"):
        yield job
        assert len(place.client.get(job).attempts) == 1
    found = place.second_attempt_trains(job)
    failure = found.attempts[0].failure
    assert failure and failure.failure_class == FailureClass.INFRA and not found.attempts[0].counted


@happens(
    "the API server is away for 30 s (`/readyz` says so meanwhile)", says="Read back: adapter and merged.", then=WELL,
    within_s=90, act=5,
)  # fmt: skip
def _api_server_away(stage: Stage) -> Told:
    place, steps = stage.main, 40
    running = place.submit("running", training={"max_steps": steps, "gradient_accumulation_steps": 32})
    place.reach(running, "training")
    place.wait(running, "it is seen to train", lambda: place.client.get(running).progress)
    list(place.client.list())
    address = place.address()
    with place.cluster.stopped("apiserver"):
        began = time.monotonic()
        waiting = place.submit("waiting", training={"max_steps": 4, "gradient_accumulation_steps": 1})
        while time.monotonic() - began < OUTAGE_S:
            assert {job.id for job in place.client.list()} >= {running, waiting}
            assert place.client.get(running).state != State.PENDING
            time.sleep(0.5)
        text = _line(place, address, API_AWAY)
        assert text, place.monitor("/readyz", address=address)
        assert 'hone_up{what="kubernetes"} 0.0' in place.monitor("/metrics", address=address)
        assert "cannot be seen to at the moment" in place.client.get(waiting).state_reason
        assert any("cannot be reached" in event.message for event in place.client.events(waiting))
    yield running
    place.assert_trained_once(running, steps=steps)
    place.assert_trained_once(waiting, steps=4)
    place.wait(running, "/readyz is well", lambda: _well(place))


@happens(
    "etcd is killed and comes back", says="Read back: adapter and merged.", then=WELL, within_s=90, act=2
)  # fmt: skip
def _etcd_killed(stage: Stage) -> Told:
    place, steps = stage.main, 30
    job = place.submit("etcd", training={"max_steps": steps, "gradient_accumulation_steps": 16})
    place.reach(job, "training")
    place.cluster.restart("etcd")
    waiting = place.submit("etcd-after")
    yield job
    place.assert_trained_once(job, steps=steps)
    place.assert_trained_once(waiting, steps=4)


@happens(
    "the store is away for some seconds while it uploads", says="Read back: adapter and merged.", then=WELL,
    within_s=120, act=6, slow=True,
)  # fmt: skip
def _store_away(stage: Stage) -> Told:
    job = stage.main.submit("store", training={"max_steps": 4, "gradient_accumulation_steps": 1})
    stage.main.reach(job, "saving")
    with stage.main.cluster.s3_stopped():
        time.sleep(8)
    yield job


def _on_node_b(place: Place, name: str) -> str:
    """A job that trains on node-b; the service stays on node-a, where its volume is."""
    place.cluster.kubectl("cordon", "node-a")
    try:
        return place.train(name)
    finally:
        place.cluster.kubectl("uncordon", "node-a")


def _gives_up(place: Place, job: str) -> None:
    """It holds its place no longer than the platform allows."""
    told = f"It held its place for {GIVEN_UP_S} s and could not start."

    def is_told() -> bool:
        failure = place.client.get(job).attempts[0].failure
        return failure is not None and failure.failure_class == FailureClass.INFRA and told in failure.message

    place.wait(job, told, is_told, timeout_s=GIVEN_UP_S + 30)


def _line(place: Place, address: str, says: str) -> str:
    """The line of /readyz that says so; empty when none does."""
    found = [line for line in place.monitor("/readyz", address=address).splitlines() if matches(says, line)]
    return found[0] if found else ""


def _well(place: Place) -> str | None:
    """What the service says of the API server; its own pod may have been moved after the outage."""
    with suppress(OSError, ValueError):
        return _line(place, place.address(), "[+] kubernetes: the API server answers")
    return None


def _is_of(pod: dict[str, Any], attempt: int) -> bool:
    return bool(pod["metadata"]["labels"]["hone.dev/attempt"] == str(attempt))


def _name(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def _store(stage: Stage) -> Any:
    keys = {"aws_access_key_id": stage.s3.access_key, "aws_secret_access_key": stage.s3.secret_key}
    return boto3.client("s3", endpoint_url=stage.s3.endpoint, region_name="us-east-1", **keys)


@pytest.fixture(scope="module")
def stage(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Two installations: one whose tenants differ in what they lack, and one that names an image that is not there."""
    code = secrets.token_hex(3)
    bucket = f"failures-{code}"
    cluster.s3.make_bucket(bucket)
    request = upload_inputs(cluster.s3, bucket, tmp_path_factory.mktemp("inputs"))
    request = {**request, "scheduling": {"max_attempts": 2}}
    tenants = [f"{name}-{code}" for name in ("main", "no-secret", "wrong-key", "no-quota", "no-image")]
    nothing = {**PLATFORM, "image": "localhost/none:1", "image_pull_policy": "Never"}
    with ExitStack() as stack:
        for tenant in tenants:
            stack.enter_context(cluster.new_namespace(tenant))

        def installed(platform: dict[str, Any], *served: str) -> Installation:
            directory, values = tmp_path_factory.mktemp("hone"), {"cluster": platform}
            return stack.enter_context(install(cluster, directory, tenants=served, bucket=bucket, values=values))

        def place(hone: Installation, tenant: str) -> Place:
            client = stack.enter_context(hone.client(tenant))
            return Place(hone=hone, tenant=tenant, request=request, api=administrator(cluster), client=client)

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.submit(installed, PLATFORM, *tenants[:4]), pool.submit(installed, nothing, tenants[4])
        places = [*(place(first.result(), tenant) for tenant in tenants[:4]), place(second.result(), tenants[4])]
        main, no_secret, wrong_key, no_quota, no_image = places
        no_secret.kubectl("delete", "secret", "hone-store")
        patch = json.dumps({"stringData": {"AWS_SECRET_ACCESS_KEY": "another"}})
        wrong_key.kubectl("patch", "secret", "hone-store", "-p", patch)
        no_quota.kubectl("create", "quota", "none", "--hard=pods=0")
        yield Stage(
            main=main, no_secret=no_secret, wrong_key=wrong_key, no_quota=no_quota, no_image=no_image, bucket=bucket,
            s3=cluster.s3,
        )  # fmt: skip


@pytest.fixture(scope="module")
def ranks(stage: Stage) -> Iterator[Ranks]:
    """Looks on while all cases are played."""
    with Ranks(api=administrator(stage.main.cluster), namespace=stage.main.tenant) as looking:
        yield looking


@pytest.fixture(scope="module")
def played(stage: Stage, ranks: Ranks, request: pytest.FixtureRequest) -> Iterator[dict[str, "Future[float]"]]:
    """Every case that was asked for, under way."""
    asked: list[Any] = [item for item in request.session.items if getattr(item, "originalname", "") == _TEST]
    cases: list[Case] = [item.callspec.params["case"] for item in asked]
    found: dict[str, Future[float]] = {}
    with ThreadPoolExecutor(SLOTS) as pool:

        def play(case: Case, before: list["Future[float]"]) -> float:
            wait(before)
            return stage.play(case)

        for act in sorted({case.act for case in cases}):
            before = list(found.values())
            found |= {case.name: pool.submit(play, case, before) for case in cases if case.act == act}
        yield found
        pool.shutdown(cancel_futures=True)


_TEST = "test_what_happens_to_a_job_is_told_as_the_page_says"


@pytest.mark.timeout(720)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.is_slow) for case in CASES]
)
def test_what_happens_to_a_job_is_told_as_the_page_says(
    played: dict[str, "Future[float]"], case: Case, record_property: Callable[[str, object], None]
) -> None:
    record_property("told_after_s", round(played[case.name].result(), 1))


def test_no_two_pods_ever_ran_as_one_rank(played: dict[str, "Future[float]"], ranks: Ranks) -> None:
    wait(played.values())
    assert ranks.doubles == []
    assert ranks.num_seen > len(played) / 2


def test_the_page_has_every_case_as_it_is_tested() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## What happens to a job when …\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert rows[1:] == [case.row() for case in CASES]
    assert len(CASES) >= 20
