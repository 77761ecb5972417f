"""Answers as JSON: what `--json` prints. Keys are the field names of hone.job; sizes are bytes, times ISO 8601."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hone.job import Job


def as_data(value: Any) -> Any:
    """Any dataclass of hone.job, or a container of them, as JSON values."""
    from pydantic import TypeAdapter

    from hone.job import Job

    if isinstance(value, Job):
        return _job(value)
    if isinstance(value, (list, tuple)):
        return [as_data(item) for item in value]
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def print_json(value: Any) -> None:
    """One document on stdout, indented."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_json_line(value: Any) -> None:
    """One document on one line: for what comes one after the other."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _job(job: "Job") -> Any:
    from pydantic import TypeAdapter

    from hone.job import Job

    data = TypeAdapter(Job).dump_python(job, mode="json")
    return {**data, "requested_spec": job.requested_spec.to_mapping(), "method": job.method}
