"""The trainer's process that answers prompts, as commands see it: started, asked, stopped, and told when it died.

Called by trial.py and conversation.py. Speaks the JSON lines that hone_trainer/answering.py describes; nothing of the
trainer is imported.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hone import errors
from hone.run import TrainerExit

LOG_LINES = 5
_KINDS: Mapping[int, type[errors.HoneError]] = {
    TrainerExit.USER: errors.UserError,
    TrainerExit.DATA: errors.UserError,
    TrainerExit.STORAGE: errors.StorageUnavailable,
    TrainerExit.STORAGE_REFUSED: errors.StorageError,
    TrainerExit.DISK_FULL: errors.StorageError,
    TrainerExit.INTEGRITY: errors.IntegrityError,
    TrainerExit.INTERNAL: errors.InternalError,
}
"""What a failure of the process is here; the rest is a PermanentError."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Somebody who answers."""

    name: str
    kind: str
    """base, adapter, merged or model."""
    chat: bool
    """Whether prompts go through its chat template."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one model said to one prompt."""

    model: str
    text: str
    tokens: int
    ended_by: str
    """stop: by itself; length: after max_new_tokens, or at the end of its context; interrupt: it was stopped."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int | None = None


class Answering:
    """One process, until the end of the block."""

    def __init__(self, python: str, wanted: Mapping[str, Any], *, log: Path, endpoint: str = "") -> None:
        """Start it and wait until everybody is loaded. `wanted` is hone_trainer.trial's; `endpoint` that of S3.

        Raises the HoneError that it ended with.
        """
        self._python, self._log, self._last = python, log, 0
        self._process = self._start(endpoint)
        try:
            self._send(wanted)
            ready = self._receive()["ready"]
        except BaseException:
            self.close()
            raise
        self.models: Sequence[Model] = [Model(**model) for model in ready["models"]]
        self.notes: Sequence[str] = ready["notes"]
        self.device: str = ready["device"]

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; there is nothing that it would have to save."""
        with suppress(BrokenPipeError), self._process:
            self._process.kill()

    @property
    def is_alive(self) -> bool:
        """Whether there is anybody left to ask."""
        return self._process.poll() is None

    def ask(
        self,
        model: str,
        prompt: str,
        *,
        system: str | None,
        sampling: Sampling,
        tell: Callable[[str], None] = lambda _piece: None,
    ) -> Answer:
        """One answer, told in pieces as it comes. Raises UserError for a prompt that the model cannot take, and what
        the process died of."""
        self._last += 1
        told = ""
        self._send({"id": self._last, "model": model, "prompt": prompt, "system": system, **vars(sampling)})
        while True:
            message = self._receive()
            if piece := message.get("piece"):
                told += piece
                tell(piece)
                continue
            answer = Answer(model=model, **message["answer"])
            if answer.text != told:
                tell(answer.text.removeprefix(told))  # the end is in no piece where it is half a character
            return answer

    @contextmanager
    def stopped_by_interrupts(self) -> Iterator[None]:
        """Ctrl-C stops the answer that is being generated, and nothing else, for the length of the block."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            line = json.dumps({"stop": self._last}) + "\n"
            with suppress(OSError):
                os.write(self._stdin.fileno(), line.encode())  # past the buffer, which may be in use

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _start(self, endpoint: str) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, **({"AWS_ENDPOINT_URL_S3": endpoint} if endpoint else {})}
        command = [self._python, "-m", "hone_trainer", "answer"]
        try:
            with self._log.open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # the terminal's Ctrl-C is for the command
                )
        except OSError as error:
            raise self._no_trainer(error.strerror or str(error)) from error
        assert process.stdin and process.stdout
        self._stdin, self._stdout = process.stdin, process.stdout
        return process

    def _send(self, message: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):  # why it ended is read next
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()

    def _receive(self) -> dict[str, Any]:
        line = self._stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        message: dict[str, Any] = json.loads(line)
        if failure := message.get("failure"):
            kind = _KINDS.get(failure.get("exit_code") or 0, errors.PermanentError)
            text = failure["message"]
            if kind is errors.InternalError:
                text = f"{text}{self._last_words()}"
            raise kind(text, fix=failure["next_step"])
        return message

    def _died(self) -> errors.HoneError:
        code = self._process.wait()
        if code < 0:
            name, fix = signal.Signals(-code).name, ""
            if -code == signal.SIGKILL:
                fix = (
                    "SIGKILL without a word is often the kernel's out-of-memory killer: look at dmesg, try fewer jobs."
                )
            return errors.PermanentError(f"The process that answers was killed by {name}.", fix=fix)
        words = self._last_words()
        if "No module named" in words:
            return self._no_trainer(words.strip())
        return errors.InternalError(f"The process that answers ended with {code}.{words}")

    def _no_trainer(self, why: str) -> errors.UserError:
        return errors.UserError(
            f"{self._python} cannot run the trainer, which loads the models: {why}",
            fix=f"Install the extra [trainer] of hone-tuning for {self._python}, or set HONE_TRAINER_PYTHON to a "
            "Python that has it.",
        )

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join(["", *(f"    {line}" for line in lines), ""]) if lines else ""
