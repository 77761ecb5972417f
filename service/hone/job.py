"""What Hone answers: jobs, attempts, events, plans, failures. Frozen dataclasses; nothing here does anything.

Sizes are integer bytes, times are aware datetimes in UTC, durations are seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from hone.spec import JobSpec


class State(StrEnum):
    """Where a job stands."""

    PENDING = "PENDING"
    """Recorded; the backend has not been asked yet, or another job is waited for."""
    QUEUED = "QUEUED"
    """The backend has it and has no room yet."""
    RUNNING = "RUNNING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    """Every promised output is there and its manifest was read back."""
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        """Whether the state never changes again."""
        return self in TERMINAL


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

_LIVE = (State.PENDING, State.QUEUED, State.RUNNING)
TRANSITIONS: Mapping[tuple[State, State], str] = {
    (State.PENDING, State.QUEUED): "the backend took it and has no room yet",
    (State.PENDING, State.RUNNING): "the backend started it",
    (State.QUEUED, State.RUNNING): "room was found",
    (State.QUEUED, State.PENDING): "the attempt ended before it ran; another follows",
    (State.RUNNING, State.PENDING): "the attempt ended for the machine's reasons; another follows",
    (State.RUNNING, State.QUEUED): "the backend took the machine away and keeps the job",
    (State.RUNNING, State.SUCCEEDED): "every promised output was read back",
    (State.QUEUED, State.SUCCEEDED): "it ran and ended between two looks",
    (State.PENDING, State.SUCCEEDED): "it ran and ended between two looks",
    **{(state, State.FAILED): "the attempt failed for good" for state in _LIVE},
    **{(state, State.CANCELLING): "a caller cancelled it" for state in (*_LIVE, State.PAUSING, State.PAUSED)},
    (State.CANCELLING, State.CANCELLED): "nothing of it runs any more",
    (State.CANCELLING, State.SUCCEEDED): "it had finished before the cancellation reached it",
    **{(state, State.PAUSING): "a caller paused it" for state in _LIVE},
    (State.PENDING, State.PAUSED): "a caller paused it while nothing of it ran",
    (State.PAUSING, State.PAUSED): "nothing of it runs any more",
    (State.PAUSING, State.SUCCEEDED): "it had finished before the pause reached it",
    (State.PAUSING, State.FAILED): "it failed before the pause reached it",
    (State.PAUSED, State.PENDING): "a caller resumed it",
}
"""Every change of state that can be, with its cause. What is not listed is a bug and is refused by the store."""


class FailureClass(StrEnum):
    """Whose turn it is."""

    USER = "USER"
    """The request asks for something that cannot work."""
    DATA = "DATA"
    """The data set is at fault."""
    OOM = "OOM"
    """Out of memory: the GPU's, or the machine's."""
    PREEMPTED = "PREEMPTED"
    """The machine was taken away."""
    INFRA = "INFRA"
    """The machine, the network or the store failed."""
    INTERNAL = "INTERNAL"
    """A bug of Hone's."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an attempt or a job failed; outlives the process and its pod."""

    failure_class: FailureClass
    message: str
    """One sentence: what happened, where, with its value."""
    next_step: str = ""
    """What the reader should do."""
    rank: int | None = None
    """First rank that failed."""
    exit_code: int | None = None
    log_tail: tuple[str, ...] = ()
    """Last lines of that rank's log."""


LOST_AFTER = "lost_after"
"""Field of a warning that stands for events that were lost: the number of the last one before them."""


