"""What an attempt is handed and what it leaves: the run file, the files of its directory, its exit codes.

The one contract between backends (which write the run file and read the rest) and the trainer (the other way round).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hone.errors import InvalidRequest, Violation
from hone.job import Attempt, Failure, FailureClass, Job, Launch
from hone.spec import SCHEMA_VERSION, JobSpec
from hone.spec.faults import faults

ENV_PYTHON_REWARDS = "HONE_PYTHON_REWARDS"
"""Variable of a trainer: 1 where the platform lets a request's own functions (rewards.python) run in it."""
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's where it is there, which the wheels bring: four times as fast, and every job is written twice."""


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A checkpoint of an earlier attempt, as the service recorded it."""

    step: int
    place: str
    """Below the job's root: `attempt-1/checkpoints/step-000010`."""
    sha256: str
    """Digest of its manifest: what is in the store is opened only when it is that, because a checkpoint holds
    pickles."""


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
    resume: tuple[ResumePoint, ...] = ()
    """Checkpoints to go on from, the newest first."""
    schema_version: int = SCHEMA_VERSION

    @staticmethod
    def of(
        job: Job,
        attempt: Attempt,
        *,
        store: str,
        inputs: Mapping[str, str] | None = None,
        resume: Sequence[ResumePoint] = (),
    ) -> "Run":
        """An attempt of a job, as it is recorded; `inputs` and `resume` are needed to start it only."""
        return Run(
            namespace=job.namespace,
            job=job.id,
            attempt=attempt.number,
            nonce=attempt.nonce,
            spec=job.resolved_spec,
            launch=job.plan.launch,
            store=store,
            inputs=inputs or {},
            resume=tuple(resume),
        )

    def to_yaml(self) -> str:
        """The run file."""
        data = _adapter().dump_python(self, mode="json", exclude_none=True)
        if not self.resume:  # most have none; a trainer of before knows no such field
            del data["resume"]
        data["spec"] = self.spec.to_mapping()
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    @staticmethod
    def from_yaml(text: str) -> "Run":
        """Read a run file. Raises InvalidRequest when it is not one, or of a newer schema than this trainer knows."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            said = " ".join(str(error).split())
            raise _refused("", None, f"the run file is not valid YAML: {said}") from error
        if not isinstance(data, dict):
            raise _refused("", None, "the run file is not valid: it holds no mapping")
        version = data.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise _refused(
                "schema_version", version, f"this trainer knows schemas up to {SCHEMA_VERSION}: use its image"
            )
        try:
            return _adapter().validate_python({**data, "spec": _read_spec(data.get("spec"))})
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            raise _refused(path, first.get("input"), f"the run file is not valid: {first['msg']}") from error


def spec_hash(spec: JobSpec) -> str:
    """SHA-256 of a request in canonical form: equal for equal requests, however they were written."""
    text = json.dumps(spec.to_mapping(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_spec(data: Any) -> JobSpec:
    """Not parse(): rules for what may be asked are not rules for what was decided."""
    try:
        return JobSpec.model_validate(data)
    except ValidationError as error:
        found = faults(error, JobSpec)
        raise InvalidRequest([replace(fault, path=f"spec.{fault.path}".rstrip(".")) for fault in found]) from error


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
    """The artefact store or the Hub did not answer, or asked to slow down."""
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
    DISK_FULL = 21
    """A disk of this machine, or the one below the artefact store, is full."""
    STORAGE_REFUSED = 22
    """The artefact store refuses: wrong credentials, no such bucket, no right."""
    INTEGRITY = 23
    """Bytes are not what was promised: an input does not fit its manifest, an output is not what was trained."""
    PEERS_MISSING = 24
    """Not every node of the run came before the rendezvous deadline."""
    PEER_LOST = 25
    """Another rank or node went away; that one has the reason."""
    GPU_FAILED = 26
    """A GPU that was planned cannot be used: none is to be seen, or its driver or its memory fails."""


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
    TrainerExit.DISK_FULL: FailureClass.INFRA,
    TrainerExit.STORAGE_REFUSED: FailureClass.INFRA,
    TrainerExit.INTEGRITY: FailureClass.INFRA,
    TrainerExit.PEERS_MISSING: FailureClass.INFRA,
    TrainerExit.PEER_LOST: FailureClass.INFRA,
    TrainerExit.GPU_FAILED: FailureClass.INFRA,
}

RETRIED_CLASSES = frozenset({FailureClass.INFRA, FailureClass.PREEMPTED})
"""Failures after which another attempt may help."""
NOT_RETRIED = frozenset({TrainerExit.FENCED, TrainerExit.DISK_FULL, TrainerExit.STORAGE_REFUSED, TrainerExit.INTEGRITY})
"""Of these classes, but the next attempt would meet the same: a person has to look first."""
FOLLOW_UPS = frozenset({TrainerExit.PEER_LOST})
"""Only say that somebody else ended."""


def is_retried(failure: Failure) -> bool:
    """Whether another attempt may help: by class, unless the trainer's own code says that it would end the same way."""
    return failure.failure_class in RETRIED_CLASSES and failure.exit_code not in NOT_RETRIED


def first_cause(failures: Sequence[Failure]) -> Failure:
    """Why a run of several nodes ended, of what its nodes said in order of time: the first that is no follow-up."""
    return next((failure for failure in failures if failure.exit_code not in FOLLOW_UPS), failures[0])


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

    @property
    def checkpoints(self) -> Path:
        """Checkpoints that are complete and not in the store yet, `step-NNNNNN` each."""
        return self.scratch / "checkpoints"

    @property
    def resume(self) -> Path:
        """The checkpoint that the run goes on from; absent where it starts from the beginning."""
        return self.scratch / "resume"

    def log(self, rank: int) -> Path:
        """What one rank wrote to stdout and stderr."""
        return self.path / "logs" / f"rank-{rank}.log"

    @property
    def trainer_log(self) -> Path:
        """What the trainer's own process wrote to stdout and stderr."""
        return self.path / "logs" / "trainer.log"

    @property
    def trackers(self) -> Path:
        """What TensorBoard, MLflow and Weights & Biases write, a directory for each."""
        return self.path / "trackers"

    @property
    def trackers_log(self) -> Path:
        """What their libraries print."""
        return self.path / "logs" / "trackers.log"

    def error(self, rank: int) -> Path:
        """JSON of a Failure that a worker wrote before it died."""
        return self.path / f"error-{rank}.json"
