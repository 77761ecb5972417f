"""Failures that nobody but the service can tell of, in words. Called by steps.py."""

from dataclasses import replace

from hone.errors import UserError
from hone.job import Attempt, Failure, FailureClass


def lost(attempt: Attempt) -> Failure:
    """It ran, and nothing is left of it: it must not be started a second time under its number."""
    return Failure(
        failure_class=FailureClass.INFRA,
        message=f"Nothing is left of attempt {attempt.number}, which had started: somebody removed it.",
        next_step="Submit it again.",
    )


def too_late(failure: Failure, deadline_s: int | None) -> Failure:
    """It was stopped, because its time was over; `failure` is what it ended with."""
    return replace(
        failure,
        failure_class=FailureClass.USER,
        message=f"The attempt was stopped at its deadline of {deadline_s} s (scheduling.deadline).",
        next_step="Raise scheduling.deadline, or make the run shorter.",
    )


def input_missing(error: UserError) -> Failure:
    """Another job does not leave what this one starts from."""
    return Failure(
        failure_class=FailureClass.USER,
        message=str(error),
        next_step="Run that job again, then submit this one with its new id.",
    )


def unproven(error: Exception) -> Failure:
    """The trainer said that it had succeeded, and the store says something else."""
    return Failure(
        failure_class=FailureClass.INFRA,
        message=f"The trainer ended well, but its outputs cannot be read back: {error}",
        next_step="Look at the artefact store; nothing of this job counts as complete.",
    )
