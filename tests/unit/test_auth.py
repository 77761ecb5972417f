"""Who may: what is asked of the API server, how long its answers are believed, and what its silence means."""

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hone.errors import ClusterError, InvalidRequest, Refused, Unauthenticated, Unavailable
from hone.rpc.auth import CALLERS, TRAINERS, VERBS, CallerGate, TokenInfo, TrainerGate, namespace_of
from hone.v1 import report_service_pb2, training_service_pb2
from hone.v1 import training_service_pb2 as pb

from ..integration.rights import ALICE, TRAINER, Cluster


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(tokens={("good", CALLERS): ALICE}, rights={("alice", "get", "team-a")})


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def get(namespace: str = "team-a", job: str = "demo") -> Any:
    return pb.GetJobRequest(name=f"namespaces/{namespace}/jobs/{job}")


async def call(gate: CallerGate, token: str = "good", request: Any = None, method: str = "GetJob") -> str:
    who = await gate.identify(bearer(token))
    await gate.permit(who, method, request or get())
    return who.info.user


def run(gate: CallerGate | TrainerGate, body: Callable[[], Awaitable[None]]) -> None:
    async def closed() -> None:
        try:
            await body()
        finally:
            gate.close()

    asyncio.run(closed())  # type: ignore[arg-type]


def test_every_method_of_the_api_has_its_verb() -> None:
    service = training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"]
    assert {method.name for method in service.methods} == set(VERBS)
    for method in service.methods:
        writes = not method.name.startswith(("Get", "List", "Watch", "Stream", "Query"))
        assert (VERBS[method.name] == "create") == writes, method.name


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"authorization": ""},
        {"authorization": "good"},
        {"authorization": "Basic good"},
        {"authorization": "Bearer "},
    ],
    ids=["nothing", "empty", "bare", "basic", "no-token"],
)
def test_who_brings_no_token_is_told_how_to_get_one(cluster: Cluster, metadata: dict[str, str]) -> None:
    gate = CallerGate(cluster)

    async def body() -> None:
        with pytest.raises(Unauthenticated, match="kubectl create token"):
            await gate.identify(metadata)

    run(gate, body)
    assert cluster.asked == []


def test_a_token_that_is_not_accepted_is_refused_and_forgotten_soon(cluster: Cluster) -> None:
    gate = CallerGate(cluster, no_kept_s=0.05)

    async def body() -> None:
        for _ in range(3):
            with pytest.raises(Unauthenticated, match="not accepted"):
                await call(gate, "new")
        assert len(cluster.asked) == 1
        cluster.tokens["new", CALLERS] = ALICE
        await asyncio.sleep(0.06)
        assert await call(gate, "new") == "alice"

    run(gate, body)


def test_who_may_not_is_told_the_same_whether_it_exists_or_not(cluster: Cluster) -> None:
    gate = CallerGate(cluster)
    told = set()

    async def body() -> None:
        for request in (get("team-b", "theirs"), get("team-b", "nothing")):
            with pytest.raises(Refused) as refused:
                await call(gate, request=request)
            told.add(str(refused.value))
        with pytest.raises(Refused, match="'nowhere'"):
            await call(gate, request=get("nowhere"))

    run(gate, body)
    assert len(told) == 1 and "kubectl auth can-i get jobs.batch -n team-b" in told.pop()


@pytest.mark.parametrize(
    ("method", "request_", "verb"),
    [
        ("CreateJob", pb.CreateJobRequest(parent="namespaces/team-a"), "create"),
        ("CancelJob", pb.CancelJobRequest(name="namespaces/team-a/jobs/x"), "create"),
        ("ListJobs", pb.ListJobsRequest(parent="namespaces/team-a"), "list"),
        ("ListEvents", pb.ListEventsRequest(parent="namespaces/team-a"), "list"),
        ("ListEvents", pb.ListEventsRequest(parent="namespaces/team-a/jobs/x"), "get"),
        ("ListOutputs", pb.ListOutputsRequest(parent="namespaces/team-a/jobs/x"), "get"),
        ("StreamLogs", pb.StreamLogsRequest(name="namespaces/team-a/jobs/x"), "get"),
    ],
)
def test_a_call_needs_the_right_that_kubernetes_has_for_it(
    cluster: Cluster, method: str, request_: Any, verb: str
) -> None:
    gate = CallerGate(cluster)

    async def body() -> None:
        cluster.rights = {("alice", other, "team-a") for other in ("create", "get", "list") if other != verb}
        with pytest.raises(Refused):
            await call(gate, method=method, request=request_)

    run(gate, body)
    assert cluster.asked[-1] == ("may", "alice", verb, "team-a")


