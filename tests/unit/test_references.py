"""`job://…` in a request: named when it is recorded, waited for, and handed to the trainer as a place in the store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_reconcile import Cluster, House, adapter, cluster, failed

from hone.backends.base import Observation, Phase
from hone.errors import InvalidRequest
from hone.job import FailureClass, Job, State
from hone.spec import Adapter, JobSpec, Lora

MakeSpec = Callable[..., JobSpec]
__all__ = ["cluster"]


def following(make_spec: MakeSpec, source: str, **changes: Any) -> JobSpec:
    return make_spec(name="second", model={"source": source}, **changes)


def test_a_job_waits_for_the_output_that_it_starts_from_and_is_handed_its_place(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    first = house.jobs.create("default", make_spec())
    second = house.jobs.create("default", following(make_spec, "job://demo"))
    assert second.requested_spec.model.source == "job://demo"
    assert second.resolved_spec.model.source == f"job://{first.id}/adapter"
    assert second.plan.peak_bytes == first.plan.peak_bytes
    second = house.step(second, 2)
    assert (second.state, second.attempts) == (State.PENDING, ())
    assert second.state_reason == f"It waits for the adapter of job {first.id}, which is PENDING."
    first = succeed(house, backend, first, tmp_path)
    house.step(second, 2)
    (run,) = [run for run in backend.runs if run.job == second.id]
    assert run.inputs == {f"job://{first.id}/adapter": first.outputs[0].uri}


def test_a_job_that_goes_on_from_an_adapter_has_its_settings(
    cluster: tuple[House, Cluster], make_spec: MakeSpec
) -> None:
    house, _ = cluster
    first = house.jobs.create("default", make_spec(adapter={"lora": {"rank": 4, "target_modules": ["q_proj"]}}))
    start = f"job://{first.id}/adapter"
    second = house.jobs.create("default", following(make_spec, start, adapter={"lora": {"dropout": 0.1}}))
    assert second.resolved_spec.adapter == Adapter(lora=Lora(rank=4, dropout=0.1, target_modules=("q_proj",)))
    with pytest.raises(InvalidRequest, match=r"adapter\.lora\.rank: is 4 in the adapter"):
        house.jobs.create("default", following(make_spec, start, adapter={"lora": {"rank": 8}}))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_merge_of_a_job_s_adapter_knows_whether_its_base_was_in_4_bits(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, quantization: str | None
) -> None:
    house, _ = cluster
    first = house.jobs.create("default", make_spec(adapter={"lora": {}}, quantization=quantization))
    merge = {"merge": {"adapters": [{"source": f"job://{first.id}"}]}}
    second = house.jobs.create("default", make_spec(name="both", adapter=None, dataset=None, method=merge))
    assert second.resolved_spec.quantization is None
    assert ("base" in {item.name for item in second.plan.memory}) == bool(quantization)


def test_an_adapter_on_another_job_s_model_brings_that_too(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path
) -> None:
    house, backend = cluster
    first = succeed(house, backend, house.jobs.create("default", make_spec()), tmp_path / "1")
    second = house.jobs.create("default", following(make_spec, f"job://{first.id}/adapter"))
    second = succeed(house, backend, second, tmp_path / "2")
    third = house.jobs.create("default", following(make_spec, f"job://{second.id}/adapter"))
    house.step(third, 2)
    (run,) = [run for run in backend.runs if run.job == third.id]
    assert run.inputs == {f"job://{job.id}/adapter": job.outputs[0].uri for job in (first, second)}


@pytest.mark.parametrize("how", ["failed", "deleted", "deleted later"])
def test_a_job_whose_start_will_never_be_there_fails_before_anything_of_it_runs(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, tmp_path: Path, how: str
) -> None:
    house, backend = cluster
    first = house.jobs.create("default", make_spec())
    second = house.jobs.create("default", following(make_spec, f"job://{first.id}"))
    if how == "failed":
        backend.seen = {1: failed(FailureClass.OOM)}
        house.step_until(first, State.FAILED)
    else:
        succeed(house, backend, first, tmp_path)
        if how == "deleted later":
            house.step(second)
            assert house.jobs.get("default", second.id).attempts
        house.jobs.delete("default", first.id)
        house.reconciler.step(("default", first.id))
    backend.seen = {}
    second = house.step_until(second, State.FAILED)
    assert second.failure and second.failure.failure_class == FailureClass.USER
    assert first.id in second.failure.message and second.failure.next_step
    assert second.id not in {run.job for run in backend.runs}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("job://nobody", "There is no job 'nobody'"),
        ("job://demo/merged", "leaves no merged; it leaves adapter"),
        ("job://both", "leaves adapter and merged: write job://both"),
        ("job://broken", "is FAILED: it leaves no outputs"),
        ("job://demo/weights", "is no output of a job"),
    ],
)
def test_a_reference_that_nothing_answers_to_is_refused_with_what_there_is(
    cluster: tuple[House, Cluster], make_spec: MakeSpec, source: str, message: str
) -> None:
    house, backend = cluster
    house.jobs.create("default", make_spec())
    house.jobs.create("default", make_spec(name="both", output={"merged": True}), job_id="both")
    broken = house.jobs.create("default", make_spec(name="broken"), job_id="broken")
    backend.seen = {1: failed(FailureClass.OOM)}
    house.step_until(broken, State.FAILED)
    with pytest.raises(InvalidRequest, match=message) as found:
        house.jobs.create("default", following(make_spec, source))
    assert [violation.path for violation in found.value.violations] == ["model.source"]


def succeed(house: House, backend: Cluster, job: Job, place: Path) -> Job:
    """Take a job to its end."""
    place.mkdir(exist_ok=True)
    backend.events = {1: [adapter(house, job, place, seq=1)]}
    backend.seen = {1: Observation(phase=Phase.SUCCEEDED)}
    job = house.step_until(job, State.SUCCEEDED)
    backend.events, backend.seen = {}, {}
    return job
