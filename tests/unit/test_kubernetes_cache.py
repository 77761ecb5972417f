"""The cache of a cluster's objects: whatever order, number or gaps events come with, it ends at what is there."""

import itertools
import random
from collections.abc import Iterator
from typing import Any, cast

import pytest

from hone.backends.kubernetes import cache as module
from hone.backends.kubernetes.cache import Cache, _Jobs, _Pods, _Warnings, _Workloads
from hone.backends.kubernetes.client import Api, jobs_path, path_of, pods_path
from hone.backends.kubernetes.objects import job_view

TIME = "2026-11-24T12:00:00Z"


class Told(list[tuple[str, str]]):
    """Who was told of."""

    def __call__(self, namespace: str, job: str) -> None:
        self.append((namespace, job))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def cache(told: Told) -> Cache:
    return Cache(cast(Api, None), ["team-a"], told)  # it is never started, so it asks nobody


def metadata(name: str, uid: str, version: int, **more: Any) -> dict[str, Any]:
    return {
        "namespace": "team-a",
        "name": name,
        "uid": uid,
        "resourceVersion": str(version),
        "creationTimestamp": TIME,
        "labels": {"hone.dev/job": "sft-1", "hone.dev/attempt": "1"},
        **more,
    }


def job(version: int = 1, *, uid: str = "j", suspend: bool = False) -> dict[str, Any]:
    return {"metadata": metadata("sft-1-a1", uid, version), "spec": {"suspend": suspend}}


def pod(version: int = 1, *, uid: str = "p", phase: str = "Pending", owner: str = "j") -> dict[str, Any]:
    owners = [{"kind": "Job", "name": "sft-1-a1", "uid": owner, "controller": True}]
    return {"metadata": metadata(f"pod-{uid}", uid, version, ownerReferences=owners), "status": {"phase": phase}}


def warning(about: str, reason: str, message: str, time: str = TIME, kind: str = "Pod") -> dict[str, Any]:
    return {
        "metadata": metadata("e", "e", 1),
        "involvedObject": {"kind": kind, "uid": about},
        "reason": reason,
        "message": message,
        "lastTimestamp": time,
    }


def workload(version: int, *, uid: str = "w") -> dict[str, Any]:
    owners = [{"kind": "Job", "name": "sft-1-a1", "uid": "j", "controller": True}]
    return {"metadata": metadata("w", uid, version, ownerReferences=owners), "spec": {"queueName": "gpus"}}


def test_what_changed_is_told_and_what_is_repeated_is_not(cache: Cache, told: Told) -> None:
    jobs, pods = _Jobs(cache, "team-a"), _Pods(cache, "team-a")
    for _ in range(3):
        jobs.replace([job(1)])
        pods.replace([pod(2)])
    assert told == [("team-a", "sft-1")] * 2
    pods.apply(pod(3, phase="Running"), is_gone=False)
    assert len(told) == 3


def test_what_somebody_made_is_no_news_to_them_and_its_first_event_neither(cache: Cache, told: Told) -> None:
    cache.put_job(job_view(job(1)), is_news=False)
    jobs = _Jobs(cache, "team-a")
    jobs.apply(job(1), is_gone=False)
    assert told == []
    jobs.apply(job(2, suspend=True), is_gone=False)
    assert told == [("team-a", "sft-1")]


def test_what_is_made_while_a_list_is_read_is_not_taken_for_gone(cache: Cache) -> None:
    def pages() -> Iterator[dict[str, Any]]:
        cache.put_job(job_view(job(5)), is_news=False)
        yield from ()

    _Jobs(cache, "team-a").replace(pages())
    assert [found.is_gone for found in cache.jobs()] == [False]


def test_any_order_and_any_number_of_events_ends_at_the_newest(cache: Cache) -> None:
    pods = _Pods(cache, "team-a")
    _Jobs(cache, "team-a").replace([job()])
    events = [(pod(2), False), (pod(3, phase="Running"), False), (pod(4, phase="Failed"), False), (pod(5), True)]
    for order in itertools.permutations(events):
        for data, is_gone in [*order, *random.Random(0).sample(order, 3)]:
            pods.apply(data, is_gone=is_gone)
        assert [(found.version, found.is_gone) for found in cache.pods("j")] == [("5", True)]


def test_a_list_tells_what_went_while_nobody_watched(cache: Cache, told: Told) -> None:
    jobs, pods = _Jobs(cache, "team-a"), _Pods(cache, "team-a")
    jobs.replace([job()])
    pods.replace([pod(phase="Running"), pod(uid="q")])
    pods.replace([pod(uid="q")])
    assert {found.uid: found.is_gone for found in cache.pods("j")} == {"p": True, "q": False}
    assert cache.pods("j")[0].phase == "Running"  # as it was last seen
    jobs.replace([])
    found = cache.job("team-a", "sft-1-a1")
    assert found and found.is_gone
    assert len(told) == 5