class EventType(StrEnum):
    """Kinds of events; new ones may come, readers pass over what they do not know."""

    STATE = "state"
    """The job's state changed; fields.state, fields.reason."""
    PHASE = "phase"
    """The trainer entered a phase; fields.phase is loading, data, model, training, evaluation, saving, uploading,
    pushing."""
    PROGRESS = "progress"
    """A training step; metrics.loss, learning_rate, grad_norm, tokens_per_second, eta_s, epoch, max_steps, …"""
    EVAL = "eval"
    """An evaluation; metrics.eval_loss, …"""
    SAMPLE = "sample"
    """One answer; fields.when is before, during or after, fields.prompt, fields.answer, fields.expected."""
    DATA = "data"
    """The data report: rows, dropped and truncated rows and tokens, packing fill."""
    OUTPUT = "output"
    """An output is complete; fields.kind, uri, size_bytes, sha256 (of its manifest)."""
    CHECKPOINT = "checkpoint"
    """A checkpoint is complete; step, fields.place (below the job's root), uri, size_bytes, sha256 (of its manifest),
    removes (places that are deleted now, separated by spaces)."""
    NOTE = "note"
    """Something worth knowing; fields.hub, url, commit, … of a push to the Hub."""
    WARNING = "warning"
    """Supported, but unwise; or something was dropped. With fields.hub and error: a push to the Hub that failed."""
    FAILURE = "failure"
    """An attempt failed; fields as in Failure."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One small record, the same on the wire, in SQL, on stdout and in metrics.jsonl."""

    seq: int
    """Position in the namespace's history, from 1, in order of commit. In an attempt's own file: the line's number."""
    time: datetime
    type: str
    message: str = ""
    job: str = ""
    """Id of the job; empty inside an attempt's own file."""
    attempt: int = 0
    """Number of the attempt, from 1; 0 for what concerns the job as a whole."""
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One reported number."""

    step: int
    """Optimizer step, from 1; 0 before the first."""
    value: float
    time: datetime
    attempt: int
    """Number of the attempt that reported it."""


@dataclass(frozen=True, kw_only=True)
class MetricSeries:
    """Everything that was reported under one name, in order of report."""

    name: str
    """loss, eval_loss, learning_rate, …"""
    points: tuple[Point, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the current attempt is; absent where nothing was reported yet."""

    step: int = 0
    max_steps: int = 0
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    eta_s: float | None = None
    phase: str = ""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One directory that the job left in the artefact store."""

    kind: str
    """adapter, merged or model."""
    uri: str
    size_bytes: int
    sha256: str
    """Digest of its MANIFEST.json, which lists every file with its own."""
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A state in the artefact store that a later attempt of the job can go on from."""

    step: int
    """Optimizer step after which it was taken."""
    place: str
    """Below the job's root: `attempt-1/checkpoints/step-000010`."""
    uri: str
    size_bytes: int
    sha256: str
    """Digest of its MANIFEST.json, which lists every file with its own; nothing else is opened."""
    attempt: int
    """Number of the attempt that made it."""
    time: datetime
    complete: bool
    """Whether it is all there; false once it was removed for newer ones (training.checkpoint.keep)."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One set of processes that ran, or runs, the job."""

    number: int
    """From 1."""
    nonce: str
    """Random; stored before anything is started, so that nothing else can be taken for this attempt."""
    state: State
    """PENDING, QUEUED, RUNNING, SUCCEEDED, FAILED or CANCELLED; also a pause cancels the attempt, never the job."""
    create_time: datetime
    start_time: datetime | None = None
    end_time: datetime | None = None
    failure: Failure | None = None
    counted: bool = True
    """Whether it counts against scheduling.max_attempts; one that was disrupted or paused does not."""
    gpus: int = 0

    def gpu_seconds(self, now: datetime) -> float:
        """GPUs × seconds between start and end, or now."""
        return self.gpus * ((self.end_time or now) - self.start_time).total_seconds() if self.start_time else 0.0


@dataclass(frozen=True, kw_only=True)
class MemoryItem:
    """One line of the memory breakdown of one device."""

    name: str
    """weights, quantization, adapter, gradients, optimizer, activations, logits, context, …"""
    size_bytes: int
    formula: str
    """How the figure comes about, with its numbers."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the trainer's processes are started; what backends and the trainer act on."""

    launcher: str
    """direct (one process), or accelerate."""
    strategy: str
    """none (one process), ddp, zero2 or zero3."""
    device: str
    """cuda or cpu."""
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    precision: str
    """bf16 or fp32, decided."""
    micro_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    threads_per_process: int = 0
    """CPU threads of each process; 0 leaves it to torch."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.processes_per_node

    @property
    def is_sharded(self) -> bool:
        """Whether processes share optimizer states and gradients, and under ZeRO-3 weights too."""
        return self.strategy in ("zero2", "zero3")

    @property
    def global_batch_size(self) -> int:
        """Rows in one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A change of the request that would fit."""

    change: str
    """What to change, as a sentence or settings."""
    gpu: str
    gpus: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would run, and whether it fits; made by plan.py from spec, model shape and hardware alone."""

    fits: bool
    sentence: str
    """The answer first: fits on what, at which peak, or why not."""
    gpu: str
    """Name of the GPU profile; empty on a CPU."""
    launch: Launch
    memory: tuple[MemoryItem, ...]
    """Breakdown of one device; the sizes sum to peak_bytes."""
    peak_bytes: int
    capacity_bytes: int
    """Memory of one device that can be used."""
    host_memory_bytes: int
    """Memory of one machine that loading, training and saving need."""
    disk_bytes: int
    """Scratch space of one machine."""
    output_bytes: Mapping[str, int]
    """Size of each output by its kind."""
    model_family: str
    parameters: int
    trainable_parameters: int
    max_steps: int | None = None
    """Optimizer steps, where the request fixes them; else decided by the data."""
    step_flops: float | None = None
    """FLOPs of one optimizer step on all devices together; None where they are not known beforehand."""
    seconds_low: float | None = None
    seconds_high: float | None = None
    """Expected range of the run time, where steps are known."""
    notes: tuple[str, ...] = ()
    """What the reader should know: what was decided for them, what is estimated."""
    warnings: tuple[str, ...] = ()
    """Supported, but unwise; each with its fix."""
    alternatives: tuple[Alternative, ...] = ()
    """The smallest changes that fit, when this does not."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request and everything that became of it."""

    namespace: str
    id: str
    uid: str
    """Unique for ever; ids are not used again either."""
    requested_spec: JobSpec
    """As it was asked."""
    resolved_spec: JobSpec
    """With every open choice decided."""
    plan: Plan
    state: State
    state_reason: str
    """Why it is where it is: one sentence that a person can act on."""
    creator: str
    create_time: datetime
    update_time: datetime
    version: int
    """Raised by every change of this record."""
    start_time: datetime | None = None
    end_time: datetime | None = None
    delete_time: datetime | None = None
    """When deletion was asked for; the job goes when it is done."""
    attempts: tuple[Attempt, ...] = ()
    progress: Progress | None = None
    outputs: tuple[Output, ...] = ()
    failure: Failure | None = None
    observed: bool = False
    """Somebody started it past the service (kubectl): it is shown, and never managed."""

    @property
    def method(self) -> str:
        """sft, dpo, …"""
        return self.requested_spec.method.name
