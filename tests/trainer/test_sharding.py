"""ZeRO on several processes: DeepSpeed really runs it, it trains as DDP does, and what it saves is whole."""

import signal
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
EVALUATED = {"dataset": {"eval_fraction": 0.2}, "training": {"max_steps": 6, "eval": {"steps": 3, "keep_best": True}}}
FULL = {"adapter": None, "training": {"learning_rate": 1e-3}}
TWO = {"processes": 2, "micro_batch_size": 2}


def saved(attempt: Attempt) -> dict[str, torch.Tensor]:
    [event] = attempt.events("output")
    [file] = Path(event.fields["uri"].removeprefix("file://")).glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("strategy", ["zero2"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_zero_trains_and_saves_what_ddp_does(
    make_attempt: MakeAttempt, start: Start, tmp_path: Path, method: str, strategy: str, kind: str
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(64))
    other = {"method": {"sft": None, method: {"max_length": 64}}, "dataset": {"source": f"file://{pairs}"}}
    changes = merged(EVALUATED, FULL if kind == "full" else {}, other if method != "sft" else {})
    ddp = make_attempt(changes, job="ddp", **TWO)
    assert start(ddp).wait(240) == 0
    zero = make_attempt(changes, job="zero", strategy=strategy, **TWO)
    assert start(zero).wait(400) == 0, zero.exit()
    assert zero.losses() == pytest.approx(ddp.losses(), rel=1e-4)
    figures = [[event.metrics["eval_loss"] for event in run.events("eval")] for run in (ddp, zero)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    expected, found = saved(ddp), saved(zero)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_sharded_run_goes_on_from_its_checkpoint(make_attempt: MakeAttempt, start: Start) -> None:
    long: dict[str, Any] = {"training": {"max_steps": 100}}
    first = make_attempt(long, strategy="zero2", **TWO)
    child = start(first)
    wait_for(lambda: first.directory.events.exists() and len(first.events("progress")) > 5, timeout_s=300)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == TrainerExit.INTERRUPTED
    [told] = first.events("checkpoint")
    second = make_attempt(long, strategy="zero2", attempt=2, resume=points(told), **TWO)
    assert start(second).wait(300) == 0
    whole = make_attempt(long, strategy="zero2", job="whole", **TWO)
    assert start(whole).wait(300) == 0
    assert first.losses() + second.losses() == whole.losses()
    found, expected = saved(second), saved(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
