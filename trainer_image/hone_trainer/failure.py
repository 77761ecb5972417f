"""Why a run ended: one exception that carries an exit code, and the mapping of everybody else's exceptions to it.

The worker and the supervisor both end here; neither imports torch for it, so torch's exceptions are known by name.
"""

import errno
import json
import os
import signal
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hone.errors import HoneError, IntegrityError, InvalidRequest, StorageError, TemporaryError, UserError
from hone.job import Failure, FailureClass
from hone.run import FAILURE_CLASSES, RunDirectory, TrainerExit
from hone_trainer.scrub import Scrubber

LOG_TAIL_LINES = 20
TERMINATION_BYTES = 4096
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
_GPU_FAILED = (
    "uncorrectable ECC",
    "CUDA driver initialization failed",
    "Found no NVIDIA driver",
    "no CUDA-capable device",
    "CUDA-capable device(s) is/are busy or unavailable",
    "GPU is lost",
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class RunFailed(HoneError):
    """The run cannot go on. `code` is the exit code, the text says what happened and the fix."""

    def __init__(self, code: TrainerExit, message: str, *, fix: str = "") -> None:
        self.code = code
        super().__init__(message, fix=fix)


class NothingLeft(RunFailed):
    """No row of a data set can be trained on within the request's lengths."""


def classify(error: BaseException) -> RunFailed:
    """What any exception means for the run."""
    if isinstance(error, RunFailed):
        return error
    if isinstance(error, InvalidRequest):
        return RunFailed(TrainerExit.USER, f"The request is not valid: {'; '.join(map(str, error.violations))}")
    if isinstance(error, HoneError):
        return RunFailed(_code_of(error), error.message, fix=error.fix)
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return RunFailed(TrainerExit.OUT_OF_MEMORY, f"Out of memory: {first_line(error)}", fix=_MEMORY_FIX)
    if _is_lost_peer(error):
        return RunFailed(TrainerExit.PEER_LOST, f"Another rank went away: {first_line(error)}", fix=_PEER_FIX)
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GPU_FAILED):
        return RunFailed(TrainerExit.GPU_FAILED, f"The GPU cannot be used: {first_line(error)}", fix=_GPU_FIX)
    if _is_full_disk(error):
        place = getattr(error, "filename", None)
        what = f"{place} cannot be written" if place else first_line(error)
        return RunFailed(TrainerExit.DISK_FULL, f"The disk is full: {what}.", fix="Free space there, or use another.")
    return RunFailed(
        TrainerExit.INTERNAL,
        f"{type(error).__name__}: {first_line(error)}",
        fix="The rank's log holds the traceback; report it as a bug.",
    )


_MEMORY_FIX = (
    "Lower training.micro_batch_size or method.sft.max_length, or set training.activation_checkpointing to true."
)
_GPU_FIX = "Look at the machine (nvidia-smi, dmesg); another attempt may get another GPU."
_AGAIN = "Run it again; look at the machine's log when it repeats."
_PEER_FIX = "Look at the other ranks' logs and at the machines that they ran on: one of them ended first."


def _code_of(error: HoneError) -> TrainerExit:
    if isinstance(error, UserError):
        return TrainerExit.USER
    if isinstance(error, StorageError):
        return TrainerExit.DISK_FULL if _is_full_disk(error.__cause__) else TrainerExit.STORAGE_REFUSED
    if isinstance(error, IntegrityError):
        return TrainerExit.INTEGRITY
    return TrainerExit.STORAGE if isinstance(error, TemporaryError) else TrainerExit.INTERNAL


def _is_full_disk(error: BaseException | None) -> bool:
    """Libraries written in Rust raise an OSError without a number."""
    return isinstance(error, OSError) and (error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error))


