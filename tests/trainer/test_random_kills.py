"""A run that is killed again and again, anywhere: no broken checkpoint is ever gone on from, and in the end its weights
are those of the run that nobody touched. Five kills here, RANDOM_KILLS of them by `make soak`; the seed is printed.
"""

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hone.checkpoints import checkpoints, resume_points
from hone.job import Event
from hone.run import TrainerExit
from hone.storage import FileStore, verify_directory
from hone_trainer.report import parse_event

from .conftest import Attempt, MakeAttempt
from .test_supervisor import Start, is_alive, outputs_of, start, wait_for

__all__ = ["start"]
SEED = int(os.environ.get("SOAK_SEED") or secrets.randbelow(2**32))
REQUEST = {
    "dataset": {"eval_fraction": 0.25},
    "training": {"max_steps": 40, "checkpoint": {"steps": 5, "keep": 2}, "eval": {"steps": 8}},
}
PPO = {
    "rewards": [{"regex": {"pattern": "[a-m]"}}],
    "batch_size": 8,
    "mini_batch_size": 4,
    "ppo_epochs": 2,
    "max_new_tokens": 6,
}
PHASES = ("loading", "data", "model", "training", "training", "training", "evaluation", "saving", "uploading")
"""Where a kill is meant to fall; most of a run is training."""


def is_told(attempt: Attempt, phase: str, step: int) -> bool:
    """Whether the run has come to a phase, or to a step of the training; or is over."""
    told = events_of(attempt)
    if phase == "training":
        return any((event.step or 0) >= step for event in told if event.type == "progress")
    return any(event.type == "phase" and event.message == phase for event in told)


def events_of(attempt: Attempt) -> list[Event]:
    """Those that were written whole; a killed trainer may leave half a line."""
    text = attempt.directory.events.read_bytes() if attempt.directory.events.exists() else b""
    lines = text.split(b"\n")[:-1]
    return [replace(parse_event(line, seq), attempt=attempt.run.attempt) for seq, line in enumerate(lines, start=1)]


def kill(chance: random.Random, attempt: Attempt, child: "subprocess.Popen[bytes]", ranks: int) -> str:
    """Kill it somewhere; what was done, in words."""
    phase, step, pause = chance.choice(PHASES), chance.randint(1, 40), chance.uniform(0, 0.4)
    wait_for(lambda: child.poll() is not None or is_told(attempt, phase, step), timeout_s=240)
    time.sleep(pause)
    who = chance.choice(("SIGTERM", "SIGKILL", "worker"))
    if child.poll() is not None:
        return "over"
    pid = child.pid
    if who == "worker":
        file = attempt.directory.scratch / f"worker-{chance.randrange(ranks)}.pid"
        if not file.exists():
            who = "SIGKILL"
        else:
            pid = int(file.read_text())
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM if who == "SIGTERM" else signal.SIGKILL)
    child.wait(180)
    return f"{who} in {phase}"


def wait_for_workers(attempt: Attempt) -> None:
    """Until none of them lives."""
    workers = list(attempt.directory.scratch.glob("worker-*.pid"))
    wait_for(lambda: not any(is_alive(int(file.read_text())) for file in workers if file.exists()))


def assert_nothing_broken_is_told(attempt: Attempt, points: list[Any]) -> None:
    """Every checkpoint that a next attempt is offered verifies, unless a newer one has just taken its place."""
    store = FileStore(attempt.store)
    whole = 0
    for point in points:
        if (Path(attempt.store) / point.place / "MANIFEST.json").exists():
            verify_directory(store, point.place, digest=point.sha256)
            whole += 1
    assert whole or not points, f"none of {points} is there"


def play(
    make_attempt: MakeAttempt, start: Start, *, processes: int, kills: int, seed: int, method: str = "sft"
) -> Counter[str]:
    """One run, killed so often; what was done how often."""
    request = REQUEST if method == "sft" else {**REQUEST, "method": {"sft": None, "ppo": PPO}}
    chance, size = random.Random(seed), {"processes": processes, "micro_batch_size": 4 // processes}
    done: Counter[str] = Counter()
    told: list[Event] = []
    job = f"killed-{method}-{seed}-{processes}"
    for number in range(1, kills + 2):
        points = resume_points(checkpoints(told))
        attempt = make_attempt(request, attempt=number, job=job, resume=tuple(points), **size)
        child = start(attempt)
        if number > kills:
            assert child.wait(240) == TrainerExit.SUCCEEDED
            break
        done[what := kill(chance, attempt, child, processes)] += 1
        wait_for_workers(attempt)
        if child.returncode == TrainerExit.SUCCEEDED:
            break
        told += events_of(attempt)
        assert_nothing_broken_is_told(attempt, list(resume_points(checkpoints(told))))
        assert outputs_of(attempt) in ([], ["adapter"]), what
    whole = make_attempt(request, job=f"whole-{method}-{seed}-{processes}", **size)
    assert start(whole).wait(240) == TrainerExit.SUCCEEDED
    assert adapter(attempt) == adapter(whole), f"{job}: {dict(done)}"
    return done


def tell(done: Counter[str]) -> None:
    """For people; `-s` shows it while it runs."""
    sys.stdout.write(f"SOAK_SEED={SEED}: {sum(done.values())} kills: {dict(sorted(done.items()))}\n")
    sys.stdout.flush()


def adapter(attempt: Attempt) -> bytes:
    """What was published."""
    output = next(event for event in attempt.events("output") if event.fields["kind"] == "adapter")
    return Path(output.fields["uri"].removeprefix("file://"), "adapter_model.safetensors").read_bytes()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "kills"), [(1, 2), (2, 1)])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    make_attempt: MakeAttempt, start: Start, processes: int, kills: int
) -> None:
    tell(play(make_attempt, start, processes=processes, kills=kills, seed=SEED))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_ppo_run_ends_with_the_weights_of_one_that_was_not(
    make_attempt: MakeAttempt, start: Start, processes: int
) -> None:
    tell(play(make_attempt, start, processes=processes, kills=processes, seed=SEED, method="ppo"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_kills(make_attempt: MakeAttempt, start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    """As many as RANDOM_KILLS says, five to a run, every third run of two processes."""
    left, seed, done = int(os.environ.get("RANDOM_KILLS", "50")), SEED, Counter[str]()
    while left > 0:
        found = play(make_attempt, start, processes=1 + (seed % 3 == 0), kills=min(5, left), seed=seed)
        left -= sum(count for what, count in found.items() if what != "over") or 1
        done += found
        seed += 1
        with capfd.disabled():
            tell(found)
    with capfd.disabled():
        tell(done)
