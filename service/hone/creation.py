"""A job that a caller wants recorded: its names, checked, and what makes two requests the same. Called by jobs.py."""

import hashlib
import json
import re
import secrets
from dataclasses import dataclass

from hone.errors import InvalidRequest, Violation
from hone.job import Job
from hone.remembered import Remembered
from hone.spec import JobSpec
from hone.store import Request

MAX_ID_LENGTH = 50
"""A pod's host name has 63 characters, and says rank and attempt too."""
_ID_LETTERS = "bcdfghjkmnpqrstvwxz23456789"
"""No vowels, so that no words come about; nothing that looks like something else."""
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Creation:
    """A job that a caller wants recorded."""

    namespace: str
    spec: JobSpec
    job_id: str = ""
    """Chosen by the caller; absent, the name and five characters."""
    request_id: str = ""
    """The same one and the same body give the same job."""
    validate_only: bool = False
    """Check everything and record nothing."""
    creator: str = ""


@dataclass(frozen=True)
class Prepared:
    """A job that is checked, and not recorded yet."""

    job: Job
    request: Request | None


def new_suffix() -> str:
    """Five characters that make a name an id."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(5))


def check_creation(creation: Creation) -> Request | None:
    """The caller's names. Raises InvalidRequest."""
    _check_label("namespace", creation.namespace, 63)
    if creation.job_id:
        _check_label("job_id", creation.job_id, MAX_ID_LENGTH)
    return _request(creation.request_id, creation.spec, creation.job_id)


def _check_label(path: str, value: str, longest: int) -> None:
    if len(value) > longest or not _DNS_LABEL.fullmatch(value):
        message = f"{value!r} is not one: lower-case letters, digits and hyphens, at most {longest}."
        raise InvalidRequest([Violation(path=path, value=value, message=message)])


def _request(request_id: str, spec: JobSpec, job_id: str) -> Request | None:
    if not request_id:
        return None
    if len(request_id) > 128:
        message = f"has {len(request_id)} characters; at most 128 are kept. A UUID has 36."
        raise InvalidRequest([Violation(path="request_id", value=request_id[:40], message=message)])
    body = json.dumps([_body(spec), job_id])
    return Request(request_id, hashlib.sha256(body.encode()).hexdigest())


def _make_body(spec: JobSpec) -> str:
    labels = sorted(spec.labels.items())  # the wire keeps no order of them
    return json.dumps([spec.model_dump_json(exclude={"labels"}, exclude_unset=True), labels])


_body = Remembered[JobSpec, str](_make_body)
