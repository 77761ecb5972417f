"""A listing in parts: how large one is, and the token that the next one is asked for with. Called by jobs.py."""

import hashlib
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from datetime import datetime

from hone.errors import InvalidRequest, Violation
from hone.job import Job

MAX_PAGE_SIZE = 1000


@dataclass(frozen=True, kw_only=True)
class JobPage:
    """A part of a listing."""

    jobs: tuple[Job, ...]
    next_page_token: str = ""
    """Empty at the end."""


def page_size(size: int) -> int:
    """Jobs of one part; 0 asks for the usual. Raises InvalidRequest."""
    if size < 0:
        message = f"{size} is negative; give 1 to {MAX_PAGE_SIZE}, or 0 for the usual."
        raise InvalidRequest([Violation(path="page_size", value=size, message=message)])
    return min(size or 50, MAX_PAGE_SIZE)


def token(last: Job, namespace: str, filter_: str) -> str:
    """What continues a listing after this job."""
    data = [_arguments(namespace, filter_), last.create_time.isoformat(), last.uid]
    return urlsafe_b64encode(json.dumps(data).encode()).decode()


def read_token(token: str, namespace: str, filter_: str) -> tuple[datetime, str]:
    """Time and uid of the last job that was listed. Raises InvalidRequest for a token of another listing."""
    try:
        arguments, time_, uid = json.loads(urlsafe_b64decode(token.encode()))
        after = (datetime.fromisoformat(time_), str(uid))
    except (ValueError, TypeError) as error:
        raise _bad_token(token, "is not a token that a listing gave") from error
    if arguments != _arguments(namespace, filter_):
        raise _bad_token(token, "belongs to a listing with another namespace or filter")
    return after


def _arguments(namespace: str, filter_: str) -> str:
    return hashlib.sha256(json.dumps([namespace, filter_]).encode()).hexdigest()[:16]


def _bad_token(token: str, what: str) -> InvalidRequest:
    message = f"{what}: leave it out to begin again."
    return InvalidRequest([Violation(path="page_token", value=token, message=message)])
