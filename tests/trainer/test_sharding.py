"""ZeRO on several processes: DeepSpeed really runs it, it trains as DDP does, and what it saves is whole."""

import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hone.run import TrainerExit

from .conftest import Attempt, MakeAttempt, preferences, write_rows
from .test_checkpoints import merged, points
from .test_supervisor import Start, start, wait_for

__all__ = ["start"]
pytestmark = pytest.mark.xdist_group("sharding")  # two at once take ten times as long
EVALUATED = {
    "dataset": {"eval_fraction": 0.2},  # 13 rows: one rank has a batch more than the other
    "training": {"max_steps": 6, "eval": {"steps": 3, "keep_best": True, "at_start": True}},
}
SAMPLES = {"reporting": {"samples": {"prompts": 2, "max_new_tokens": 8}}}
FULL = {"adapter": None, "training": {"learning_rate": 1e-3}}
QLORA = {"quantization": "nf4"}
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "full": FULL, "qlora": QLORA}
TWO = {"processes": 2, "micro_batch_size": 2}
FIRST = {("zero3", "sft", "full")}
"""The others take minutes, and `make soak` runs them; test_pod.py has two nodes, and how they go on."""
CASES = [
    pytest.param(*case, marks=() if case in FIRST else pytest.mark.slow, id="-".join(case))
    for case in [*product(("zero2", "zero3"), ("sft", "dpo", "reward"), ("lora", "full")), ("zero2", "sft", "qlora")]
]


def saved(attempt: Attempt) -> dict[str, torch.Tensor]:
    [event] = attempt.events("output")
    [file] = Path(event.fields["uri"].removeprefix("file://")).glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("strategy", "method", "kind"), CASES)
def test_zero_trains_and_saves_what_ddp_does(
    make_attempt: MakeAttempt, start: Start, tmp_path: Path, strategy: str, method: str, kind: str
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(64))
    other = {"method": {"sft": None, method: {"max_length": 64}}, "dataset": {"source": f"file://{pairs}"}}
    changes = merged(EVALUATED, KINDS[kind], other if method != "sft" else {}, SAMPLES if method != "reward" else {})
    ddp = make_attempt(changes, job="ddp", **TWO)
    assert start(ddp).wait(240) == 0
    zero = make_attempt(changes, job="zero", strategy=strategy, **TWO)
    assert start(zero).wait(400) == 0, zero.exit()
    assert zero.losses() == pytest.approx(ddp.losses(), rel=1e-4)
    figures = [[event.metrics["eval_loss"] for event in run.events("eval")] for run in (ddp, zero)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    answers = [[event.fields for event in run.events("sample")] for run in (ddp, zero)]
    assert answers[1] == answers[0] and len(answers[0]) == (0 if method == "reward" else 4)
    expected, found = saved(ddp), saved(zero)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_sharded_run_goes_on_from_its_checkpoint(make_attempt: MakeAttempt, start: Start, strategy: str) -> None:
    long: dict[str, Any] = {"training": {"max_steps": 100}}
    first = make_attempt(long, strategy=strategy, **TWO)
    child = start(first)
    wait_for(lambda: first.directory.events.exists() and len(first.events("progress")) > 5, timeout_s=300)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == TrainerExit.INTERRUPTED
    [told] = first.events("checkpoint")
    second = make_attempt(long, strategy=strategy, attempt=2, resume=points(told), **TWO)
    assert start(second).wait(300) == 0
    whole = make_attempt(long, strategy=strategy, job="whole", **TWO)
    assert start(whole).wait(300) == 0
    assert first.losses() + second.losses() == whole.losses()
    found, expected = saved(second), saved(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_sharded_run_that_had_ended_trains_no_step_more(
    make_attempt: MakeAttempt, start: Start, strategy: str, kind: str
) -> None:
    changes = merged({"training": {"checkpoint": {"steps": 2}}}, KINDS[kind], EVALUATED, SAMPLES)
    first = make_attempt(changes, strategy=strategy, **TWO)
    assert start(first).wait(300) == 0, first.exit()
    told = first.events("checkpoint")[-1]
    assert told.step == 6
    (first.store / "result.json").unlink()
    second = make_attempt(changes, strategy=strategy, attempt=2, resume=points(told), **TWO)
    assert start(second).wait(300) == 0, second.exit()
    assert second.losses() == []
    found, expected = saved(second), saved(first)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    answers = [
        [event.fields for event in run.events("sample") if event.fields["when"] == "after"] for run in (first, second)
    ]
    assert answers[1] == answers[0]
