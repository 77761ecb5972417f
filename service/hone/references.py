"""What `job://…` in a request stands for: an output of another job of the same namespace.

Called by jobs.py, which writes the other job's id and the kind of output into the request that it records, and by
steps.py, which waits for that job and hands the trainer the place of its output.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hone.errors import HoneError, InvalidRequest, UserError, Violation
from hone.job import Job, State
from hone.spec import JobSpec, Lora
from hone.spec.sources import sources, with_sources

_FORM = re.compile(r"job://(?P<job>[^/]+)(?:/(?P<kind>[^/]+))?")

Find = Callable[[str], Job | None]
"""The job of an id."""


@dataclass(frozen=True)
class Reference:
    """One output that a request needs."""

    text: str
    """As it stands there: `job://<job>/<kind>`."""
    job: str
    kind: str
    """adapter, merged or model; empty where the request leaves it open."""


def references(spec: JobSpec) -> tuple[Reference, ...]:
    """Every output that a request needs, each once."""
    texts = dict.fromkeys(text for _, text in sources(spec, scheme="job"))
    return tuple(_read(text) for text in texts)


def named(spec: JobSpec, get: Callable[[str], Job]) -> JobSpec:
    """The request with `job://<id>/<kind>` wherever it has a name, or no kind. `get` finds by id or name.

    Raises InvalidRequest with every reference that nothing answers to.
    """
    exact, violations = dict[str, str](), list[Violation]()
    for path, text in sources(spec, scheme="job"):
        try:
            exact[text] = _exact(_read(text), get)
        except HoneError as error:
            violations.append(Violation(path=path, value=text, message=str(error)))
    if violations:
        raise InvalidRequest(violations)
    return with_sources(spec, exact)


def base(source: str, find: Find) -> str:
    """The source of the model that a job started from, as far back as jobs go; any other source itself."""
    while source.startswith("job://"):
        job = find(_read(source).job)
        if job is None:
            raise UserError(f"{source}: there is no such job any more.")
        source = job.resolved_spec.model.source
    return source


def adapter(source: str, find: Find) -> Lora | None:
    """The settings of the adapter that a source names; None where it names none of a job's."""
    if not source.startswith("job://") or _read(source).kind != "adapter":
        return None
    job = find(_read(source).job)
    return job.resolved_spec.adapter.lora if job and job.resolved_spec.adapter else None


def merges_on_4_bits(spec: JobSpec, find: Find) -> bool:
    """Whether a job whose adapter is merged trained it on a base in 4 bits."""
    parts = spec.method.merge.adapters if spec.method.merge else ()
    jobs = (find(_read(part.source).job) for part in parts if part.source.startswith("job://"))
    return any(job is not None and job.resolved_spec.quantization for job in jobs)


def waits_for(spec: JobSpec, find: Find) -> str:
    """Which job has to end first, as a sentence; empty where every output is there. Raises UserError where one will
    never be."""
    for reference in references(spec):
        job = find(reference.job)
        if job is None:
            raise UserError(f"Job {reference.job}, whose {reference.kind} this one needs, was deleted.")
        if state := _in_vain(job):
            raise UserError(f"Job {job.id}, whose {reference.kind} this one needs, is {state}.")
        if job.state != State.SUCCEEDED:
            return f"It waits for the {reference.kind} of job {job.id}, which is {job.state}."
    return ""


def places(spec: JobSpec, find: Find) -> Mapping[str, str]:
    """Where the outputs lie: reference → URI, with those that an adapter among them was trained on in turn.

    Raises UserError where one is not there.
    """
    found: dict[str, str] = {}
    wanted = [reference.text for reference in references(spec)]
    while wanted:
        reference = _read(wanted.pop())
        job = find(reference.job)
        output = next((output for output in job.outputs if output.kind == reference.kind), None) if job else None
        if job is None or output is None:
            raise UserError(f"Nothing is left of {reference.text}, which this job needs.")
        found[reference.text] = output.uri
        source = job.resolved_spec.model.source
        if reference.kind == "adapter" and source.startswith("job://") and source not in found:
            wanted.append(source)
    return found


def _in_vain(job: Job) -> str:
    """What has become of a job that will leave no outputs; empty for any other."""
    if job.delete_time:
        return "being deleted"
    return job.state if job.state in (State.FAILED, State.CANCELLED) else ""


def _read(text: str) -> Reference:
    found = _FORM.fullmatch(text)
    if found is None:
        raise UserError(f"{text!r} is not of the form job://<job> or job://<job>/<adapter, merged or model>.")
    return Reference(text, found["job"], found["kind"] or "")


def _exact(reference: Reference, get: Callable[[str], Job]) -> str:
    job = get(reference.job)
    if state := _in_vain(job):
        raise UserError(f"Job {job.id} is {state}: it leaves no outputs.")
    kinds = list(job.plan.output_bytes)
    if reference.kind and reference.kind not in kinds:
        raise UserError(f"Job {job.id} leaves no {reference.kind}; it leaves {' and '.join(kinds)}.")
    if not reference.kind and len(kinds) > 1:
        raise UserError(f"Job {job.id} leaves {' and '.join(kinds)}: write job://{job.id}/{kinds[0]}, or another.")
    return f"job://{job.id}/{reference.kind or kinds[0]}"
