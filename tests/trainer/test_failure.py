import errno
import json
import signal
from pathlib import Path

import pytest

from hone.errors import IntegrityError, NotFound, StorageError, StorageUnavailable, UserError
from hone.job import FailureClass
from hone.run import FAILURE_CLASSES, NOT_RETRIED, RETRIED_CLASSES, RunDirectory, TrainerExit, first_cause, is_retried
from hone.storage.local import os_errors_as_storage
from hone_trainer.failure import (
    RunFailed,
    classify,
    failure_from_json,
    failure_of,
    failure_to_json,
    log_tail,
    read_error,
    worker_died,
    write_error,
)


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


def full_store() -> BaseException:
    """What the file store raises when its disk is full."""
    try:
        with os_errors_as_storage(Path("/store/x")):
            raise OSError(errno.ENOSPC, "No space left on device")
    except StorageError as error:
        return error


ERRORS: dict[str, tuple[BaseException, TrainerExit, str]] = {
    "the GPU's memory": (
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        TrainerExit.OUT_OF_MEMORY,
        "2 GiB",
    ),
    "the machine's memory": (MemoryError(), TrainerExit.OUT_OF_MEMORY, "Out of memory"),
    "torch's host memory": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        TrainerExit.OUT_OF_MEMORY,
        "9 bytes",
    ),
    "a full disk": (
        OSError(errno.ENOSPC, "No space left", "/scratch/x"),
        TrainerExit.DISK_FULL,
        "/scratch/x cannot be written",
    ),
    "a full disk inside a library": (
        OSError("Error: No space left on device (os error 28)"),
        TrainerExit.DISK_FULL,
        "disk is full",
    ),
    "a lost peer": (
        RuntimeError("[gloo/transport/tcp] Connection closed by peer"),
        TrainerExit.PEER_LOST,
        "Another rank",
    ),
    "a wrong request": (UserError("no"), TrainerExit.USER, "no"),
    "a missing object": (NotFound("gone"), TrainerExit.USER, "gone"),
    "refusing storage": (StorageError("denied"), TrainerExit.STORAGE_REFUSED, "denied"),
    "a full disk below the store": (full_store(), TrainerExit.DISK_FULL, "The disk of"),
    "silent storage": (StorageUnavailable("timeout"), TrainerExit.STORAGE, "timeout"),
    "altered bytes": (IntegrityError("altered"), TrainerExit.INTEGRITY, "altered"),
    "our own verdict": (RunFailed(TrainerExit.DIVERGED, "nan"), TrainerExit.DIVERGED, "nan"),
    "anything else": (KeyError("x"), TrainerExit.INTERNAL, "KeyError: 'x'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_exception_becomes_a_code_and_a_sentence(name: str) -> None:
    error, code, expected = ERRORS[name]
    failed = classify(error)
    assert failed.code == code
    assert expected in failed.message


def test_every_code_but_success_has_a_class() -> None:
    assert set(TrainerExit) - set(FAILURE_CLASSES) == {TrainerExit.SUCCEEDED}


@pytest.mark.parametrize(
    ("code", "again"),
    [
        (TrainerExit.STORAGE, True),
        (TrainerExit.WORKER_DIED, True),
        (TrainerExit.INTERRUPTED, True),
        (TrainerExit.PEERS_MISSING, True),
        (TrainerExit.PEER_LOST, True),
        (TrainerExit.DISK_FULL, False),
        (TrainerExit.STORAGE_REFUSED, False),
        (TrainerExit.INTEGRITY, False),
        (TrainerExit.FENCED, False),
        (TrainerExit.USER, False),
        (TrainerExit.OUT_OF_MEMORY, False),
        (TrainerExit.INTERNAL, False),
    ],
)
def test_another_attempt_follows_only_where_it_may_help(code: TrainerExit, again: bool) -> None:
    assert is_retried(failure_of(RunFailed(code, "x"))) is again


def test_codes_that_are_not_retried_would_be_by_their_class() -> None:
    assert all(FAILURE_CLASSES[code] in RETRIED_CLASSES for code in NOT_RETRIED)


def test_the_first_cause_is_told_before_what_followed_from_it() -> None:
    lost, full = (failure_of(RunFailed(code, "x")) for code in (TrainerExit.PEER_LOST, TrainerExit.DISK_FULL))
    assert first_cause([lost, full, lost]) is full
    assert first_cause([lost]) is lost


def test_a_failure_survives_its_file(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.log(3).parent.mkdir()
    directory.log(3).write_text("\n".join(f"line {number}" for number in range(50)))
    write_error(directory, RunFailed(TrainerExit.DATA, "It is empty.", fix="Fill it."), rank=3)
    failure = read_error(directory, 3)
    assert failure is not None
    assert (failure.failure_class, failure.message, failure.next_step) == (
        FailureClass.DATA,
        "It is empty.",
        "Fill it.",
    )
    assert (failure.rank, failure.exit_code) == (3, 12)
    assert failure.log_tail == tuple(f"line {number}" for number in range(30, 50))
    assert failure_from_json(json.loads(json.dumps(failure_to_json(failure)))) == failure


def test_a_rank_that_said_nothing_has_no_error(tmp_path: Path) -> None:
    assert read_error(RunDirectory(tmp_path), 0) is None
    assert log_tail(tmp_path / "absent") == ()


def test_a_bug_leaves_its_traceback_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("x")
    except KeyError as error:
        assert write_error(RunDirectory(tmp_path), error, rank=0).code == TrainerExit.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_sigkill_is_told_with_its_usual_cause(tmp_path: Path) -> None:
    killed = worker_died(RunDirectory(tmp_path), rank=1, signal_number=signal.SIGKILL)
    assert killed.message == "The worker of rank 1 was killed by SIGKILL."
    assert "dmesg" in killed.next_step
    assert "dmesg" not in worker_died(RunDirectory(tmp_path), rank=1, signal_number=signal.SIGSEGV).next_step


def test_a_failure_without_a_rank_leaves_it_out() -> None:
    assert "rank" not in failure_to_json(failure_of(RunFailed(TrainerExit.FENCED, "x")))
