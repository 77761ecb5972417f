"""Questions to the trainer's Python: `python -m hone_trainer COMMAND FILE`, which answers with one JSON object.

Asked by commands of a person (`hone data`, `hone plan`, `hone calibrate`), and by the local backend for PreflightJob.
The control plane imports none of the trainer's libraries: another process does, which may be another installation.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hone.errors import PermanentError


class CannotAsk(PermanentError):
    """The trainer cannot be asked."""

    reason = "TRAINER_FAILED"


class TrainerProcess:
    """Asks, each time in a process of its own. Safe to use from several threads."""

    def __init__(self, python: str = "", environment: Mapping[str, str] | None = None) -> None:
        """`python` is the one that runs this, where none is named; `environment` is this process's own."""
        self._python = python or sys.executable
        self._environment = environment
        self._lock = threading.Lock()
        self._running = set[subprocess.Popen[str]]()
        self._is_closed = False

    def ask(self, command: str, text: str, *options: str, timeout_s: float | None = None) -> dict[str, Any]:
        """What the command says of a request or a run file with this text. Raises CannotAsk."""
        with tempfile.TemporaryDirectory(prefix="hone-ask-") as directory:
            file = Path(directory) / "request.yaml"
            file.write_text(text, encoding="utf-8")
            # -m looks into the working directory first, so that is one where nobody leaves modules.
            words = [self._python, "-m", "hone_trainer", command, str(file), *options]
            return self._answer(words, directory, timeout_s)

    def close(self) -> None:
        """End what is being asked."""
        with self._lock:
            self._is_closed = True
            for process in self._running:
                process.kill()

    def _answer(self, words: list[str], directory: str, timeout_s: float | None) -> dict[str, Any]:
        process = self._start(words, directory)
        try:
            said, complaints = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise CannotAsk(f"The trainer in {self._python} gave no answer within {timeout_s:.0f} s.") from error
        finally:
            process.kill()
            process.wait()
            with self._lock:
                self._running.discard(process)
        try:
            answer: dict[str, Any] = json.loads(said.splitlines()[-1])
        except (ValueError, IndexError) as error:
            last = next((line for line in reversed(complaints.splitlines()) if line.strip()), "it said nothing")
            raise CannotAsk(
                f"The trainer in {self._python} ended with code {process.returncode}: {last}",
                fix="`hone doctor` says what is missing there.",
            ) from error
        return answer

    def _start(self, words: list[str], directory: str) -> "subprocess.Popen[str]":
        with self._lock:
            if self._is_closed:
                raise CannotAsk("The service is ending.")
            try:
                process = subprocess.Popen(
                    words,
                    cwd=directory,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            except OSError as error:
                message = f"The trainer cannot be started with {self._python}: {error.strerror or error}."
                raise CannotAsk(message, fix="Set HONE_TRAINER_PYTHON to a Python that has it.") from error
            self._running.add(process)
            return process
