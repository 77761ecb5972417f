"""Whether a Job can hold its request. What a pod says of requests that were edited by hand stands in test_pod.py."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hone.gpus import load_profiles
from hone.modelinfo import load_shape
from hone.plan import Hardware, make_plan
from hone.run import Run, TrainerExit
from hone.spec.parse import parse
from hone_trainer.failure import RunFailed
from hone_trainer.fit import Asked, check_gpu_memory, check_model, check_request, write_plan
from hone_trainer.node import Node

from .conftest import merge

GIB = 2**30
GPU: dict[str, Any] = {
    "name": "sft",
    "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
    "dataset": {"source": "hf://a/b"},
    "method": {"sft": {"max_length": 2048}},
    "adapter": {"lora": {}},
    "compute": {"gpus_per_node": 2, "gpu": "H100-80GB"},
}


@pytest.fixture
def planned() -> Callable[..., Run]:
    def make(changes: dict[str, Any] | None = None) -> Run:
        spec = parse(merge(GPU, changes or {}))
        hardware = Hardware(profiles=load_profiles(), cpu_cores=8, memory_bytes=64 * GIB)
        found = make_plan(spec, load_shape("hf://mistralai/Mistral-7B-v0.3"), hardware)
        return Run(
            namespace="default", job="sft-1", attempt=1, nonce="n", spec=found.spec, launch=found.plan.launch,
            store="file:///store", inputs={},
        )  # fmt: skip

    return make


def test_a_plan_is_found_again_from_what_it_decided(planned: Callable[..., Run]) -> None:
    for changes in ({}, {"compute": {"nodes": 2}}, {"adapter": None, "training": {"optimizer": "adamw"}}):
        run = planned(changes)
        asked = Asked(gpus=2, memory_bytes=512 * GIB, is_indexed=run.launch.nodes > 1)
        plan = check_request(run, asked, Node(main_port=29500))
        assert plan is not None
        assert replace(plan.launch, threads_per_process=0) == run.launch


def test_a_platform_may_name_gpus_that_the_trainer_does_not_know(planned: Callable[..., Run]) -> None:
    run = planned()
    compute = run.spec.compute.model_copy(update={"gpu": "B300-of-next-year"})
    plan = check_request(replace(run, spec=run.spec.model_copy(update={"compute": compute})), Asked(gpus=2), Node())
    assert plan is not None and plan.gpu == "B300-of-next-year"


@pytest.mark.parametrize(
    ("changes", "asked", "node", "words"),
    [
        ({}, Asked(gpus=1), Node(), "2 GPUs on each node, and the Job asks for 1"),
        ({}, Asked(gpus=2, memory_bytes=1 * GIB), Node(), "the Job's container may use 1.0 GiB"),
        ({"compute": {"nodes": 2}}, Asked(gpus=2), Node(), "the request has 2 nodes, and the Job has one"),
        ({}, Asked(gpus=2, is_indexed=True), Node(rank=1), "and the Job has more: this is its node 2"),
    ],
)
def test_what_the_job_does_not_hold_is_told_with_both_figures(
    planned: Callable[..., Run], changes: dict[str, Any], asked: Asked, node: Node, words: str
) -> None:
    with pytest.raises(RunFailed) as caught:
        check_request(planned(changes), asked, node)
    assert caught.value.code == TrainerExit.USER
    assert words in caught.value.message
    assert "render the manifest again" in caught.value.fix


def test_a_model_that_is_only_known_when_it_was_fetched_is_checked_then(
    planned: Callable[..., Run], tiny_model: Path
) -> None:
    run = planned()
    source = run.spec.model.model_copy(update={"source": "s3://models/base"})
    run = replace(run, spec=run.spec.model_copy(update={"model": source}))
    asked = Asked(gpus=2, memory_bytes=GIB)
    assert check_request(run, asked, Node()) is None
    with pytest.raises(RunFailed, match=r"may use 1\.0 GiB"):
        check_model(run, asked, tiny_model)


def test_a_gpu_that_is_smaller_than_planned_is_refused_with_both_sizes(
    planned: Callable[..., Run], tmp_path: Path
) -> None:
    import json

    plan = check_request(planned(), Asked(), Node())
    assert plan is not None
    write_plan(plan, tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    check_gpu_memory("NVIDIA H100", 80 * GIB, record)
    with pytest.raises(RunFailed, match=r"NVIDIA T4 has 15\.0 GiB, and the plan, made for H100-80GB, needs") as caught:
        check_gpu_memory("NVIDIA T4", 15 * GIB, record)
    assert caught.value.code == TrainerExit.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Asked()),
        ({"HONE_GPUS": "8", "HONE_MEMORY_LIMIT_BYTES": "1024"}, Asked(gpus=8, memory_bytes=1024)),
        ({"HONE_GPUS": "", "HONE_MEMORY_LIMIT_BYTES": "0", "JOB_COMPLETION_INDEX": "0"}, Asked(is_indexed=True)),
    ],
)
def test_what_the_job_asks_for_is_read_from_what_its_pods_are_told(
    environment: dict[str, str], expected: Asked
) -> None:
    assert Asked.of(environment) == expected


def test_a_node_that_is_not_in_the_plan_is_refused(planned: Callable[..., Run]) -> None:
    launch = planned({"compute": {"nodes": 2}}).launch
    for node in (Node(rank=2, main_port=29500), Node(rank=1)):
        with pytest.raises(RunFailed) as caught:
            node.check(launch)
        assert caught.value.code == TrainerExit.WRONG_WORLD
    with pytest.raises(RunFailed, match="JOB_COMPLETION_INDEX"):
        Node.of({"JOB_COMPLETION_INDEX": "first"})
