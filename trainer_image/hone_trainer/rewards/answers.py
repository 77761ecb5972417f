"""What a signal sees, and how it says that it has no score."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hone.run import TrainerExit


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to be scored."""

    prompt: str | list[dict[str, Any]]
    """Text, or messages."""
    text: str
    """Without special tokens."""
    num_tokens: int
    """The stop token included."""
    row: Mapping[str, Any]
    """Every column of the row that the prompt came from."""


class SignalFailed(Exception):
    """A signal has no score for some answers; the text goes on from its name."""

    def __init__(self, message: str, *, kind: str = "", code: TrainerExit = TrainerExit.USER, fix: str = "") -> None:
        """`kind`: what is told once only; the message where it is empty."""
        super().__init__(message)
        self.kind, self.code, self.fix = kind or message, code, fix
