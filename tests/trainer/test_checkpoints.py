"""Checkpoints: whole or not there, told once they are stored; a run that goes on ends as if it never stopped."""

import json
import math
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from hone.job import Event
from hone.run import ResumePoint, TrainerExit
from hone.storage import FileStore, verify_directory
from hone_trainer.context import RunContext
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import fetch
from hone_trainer.report import EventLog
from hone_trainer.supervisor import supervise
from hone_trainer.training import Watch

from .conftest import Attempt, MakeAttempt, RunHere, preferences, reversals, write_rows
from .test_supervisor import Start, start, wait_for

__all__ = ["start"]
EVERY_2 = {"training": {"max_steps": 6, "checkpoint": {"steps": 2}}}
LONG = {"training": {"max_steps": 150, "checkpoint": {"keep": 1}}}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the later over the earlier."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            both = isinstance(value, dict) and isinstance(whole.get(name), dict)
            whole[name] = merged(whole[name], value) if both else value
    return whole


def weights(attempt: Attempt) -> bytes:
    """What was trained, as it was saved in this process."""
    [file] = (attempt.directory.scratch / "outputs").glob("*/*model.safetensors")
    return file.read_bytes()


def stored_weights(attempt: Attempt) -> bytes:
    [event] = attempt.events("output")
    return Path(event.fields["uri"].removeprefix("file://"), "adapter_model.safetensors").read_bytes()


def going_on(attempt: Attempt, made: Path) -> Attempt:
    shutil.copytree(made, attempt.directory.resume)
    return attempt