@pytest.mark.parametrize("name", ["", "demo", "jobs/demo", "namespaces", "namespaces/", "/namespaces/a"])
def test_a_request_that_names_no_namespace_is_nobodys(name: str) -> None:
    with pytest.raises(InvalidRequest, match="names no namespace"):
        namespace_of(pb.GetJobRequest(name=name))


def test_answers_are_asked_for_once_by_any_number_of_callers(cluster: Cluster) -> None:
    gate = CallerGate(cluster)
    cluster.pause_s = 0.02

    async def body() -> None:
        assert await asyncio.gather(*(call(gate) for _ in range(50))) == ["alice"] * 50
        assert len(cluster.asked) == 2

    run(gate, body)


def test_an_answer_in_use_is_renewed_before_it_runs_out_and_outlives_an_outage(cluster: Cluster) -> None:
    gate = CallerGate(cluster, kept_s=0.5, again_s=0.1)

    async def body() -> None:
        await call(gate)
        await asyncio.sleep(0.15)
        await call(gate)
        await asyncio.sleep(0.05)  # renewed in the background
        assert cluster.asked == 2 * [("token", "good", CALLERS), ("may", "alice", "get", "team-a")]
        cluster.error = Unavailable("The API server cannot be reached.")
        await asyncio.sleep(0.15)
        assert await call(gate) == "alice"
        await asyncio.sleep(0.4)
        with pytest.raises(Unavailable, match="cannot be looked up now"):
            await call(gate)
        cluster.error = None
        assert await call(gate) == "alice"

    run(gate, body)


def test_a_right_that_was_taken_away_is_gone_when_its_answer_is(cluster: Cluster) -> None:
    gate = CallerGate(cluster, kept_s=0.2, again_s=0.1)

    async def body() -> None:
        await call(gate)
        cluster.rights.clear()
        await call(gate)
        await asyncio.sleep(0.21)
        with pytest.raises(Refused):
            await call(gate)

    run(gate, body)


