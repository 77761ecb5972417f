import errno
import json
import signal
from pathlib import Path

import pytest

from hone.errors import IntegrityError, NotFound, StorageError, StorageUnavailable, UserError
from hone.job import FailureClass
from hone.run import FAILURE_CLASSES, RunDirectory, TrainerExit
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
        TrainerExit.STORAGE,
        "/scratch/x cannot be written",
    ),
    "a full disk inside a library": (
        OSError("Error: No space left on device (os error 28)"),
        TrainerExit.STORAGE,
        "disk is full",
    ),
    "a lost peer": (
        RuntimeError("[gloo/transport/tcp] Connection closed by peer"),
        TrainerExit.WORKER_DIED,
        "Another rank",
    ),
    "a wrong request": (UserError("no"), TrainerExit.USER, "no"),
    "a missing object": (NotFound("gone"), TrainerExit.USER, "gone"),
    "refusing storage": (StorageError("denied"), TrainerExit.STORAGE, "denied"),
    "silent storage": (StorageUnavailable("timeout"), TrainerExit.STORAGE, "timeout"),
    "altered bytes": (IntegrityError("altered"), TrainerExit.STORAGE, "altered"),
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
