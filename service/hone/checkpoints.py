"""Which checkpoints a job has, as its trainers told of them; called by jobs.py to show them, by steps.py to go on from.

Pure: events in, checkpoints out. A trainer's words are a tenant's: an event that does not tell of a checkpoint, or
names a place outside of the job's own, is passed over.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hone.errors import UserError
from hone.job import Checkpoint, Event
from hone.run import ResumePoint
from hone.storage import JobLayout

MAX_RESUME_POINTS = 16
"""So many fit into what a Job carries; a trainer takes the first that is whole."""


def checkpoints(events: Iterable[Event]) -> list[Checkpoint]:
    """Checkpoints that events of one job tell of, in order; those that were removed since are not complete."""
    found: dict[str, Checkpoint] = {}
    for event in events:
        try:
            told = _read(event)
        except (KeyError, ValueError, UserError):
            continue
        found.pop(told.place, None)
        found[told.place] = told
        for place in event.fields.get("removes", "").split():
            if place in found:
                found[place] = replace(found[place], complete=False)
    return list(found.values())


def resume_points(found: Sequence[Checkpoint]) -> Sequence[ResumePoint]:
    """What an attempt may go on from of what was there when it was made, the newest first."""
    left = [checkpoint for checkpoint in reversed(found) if checkpoint.complete]
    return [
        ResumePoint(step=checkpoint.step, place=checkpoint.place, sha256=checkpoint.sha256)
        for checkpoint in left[:MAX_RESUME_POINTS]
    ]


def _read(event: Event) -> Checkpoint:
    fields = event.fields
    if event.step is None:
        raise ValueError("a checkpoint without its step")
    JobLayout("any", "job").output(fields["place"])  # refuses a place that is none
    return Checkpoint(
        step=event.step,
        place=fields["place"],
        uri=fields["uri"],
        size_bytes=int(fields["size_bytes"]),
        sha256=fields["sha256"],
        attempt=event.attempt,
        time=event.time,
        complete=True,
    )