@pytest.mark.parametrize("error", [Unavailable("away"), ClusterError("the service has no right to ask")])
def test_an_api_server_that_does_not_answer_blames_no_caller_and_tells_only_the_log_why(
    cluster: Cluster, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    gate = CallerGate(cluster)
    cluster.error = error

    async def body() -> None:
        for _ in range(3):
            with pytest.raises(Unavailable, match="cannot be looked up now") as told:
                await call(gate)
            assert str(error) not in str(told.value)

    run(gate, body)
    assert caplog.text.count(str(error)) == 1


def test_a_token_that_expires_while_it_is_remembered_is_refused_at_once(cluster: Cluster) -> None:
    gate = CallerGate(cluster)
    token = jwt(exp=time.time() + 0.3)
    cluster.tokens[token, CALLERS] = ALICE

    async def body() -> None:
        assert await call(gate, token) == "alice"
        await asyncio.sleep(0.35)
        with pytest.raises(Unauthenticated, match="expired"):
            await call(gate, token)

    run(gate, body)


def test_no_token_is_kept(cluster: Cluster) -> None:
    gate = CallerGate(cluster)

    async def body() -> None:
        await call(gate)
        for answers in (gate._tokens, gate._rights):
            assert answers._yes and "good" not in repr(vars(answers))

    run(gate, body)


def test_refusals_push_nobody_out_who_is_known(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hone.rpc.answers.MOST", 10)
    gate = CallerGate(cluster)

    async def body() -> None:
        await call(gate)
        for number in range(30):
            with pytest.raises(Unauthenticated):
                await call(gate, f"noise-{number}")
        cluster.error = Unavailable("away")
        assert await call(gate) == "alice"
        assert len(gate._tokens._no) == 10

    run(gate, body)


def test_a_pod_reports_for_the_attempt_that_it_runs_and_for_no_other(cluster: Cluster) -> None:
    cluster.tokens = {("pod", TRAINERS): TRAINER, ("pod-a-caller", CALLERS): TRAINER}
    gate = TrainerGate(cluster, cluster.owner_of)

    async def report(job: str, attempt: int, token: str = "pod") -> None:
        request = report_service_pb2.ReportEventsRequest(job=job, attempt=attempt)
        await gate.permit(await gate.identify(bearer(token)), "ReportEvents", request)

    async def body() -> None:
        await report("namespaces/team-a/jobs/demo", 2)
        for job, attempt in (("team-a/jobs/demo", 1), ("team-a/jobs/other", 2), ("team-b/jobs/demo", 2)):
            with pytest.raises(Refused, match="may not report for"):
                await report(f"namespaces/{job}", attempt)
        with pytest.raises(Unauthenticated, match="hone-report"):
            await report("namespaces/team-a/jobs/demo", 2, token="pod-a-caller")
        assert [question for question in cluster.asked if question[0] == "owner"] == [
            ("owner", "team-a", "demo-a2-0-x7k2p", "uid-1")
        ]

    run(gate, body)


@pytest.mark.parametrize(
    "info",
    [
        TokenInfo(user="alice", extra=TRAINER.extra),
        TokenInfo(user=TRAINER.user),
        TokenInfo(user=TRAINER.user, extra={"authentication.kubernetes.io/pod-name": ("x",)}),
    ],
    ids=["a-person", "no-pod", "no-uid"],
)
def test_a_token_of_no_pod_reports_nothing(cluster: Cluster, info: TokenInfo) -> None:
    cluster.tokens = {("odd", TRAINERS): info}
    gate = TrainerGate(cluster, cluster.owner_of)

    async def body() -> None:
        request = report_service_pb2.ReportEventsRequest(job="namespaces/team-a/jobs/demo", attempt=2)
        with pytest.raises(Refused, match="of no pod"):
            await gate.permit(await gate.identify(bearer("odd")), "ReportEvents", request)

    run(gate, body)


def test_a_pod_that_is_gone_or_another_of_its_name_reports_nothing(cluster: Cluster) -> None:
    name, uid = TRAINER.extra.items()
    other = TokenInfo(user=TRAINER.user, extra={name[0]: name[1], uid[0]: ("uid-2",)})
    cluster.tokens = {("old", TRAINERS): other}
    gate = TrainerGate(cluster, cluster.owner_of)

    async def body() -> None:
        request = report_service_pb2.ReportEventsRequest(job="namespaces/team-a/jobs/demo", attempt=2)
        with pytest.raises(Refused, match="may not report for"):
            await gate.permit(await gate.identify(bearer("old")), "ReportEvents", request)

    run(gate, body)


def test_a_token_is_looked_up_once_and_its_pod_again_and_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("hone.rpc.answers.time", SimpleNamespace(monotonic=lambda: now))
    cluster.tokens = {("pod", TRAINERS): TRAINER}
    gate = TrainerGate(cluster, cluster.owner_of)

    async def body() -> None:
        nonlocal now
        request = report_service_pb2.ReportEventsRequest(job="namespaces/team-a/jobs/demo", attempt=2)
        for moment in (0.0, 130.0, 260.0):
            now = moment
            await gate.permit(await gate.identify(bearer("pod")), "ReportEvents", request)
        assert [question[0] for question in cluster.asked] == ["token", "owner", "owner", "owner"]
        gate._owner_of = lambda *_: None
        now = 390.0
        with pytest.raises(Refused, match="may not report for"):
            await gate.permit(await gate.identify(bearer("pod")), "ReportEvents", request)

    run(gate, body)


def jwt(**claims: float) -> str:
    """A token that looks like a ServiceAccount's."""
    parts = ({"alg": "RS256"}, claims, {})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