def test_a_list_that_breaks_off_takes_nothing_away(cache: Cache) -> None:
    jobs = _Jobs(cache, "team-a")
    jobs.replace([job()])

    def broken() -> Any:
        yield job(2)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        jobs.replace(broken())
    found = cache.job("team-a", "sft-1-a1")
    assert found and found.version == "2" and not found.is_gone


def test_what_is_forgotten_stays_so_and_its_pods_go_with_their_end(cache: Cache) -> None:
    jobs, pods = _Jobs(cache, "team-a"), _Pods(cache, "team-a")
    jobs.replace([job()])
    pods.replace([pod(phase="Running"), pod(uid="q")])
    pods.apply(pod(2, uid="q"), is_gone=True)
    cache.forget("j")
    assert [found.uid for found in cache.pods("j")] == ["p"]  # it still ends
    jobs.apply(job(3), is_gone=True)
    pods.apply(pod(4, phase="Failed"), is_gone=True)
    assert cache.job("team-a", "sft-1-a1") is None and cache.pods("j") == () and cache.pod("p") is None


def test_a_second_job_of_one_name_takes_the_firsts_place_and_leaves_its_live_pods(cache: Cache) -> None:
    jobs, pods = _Jobs(cache, "team-a"), _Pods(cache, "team-a")
    jobs.replace([job()])
    pods.replace([pod(phase="Running")])
    jobs.apply(job(9, uid="k"), is_gone=False)
    jobs.apply(job(8), is_gone=True)  # late
    found = cache.job("team-a", "sft-1-a1")
    assert found and found.uid == "k" and not found.is_gone
    assert [left.uid for left in cache.pods_of("team-a", "sft-1", 1)] == ["p"]
    assert cache.job_of_uid("j") is None


def test_of_warnings_the_newest_of_each_reason_is_kept_and_ends_with_what_it_is_about(cache: Cache, told: Told) -> None:
    warnings = _Warnings(cache)
    warnings.apply(warning("p", "FailedMount", "early", "2026-11-24T11:00:00Z"), is_gone=False)  # before its pod
    _Jobs(cache, "team-a").replace([job()])
    _Pods(cache, "team-a").replace([pod()])
    warnings.apply(warning("p", "FailedMount", "new"), is_gone=False)
    warnings.apply(warning("p", "FailedMount", "old", "2026-11-24T11:30:00Z"), is_gone=False)
    warnings.apply(warning("p", "FailedScheduling", "no", "2026-11-24T12:30:00Z"), is_gone=False)
    warnings.apply(warning("p", "FailedScheduling", "no", "2026-11-24T12:30:00Z"), is_gone=True)  # events end by age
    warnings.apply(warning("n", "Rebooted", "a node", kind="Node"), is_gone=False)
    assert [found.message for found in cache.warnings("p")] == ["new", "no"]
    assert cache.warnings("n") == () and len(told) == 4
    _Pods(cache, "team-a").apply(pod(7), is_gone=True)
    cache.forget("j")
    assert cache.warnings("p") == ()


def test_many_warnings_about_strangers_push_out_none_of_ours(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WARNINGS", 10)
    _Jobs(cache, "team-a").replace([job()])
    warnings = _Warnings(cache)
    warnings.apply(warning("j", "FailedCreate", "ours", kind="Job"), is_gone=False)
    for number in range(100):
        warnings.apply(warning(f"s{number}", "Failed", "theirs"), is_gone=False)
    assert cache.warnings("j") and len(cache._warnings) <= 10


def test_of_jobs_that_went_the_newest_are_kept(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GONE", 3)
    jobs = _Jobs(cache, "team-a")
    for number in range(10):
        data = {"metadata": metadata(f"sft-{number}", f"u{number}", number)}
        jobs.apply(data, is_gone=False)
        jobs.apply(data, is_gone=True)
    assert [found.name for found in cache.jobs()] == ["sft-7", "sft-8", "sft-9"]


def test_a_workload_follows_its_job_and_a_new_one_takes_the_olds_place(cache: Cache, told: Told) -> None:
    workloads = _Workloads(cache, "team-a")
    workloads.replace([workload(1)])
    _Jobs(cache, "team-a").replace([job()])
    workloads.apply(workload(2, uid="x"), is_gone=False)
    workloads.apply(workload(3), is_gone=True)  # the old one
    found = cache.workload("j")
    assert found and (found.uid, found.queue) == ("x", "gpus")
    workloads.replace([])
    assert cache.workload("j") is None
    assert len(told) == 3


def test_names_become_paths_and_not_more() -> None:
    assert jobs_path("team-a") == "/apis/batch/v1/namespaces/team-a/jobs"
    assert jobs_path("team-a", "b/../c?d") == "/apis/batch/v1/namespaces/team-a/jobs/b%2F..%2Fc%3Fd"
    assert pods_path("team-a", "p", "log") == "/api/v1/namespaces/team-a/pods/p/log"
    assert path_of("tokenreviews", group="authentication.k8s.io/v1") == "/apis/authentication.k8s.io/v1/tokenreviews"
