"""A chain: several requests of one file, where `job://<name>` in one means an earlier one of that name.

Called by run and submit. A job of a chain has the hash of its request in its id, so that the file given once more finds
what is there: what is running or has succeeded is taken as it is, what failed or was cancelled is made anew, and with
it what depends on it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING

from hone.errors import InvalidRequest, NotFound, Violation
from hone.job import Job, State
from hone.spec import JobSpec
from hone.spec.sources import sources, with_sources

if TYPE_CHECKING:
    from hone.rpc.client import Client

_ENDED_IN_VAIN = (State.FAILED, State.CANCELLED, State.CANCELLING)


@dataclass(frozen=True)
class Step:
    """One request of a chain."""

    job: Job
    is_reused: bool
    """Whether the job was there already."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be done."""
        return self.job.state == State.SUCCEEDED


def submit_chain(client: "Client", specs: Sequence[JobSpec], *, must_run_here: bool = False) -> list[Step]:
    """Make the jobs that are missing, in their order. Raises InvalidRequest naming the request, with nothing made of it
    and of those behind it."""
    ids, steps = dict[str, str](), list[Step]()
    for spec in specs:
        wanted = _by_id(spec, ids)
        step = _ensured(client, wanted, must_run_here=must_run_here)
        ids[spec.name] = step.job.id
        steps.append(step)
    return steps


def _by_id(spec: JobSpec, ids: dict[str, str]) -> JobSpec:
    changed = {}
    for _, text in sources(spec, scheme="job"):
        name, slash, kind = text.removeprefix("job://").partition("/")
        if name in ids:
            changed[text] = f"job://{ids[name]}{slash}{kind}"
    return with_sources(spec, changed)


def _ensured(client: "Client", spec: JobSpec, *, must_run_here: bool) -> Step:
    text = json.dumps(spec.to_mapping(), sort_keys=True)
    stem = f"{spec.name}-{sha256(text.encode()).hexdigest()[:8]}"
    for number in count(1):
        job_id = stem if number == 1 else f"{stem}-{number}"
        try:
            job = client.get(job_id)
        except NotFound:
            if must_run_here:
                _check_runs_here(client, spec)
            return Step(client.submit(spec, job_id=job_id), is_reused=False)
        if job.state not in _ENDED_IN_VAIN and job.delete_time is None:
            return Step(job, is_reused=True)
    raise AssertionError("numbers do not end")


def _check_runs_here(client: "Client", spec: JobSpec) -> None:
    answer = client.plan(spec)
    if answer.violations:
        raise InvalidRequest([replace(one, path=f"{spec.name}: {one.path}") for one in answer.violations])
    if not answer.runs_here:
        raise InvalidRequest([Violation(path=f"{spec.name}: compute", message=answer.why_not_here)])
