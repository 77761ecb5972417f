"""What an attempt is handed and what it leaves: the run file, the files of its directory, its exit codes.

The one contract between backends (which write the run file and read the rest) and the trainer (the other way round).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hone.errors import InvalidRequest, Violation
from hone.job import FailureClass, Launch
from hone.spec import SCHEMA_VERSION, JobSpec


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that one attempt needs to know; written as YAML, at most 64 KiB."""

    namespace: str
    job: str
    attempt: int
    nonce: str
    spec: JobSpec
    """The resolved request."""
    launch: Launch
    store: str
    """Root of the artefact store: `file:///…` or `s3://…`."""
    inputs: Mapping[str, str]
    """What every `job://…` of the spec stands for: reference → URI in the store."""
    schema_version: int = SCHEMA_VERSION

    def to_yaml(self) -> str:
        """The run file."""
        data = _adapter().dump_python(self, mode="json", exclude_none=True)
        return yaml.safe_dump({**data, "spec": self.spec.to_mapping()}, sort_keys=False, allow_unicode=True)

    @staticmethod
    def from_yaml(text: str) -> "Run":
        """Read a run file. Raises InvalidRequest when it is not one, or of a newer schema than this trainer knows."""
        data = yaml.safe_load(text)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise _refused(
                "schema_version", version, f"this trainer knows schemas up to {SCHEMA_VERSION}: use its image"
            )
        try:
            return _adapter().validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            raise _refused(path, first.get("input"), f"the run file is not valid: {first['msg']}") from error


@lru_cache
def _adapter() -> TypeAdapter[Run]:
    return TypeAdapter(Run)


def _refused(path: str, value: Any, message: str) -> InvalidRequest:
    return InvalidRequest([Violation(path=path, value=value, message=message)])


class TrainerExit(IntEnum):
    """Exit codes of `python -m hone_trainer`; docs/exit-codes.md lists them, and a test compares."""

    SUCCEEDED = 0
    INTERNAL = 10
    """A bug, or something nobody foresaw."""
    USER = 11
    """The request cannot work: wrong target modules, unknown architecture, pickle weights, …"""
    DATA = 12
    """The data set is at fault: empty, a row without text, nothing left to learn, …"""
    OUT_OF_MEMORY = 13
    WRONG_WORLD = 14
    """The launcher did not start the processes that were planned."""
    STORAGE = 15
    """The artefact store refused or did not answer."""
    DIVERGED = 16
    """The loss is not a number."""
    INTERRUPTED = 17
    """SIGTERM: stopped on request."""
    FENCED = 18
    """A newer attempt owns the job; this one may not write."""
    ALREADY_RAN = 19
    """The same attempt runs, or ran, in this directory."""
    WORKER_DIED = 20
    """A worker was killed from outside."""


FAILURE_CLASSES: Mapping[TrainerExit, FailureClass] = {
    TrainerExit.INTERNAL: FailureClass.INTERNAL,
    TrainerExit.USER: FailureClass.USER,
    TrainerExit.DATA: FailureClass.DATA,
    TrainerExit.OUT_OF_MEMORY: FailureClass.OOM,
    TrainerExit.WRONG_WORLD: FailureClass.INTERNAL,
    TrainerExit.STORAGE: FailureClass.INFRA,
    TrainerExit.DIVERGED: FailureClass.USER,
    TrainerExit.INTERRUPTED: FailureClass.PREEMPTED,
    TrainerExit.FENCED: FailureClass.INFRA,
    TrainerExit.ALREADY_RAN: FailureClass.INTERNAL,
    TrainerExit.WORKER_DIED: FailureClass.INFRA,
}


@dataclass(frozen=True)
class RunDirectory:
    """Files of one attempt on the machine that runs it."""

    path: Path

    @property
    def run_file(self) -> Path:
        """Written by the backend, read once by the trainer."""
        return self.path / "run.yaml"

    @property
    def lock(self) -> Path:
        """Held (flock) by the trainer while it lives; a second trainer in this directory gives up at once."""
        return self.path / "run.lock"

    @property
    def process(self) -> Path:
        """JSON {pid, start_time, nonce}: written by the trainer as soon as it holds the lock."""
        return self.path / "process.json"

    @property
    def events(self) -> Path:
        """One event a line; appended only, each line by one write. An event's seq is its line number, from 1."""
        return self.path / "events.jsonl"

    @property
    def exit(self) -> Path:
        """JSON {exit_code, failure, end_time}: written last and atomically; absent when the trainer was killed."""
        return self.path / "exit.json"

    @property
    def scratch(self) -> Path:
        """Working files of the trainer: checkpoints in the making, outputs before they are uploaded."""
        return self.path / "scratch"

    def log(self, rank: int) -> Path:
        """What one rank wrote to stdout and stderr."""
        return self.path / "logs" / f"rank-{rank}.log"

    @property
    def trainer_log(self) -> Path:
        """What the trainer's own process wrote to stdout and stderr."""
        return self.path / "logs" / "trainer.log"

    def error(self, rank: int) -> Path:
        """JSON of a Failure that a worker wrote before it died."""
        return self.path / f"error-{rank}.json"
