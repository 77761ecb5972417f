"""The page about a run, made when an attempt has ended, however it ended. Called by the first node's supervisor."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hone.job import Event, Failure, Plan
from hone.report import Facts, render
from hone.run import Run, TrainerExit
from hone_trainer.publish import Publisher
from hone_trainer.report import parse_event


def keep_page(run: Run, publisher: Publisher, events: Path, *, plan: Plan | None, failure: Failure | None) -> str:
    """Render what this attempt and those before it told, and store it; the answer is where it lies."""
    attempts = [*publisher.earlier_events(), events.read_bytes().splitlines()]
    told = [event for number, lines in enumerate(attempts, start=1) for event in _parsed(lines, number)]
    state = "SUCCEEDED" if failure is None else "FAILED"
    if failure and failure.exit_code == TrainerExit.INTERRUPTED:
        state = "INTERRUPTED"
    facts = Facts(
        namespace=run.namespace,
        job=run.job,
        state=state,
        spec=run.spec,
        plan=plan,
        events=told,
        failure=failure,
        attempts=run.attempt,
    )
    return publisher.keep_report(render(facts))


def _parsed(lines: list[bytes], attempt: int) -> Iterator[Event]:
    for seq, line in enumerate(lines, start=1):
        yield replace(parse_event(line, seq), attempt=attempt)