def _is_out_of_memory(error: BaseException) -> bool:
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def _is_lost_peer(error: BaseException) -> bool:
    """A collective that failed because of somebody else: the cause is to be looked for in the other ranks."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)
    )


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def failure_of(error: RunFailed, *, rank: int | None = None, log_tail: tuple[str, ...] = ()) -> Failure:
    """The record that outlives the process."""
    return Failure(
        failure_class=FAILURE_CLASSES[error.code],
        message=error.message,
        next_step=error.fix,
        rank=rank,
        exit_code=int(error.code),
        log_tail=log_tail,
    )


def write_error(directory: RunDirectory, error: BaseException, *, rank: int) -> RunFailed:
    """Leave error-<rank>.json for the supervisor; the traceback goes to the rank's log. Returns what it was
    classified as."""
    failed = classify(error)
    if failed.code == TrainerExit.INTERNAL:
        traceback.print_exception(error)
    write_atomically(directory.error(rank), json.dumps(failure_to_json(failure_of(failed, rank=rank))))
    return failed


def read_error(directory: RunDirectory, rank: int) -> Failure | None:
    """What a worker said before it ended, with the last lines of its log; None when it said nothing."""
    try:
        data = json.loads(directory.error(rank).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return failure_from_json({**data, "log_tail": log_tail(directory.log(rank))})


def worker_died(
    directory: RunDirectory, *, rank: int, signal_number: int, memory_limit_bytes: int | None = None
) -> Failure:
    """The record of a worker that was killed from outside; with the limit, where the kernel did it for want of
    memory."""
    name = signal.Signals(signal_number).name
    if memory_limit_bytes is not None:
        limit = f" of {memory_limit_bytes / 2**30:.1f} GiB" if memory_limit_bytes else ""
        error = RunFailed(
            TrainerExit.OUT_OF_MEMORY,
            f"The kernel killed the worker of rank {rank}: the memory limit{limit} was reached.",
            fix=f"{_MEMORY_FIX} Or let the platform give its pods more memory.",
        )
        return failure_of(error, rank=rank, log_tail=log_tail(directory.log(rank)))
    fix = _AGAIN
    if signal_number == signal.SIGKILL:
        fix = "SIGKILL without a word is often the kernel's out-of-memory killer: look at dmesg, lower the memory need."
    error = RunFailed(TrainerExit.WORKER_DIED, f"The worker of rank {rank} was killed by {name}.", fix=fix)
    return failure_of(error, rank=rank, log_tail=log_tail(directory.log(rank)))


def log_tail(path: Path, *, lines: int = LOG_TAIL_LINES) -> tuple[str, ...]:
    """The last lines of a log; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 32_768))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ()
    return tuple(text.splitlines()[-lines:])


def failure_to_json(failure: Failure) -> dict[str, object]:
    """As exit.json, error-<rank>.json and the termination message hold it: without secrets and absent values."""
    values = {**vars(failure), "failure_class": str(failure.failure_class), "log_tail": list(failure.log_tail)}
    scrubbed = Scrubber(os.environ).value(values)
    return {name: value for name, value in scrubbed.items() if value is not None}


def termination_message(failure: Failure, checkpoint: Mapping[str, object] | None = None) -> bytes:
    """The failure for Kubernetes, which takes so many bytes: the oldest lines of the log go first, then long texts.

    With it the newest event that told of a checkpoint, under that name and with its `seq`: the log of a pod that is
    deleted goes with it, its status is seen before.
    """
    told = {"checkpoint": checkpoint} if checkpoint else {}
    tail = list(failure.log_tail)
    data = _as_message(failure, tail, told)
    while len(data) > TERMINATION_BYTES and tail:
        tail.pop(0)
        data = _as_message(failure, tail, told)
    room = TERMINATION_BYTES // 2
    while len(data) > TERMINATION_BYTES and room:
        room //= 2  # a character may take six bytes
        cut = replace(failure, message=failure.message[:room], next_step=failure.next_step[:room])
        data = _as_message(cut, [], told)
    return data if len(data) <= TERMINATION_BYTES else termination_message(failure)


def _as_message(failure: Failure, tail: list[str], told: Mapping[str, object]) -> bytes:
    record = failure_to_json(replace(failure, log_tail=tuple(tail)))
    return json.dumps({**record, **told}, ensure_ascii=False).encode("utf-8", "replace")


def failure_from_json(data: dict[str, object]) -> Failure:
    """The other way round."""
    known = {**data, "failure_class": FailureClass(str(data["failure_class"]))}
    known["log_tail"] = tuple(data.get("log_tail") or ())  # type: ignore[arg-type]
    return Failure(**known)  # type: ignore[arg-type]


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
