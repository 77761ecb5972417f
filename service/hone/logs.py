"""The service's own log: lines for people, or JSON for machines; each says which namespace and job it is about.

Called by whoever starts a service. Whoever works for a job says so once (`about`), and every line below it has it.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

about_now: ContextVar[str] = ContextVar("about_now", default="")
"""Resource name of what is being worked on: `namespaces/team-a/jobs/sft-1`, or less of it, or nothing."""


@contextmanager
def about(namespace: str, job: str) -> Iterator[None]:
    """What is logged in the block is about this job."""
    token = about_now.set(f"namespaces/{namespace}/jobs/{job}")
    try:
        yield
    finally:
        about_now.reset(token)


def configure(level: str, *, as_json: bool, stream: TextIO | None = None) -> None:
    """Log to stderr from now on: hone's own from `level` up, everybody else's warnings."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if as_json else _Text())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("hone").setLevel(level.upper())


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        namespace, job = _subject()
        where = f"{namespace}/{job}" if job else namespace
        return f"{text} [{where}]" if where else text


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        namespace, job = _subject()
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "namespace": namespace,
            "job": job,
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _subject() -> tuple[str, str]:
    """Namespace and job of what is being worked on."""
    parts = about_now.get().split("/")
    return (parts[1] if len(parts) > 1 else ""), (parts[3] if len(parts) > 3 else "")