def points(*events: Event) -> tuple[ResumePoint, ...]:
    """As the service hands them to the next attempt."""
    return tuple(ResumePoint(step=e.step or 0, place=e.fields["place"], sha256=e.fields["sha256"]) for e in events)


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"adapter": None, "training": {"learning_rate": 1e-3}},
    "packed": {"method": {"sft": {"packing": True, "max_length": 128}}},
    "dropout": {"adapter": {"lora": {"dropout": 0.1}}},
    "best": {
        "dataset": {"eval_fraction": 0.25},
        "training": {"eval": {"steps": 2, "at_start": True, "keep_best": True}},
    },
    "dpo": {"method": {"sft": None, "dpo": {"max_length": 64}}},
    "reward": {"method": {"sft": None, "reward": {"max_length": 64}}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_on_is_bitwise_the_run_that_never_stopped(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, name: str
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(64))
    data = {"dataset": {"source": f"file://{pairs}"}} if name in ("dpo", "reward") else {}
    changes = merged(EVERY_2, CASES[name], data)
    whole = run_here(make_attempt(changes, gradient_accumulation_steps=2))
    made = whole.directory.checkpoints
    assert sorted(path.name for path in made.iterdir()) == ["step-000002", "step-000004", "step-000006"]
    assert not list(made.rglob("training_args.bin"))
    again = going_on(make_attempt(changes, gradient_accumulation_steps=2), made / "step-000004")
    run_here(again)
    assert again.losses() == whole.losses()[4:]
    assert weights(again) == weights(whole)
    last, whole_last = again.events("progress")[-1], whole.events("progress")[-1]
    assert (last.step, last.metrics["tokens"]) == (6, whole_last.metrics["tokens"])
    record, whole_record = (
        json.loads((attempt.directory.scratch / "worker.json").read_text())["metrics"] for attempt in (again, whole)
    )
    for figure in ("first_loss", "last_loss", "eval_before", "eval_after"):
        assert record[figure] == whole_record[figure]


def test_a_run_that_had_ended_trains_no_step_more(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    whole = run_here(make_attempt(EVERY_2))
    again = going_on(make_attempt(EVERY_2), whole.directory.checkpoints / "step-000006")
    run_here(again)
    assert again.losses() == [] and weights(again) == weights(whole)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused_and_not_half_used(
    make_attempt: MakeAttempt, run_here: RunHere, file: str
) -> None:
    whole = run_here(make_attempt(EVERY_2))
    again = going_on(make_attempt(EVERY_2), whole.directory.checkpoints / "step-000004")
    (again.directory.resume / file).unlink()
    with pytest.raises(RunFailed, match=file) as failed:
        run_here(again)
    assert failed.value.code == TrainerExit.INTEGRITY


def test_a_checkpoint_of_another_number_of_ranks_is_refused_before_anything_starts(
    make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    whole = run_here(make_attempt(EVERY_2))
    again = going_on(make_attempt(EVERY_2), whole.directory.checkpoints / "step-000004")
    course = again.directory.resume / "course.json"
    course.write_text(json.dumps({**json.loads(course.read_text()), "world_size": 2}))
    with pytest.raises(RunFailed, match="made by 2 processes, and this run has 1") as failed:
        run_here(again)
    assert failed.value.code == TrainerExit.WRONG_WORLD and again.losses() == []


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_goes_on_where_it_was(
    make_attempt: MakeAttempt, start: Start, processes: int
) -> None:
    size = {"processes": processes, "micro_batch_size": 4 // processes}
    first = make_attempt(LONG, **size)
    child = start(first)
    wait_for(lambda: first.directory.events.exists() and len(first.events("progress")) > 10)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == TrainerExit.INTERRUPTED
    [told] = first.events("checkpoint")
    assert told.step == first.events("progress")[-1].step and told.step > 10
    verify_directory(FileStore(first.store), told.fields["place"], digest=told.fields["sha256"])
    second = make_attempt(
        merged(LONG, {"training": {"checkpoint": {"steps": 100}}}), attempt=2, resume=points(told), **size
    )
    assert start(second).wait(180) == 0
    assert [path.name for path in second.store.glob("*/checkpoints/*")] == ["step-000150"], "keep: 1"
    assert second.events("progress")[0].step == told.step + 1
    whole = make_attempt(LONG, job="whole", **size)
    assert start(whole).wait(180) == 0
    assert first.losses() + second.losses() == whole.losses()
    assert stored_weights(second) == stored_weights(whole)
    page = (second.store / "report.html").read_text()
    assert "2 attempts" in page and ">SUCCEEDED<" in page
    assert page.count("trainable params") == 2, "what both attempts told"


def test_a_signal_in_an_evaluation_ends_in_a_checkpoint_too(
    make_attempt: MakeAttempt, start: Start, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "eval.jsonl", reversals(20_000))
    evaluation = {"steps": 3, "batch_size": 1}
    attempt = make_attempt(
        merged(LONG, {"dataset": {"eval_source": f"file://{rows}"}, "training": {"eval": evaluation}})
    )
    child = start(attempt)
    wait_for(lambda: attempt.directory.events.exists() and any(e.message == "evaluation" for e in attempt.events()))
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == TrainerExit.INTERRUPTED
    assert [event.step for event in attempt.events("checkpoint")] == [3]
    assert attempt.events("eval") == []


def test_a_signal_that_comes_while_ranks_agree_waits_for_the_next_step(make_attempt: MakeAttempt) -> None:
    """Were this rank alone to save, it would wait for the others for ever."""
    attempt = make_attempt()
    attempt.directory.scratch.mkdir()
    inputs = fetch(attempt.run, attempt.directory.scratch / "inputs")
    events = EventLog(attempt.directory.events)
    context = RunContext(
        run=attempt.run, directory=attempt.directory, inputs=inputs, events=events, rank=0, world_size=2
    )
    watch = Watch(context)

    def reduce(own: torch.Tensor) -> torch.Tensor:
        agreed = own.clone()
        context.stop.asked = True  # after this rank said that it was not
        return agreed

    watch.progress.trainer = SimpleNamespace(watch=watch, accelerator=SimpleNamespace(reduce=reduce))
    settings: Any = SimpleNamespace(device="cpu")
    asked_to = []
    for _ in range(2):
        control = TrainerControl()
        for callback in watch.callbacks:
            callback.on_step_end(settings, TrainerState(), control)
        asked_to.append((control.should_save, control.should_training_stop))
    assert asked_to == [(False, False), (True, True)]


def test_no_more_checkpoints_stay_than_are_kept_and_a_damaged_one_is_passed_over(make_attempt: MakeAttempt) -> None:
    changes = merged(EVERY_2, {"training": {"max_steps": 60, "checkpoint": {"steps": 10, "keep": 2}}})
    first = make_attempt(changes)
    assert supervise(first.directory.path) == 0
    told = first.events("checkpoint")
    gone = {place for event in told for place in event.fields["removes"].split()}
    left = [event for event in told if event.fields["place"] not in gone]
    assert len(left) == 2 and told[-1].step == 60
    checkpoints = first.store / "attempt-1" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{e.step:06d}" for e in left]
    older, newer = left
    (first.store / newer.fields["place"] / "optimizer.pt").write_bytes(b"somebody else's pickle")
    second = make_attempt(merged(changes, {"training": {"seed": 42}}), attempt=2, resume=points(newer, older))
    (first.store / "result.json").unlink()
    assert supervise(second.directory.path) == 0
    [warning] = [event for event in second.events("warning") if "step 60" in event.message]
    assert "cannot be used" in warning.message
    assert second.events("progress")[0].step == (older.step or math.nan) + 1


def test_a_checkpoint_that_somebody_put_in_its_place_is_not_opened(make_attempt: MakeAttempt) -> None:
    first = make_attempt(EVERY_2)
    assert supervise(first.directory.path) == 0
    told = first.events("checkpoint")[-1]
    place = first.store / told.fields["place"]
    manifest = json.loads((place / "MANIFEST.json").read_text())
    (place / "MANIFEST.json").write_text(json.dumps({**manifest, "created": "2026-01-01T00:00:00+00:00"}))
    (first.store / "result.json").unlink()
    second = make_attempt(EVERY_2, attempt=2, resume=points(told))
    assert supervise(second.directory.path) == 0
    unused, from_start = second.events("warning")
    assert "cannot be used" in unused.message and "starts from the beginning" in from_start.message
    assert [event.step for event in second.events("progress")] == [1, 2, 3, 4, 5, 6]
