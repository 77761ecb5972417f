"""What a trainer left, by its own words, each output with its manifest read back.

Called by steps.py for an attempt that ended well, and by observed.py, which hears no events and reads the record.
"""

import json
from collections.abc import Iterable

from hone.errors import IntegrityError, NotFound
from hone.job import Attempt, Event, Job, Output
from hone.run import spec_hash
from hone.spec import JobSpec
from hone.storage import ArtifactStore, JobLayout, read_manifest
from hone.store import output_of


def promised_outputs(artifacts: ArtifactStore, job: Job, attempt: Attempt, told: Iterable[Event]) -> tuple[Output, ...]:
    """Every promised output, as its event told of it; as the record does where the event went with its pod.

    Raises NotFound and IntegrityError for one that is not there as promised, and what is wrong with the store.
    """
    layout, events = JobLayout(job.namespace, job.id), {event.fields.get("kind", ""): event for event in told}
    recorded: dict[str, Output] = {}
    if job.plan.output_bytes.keys() - events.keys():
        recorded = recorded_outputs(artifacts, layout, job.resolved_spec, attempt=attempt.number)
    found = []
    for kind in job.plan.output_bytes:
        if kind in events:
            fields = events[kind].fields
            read_manifest(artifacts, layout.output(fields.get("place", kind)), digest=fields["sha256"])
            found.append(output_of(events[kind]))
        elif kind in recorded:
            found.append(recorded[kind])
        else:
            raise NotFound(f"The trainer ended well without its output {kind!r}.")
    return tuple(found)


def push_sentence(told: Iterable[Event]) -> str:
    """What the attempt said of its push to the Hub; empty where none was asked for."""
    return next((event.message for event in reversed(list(told)) if "hub" in event.fields), "")


def recorded_outputs(
    artifacts: ArtifactStore, layout: JobLayout, spec: JobSpec, *, attempt: int | None = None
) -> dict[str, Output]:
    """Outputs by kind, each with its manifest read back; none where the record is of another request or attempt.

    Raises NotFound and IntegrityError for one that is not there as written down, and what is wrong with the store.
    """
    try:
        data = artifacts.get_bytes(layout.result)
    except NotFound:
        return {}
    try:
        result = json.loads(data)
        if result["spec_hash"] != spec_hash(spec) or (attempt is not None and result["attempt"] != attempt):
            return {}
        found = [
            (
                str(described["place"]),
                Output(
                    kind=kind,
                    uri=str(described["uri"]),
                    size_bytes=int(described["size_bytes"]),
                    sha256=str(described["sha256"]),
                    attempt=int(result["attempt"]),
                ),
            )
            for kind, described in result["outputs"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # whoever may write there may write anything
        raise IntegrityError(f"{artifacts.url(layout.result)} is no record of a run: {error!r}") from error
    for place, output in found:
        read_manifest(artifacts, layout.output(place), digest=output.sha256)
    return {output.kind: output for _, output in found}
