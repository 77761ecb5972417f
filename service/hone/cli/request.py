"""The request of a file, as run, plan and submit read it; its errors name the file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hone.errors import InvalidRequest, Violation

if TYPE_CHECKING:
    from hone.spec import JobSpec

EXAMPLE_INPUTS = {
    "examples/data/stdlib": "python examples/make_dataset.py",
    "examples/base/stdlib-4m": "python examples/make_base.py",
}
"""Inputs of the shipped examples → the command that makes them."""


class FileRefused(InvalidRequest):
    """The request of one file breaks rules, or the platform's file does."""

    def __init__(self, subject: str, violations: Sequence[Violation], *, cannot: str = "run") -> None:
        super().__init__(violations)
        self.subject = subject
        self.cannot = cannot


def load(file: Path, overrides: Sequence[str] | None) -> "JobSpec":
    """The request of a file with its overrides. Raises FileRefused with every violation."""
    from hone.spec.parse import load as load_spec

    with about(file):
        return load_spec(file, overrides or ())


def load_all(file: Path, overrides: Sequence[str] | None) -> list["JobSpec"]:
    """The requests of a file, which may be a chain of several. Raises FileRefused with every violation."""
    from hone.spec.parse import load_chain

    if overrides:
        return [load(file, overrides)]
    with about(file):
        return load_chain(file)


@contextmanager
def about(file: Path) -> Iterator[None]:
    """Let errors of the block name the file, and the command that makes an example's missing input."""
    try:
        yield
    except InvalidRequest as error:
        raise FileRefused(file.name, [_with_example(violation) for violation in error.violations]) from error


def _with_example(violation: Violation) -> Violation:
    for directory, command in EXAMPLE_INPUTS.items():
        if isinstance(violation.value, str) and directory in violation.value:
            return replace(violation, message=f"{violation.message} It is made by: {command}")
    return violation
