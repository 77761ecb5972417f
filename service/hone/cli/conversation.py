"""The prompt of `hone try`: each line is asked of all active models, and commands begin with a slash.

Called by trial.py. Lines are edited by prompt_toolkit; the history is kept in HONE_HOME.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.table import Table

from hone.cli.answering import Answering, Model, Sampling
from hone.cli.console import answers, remarks
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode
from hone.cli.replies import ending, printable, replies_table, reply, system_for
from hone.errors import HoneError, UserError

HISTORY = "try-history"
COMMANDS: Mapping[str, tuple[str, str]] = {
    "/use": ("NAME…", "who answers from here on; without names, everybody"),
    "/models": ("", "who is there"),
    "/system": ("TEXT", "the system prompt of chat models; without text, none"),
    "/help": ("", "this"),
    "/quit": ("", "end, as Ctrl-D does"),
}
"""What each takes and does."""
_HELP = """\
A line is asked of everybody who is active. Alt-Enter begins another line of the same prompt, and a prompt that begins
with a slash is written with two. Ctrl-C stops the answer that is being generated."""


class Conversation:
    """Reads lines until there are no more."""

    def __init__(self, answering: Answering, sampling: Sampling, *, system: str | None) -> None:
        self._answering, self._sampling, self._system = answering, sampling, system
        self._active: Sequence[Model] = answering.models
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/use": self._use,
            "/models": self._show_models,
            "/system": self._set_system,
            "/help": self._help,
        }

    def run(self) -> ExitCode:
        """From the first line to /quit or Ctrl-D."""
        names = [model.name for model in self._answering.models]
        session: PromptSession[str] = PromptSession(
            history=open_history(read_settings().home),
            completer=Names(names),
            complete_while_typing=False,
            key_bindings=_keys(),
        )
        answers().print(f"{', '.join(names)} on {self._answering.device}. /help shows the commands, Ctrl-D ends.")
        while True:
            try:
                line = session.prompt("> ")
                if line.strip() == "/quit":
                    return ExitCode.DONE
                if line.strip():
                    self._take(line)
            except KeyboardInterrupt:  # the line was given up, or there was no answer left to stop
                continue
            except EOFError:
                return ExitCode.DONE

    def _take(self, line: str) -> None:
        """One line; what is wrong with it is said and ends nothing."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                word, _, rest = line.strip().partition(" ")
                self._command(word)(rest.strip())
            else:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except HoneError as error:
            if not self._answering.is_alive:
                raise
            remarks().print(str(error))

    def _command(self, word: str) -> Callable[[str], None]:
        if word not in self._commands:
            raise UserError(f"There is no {word}; there are {', '.join(COMMANDS)}.")
        return self._commands[word]

    def _ask(self, prompt: str) -> None:
        with self._answering.stopped_by_interrupts():
            if len(self._active) == 1:
                self._stream(self._active[0], prompt)
                return
            width = max(len(model.name) for model in self._active)
            for model in self._active:
                with remarks().status(f"{model.name} answers …"):
                    system = system_for(model, self._system)
                    answer = self._answering.ask(model.name, prompt, system=system, sampling=self._sampling)
                table = replies_table(width)
                table.add_row(answer.model, reply(answer))
                answers().print(table)

    def _stream(self, model: Model, prompt: str) -> None:
        system = system_for(model, self._system)
        answer = self._answering.ask(model.name, prompt, system=system, sampling=self._sampling, tell=_write)
        _write(f"{ending(answer)}\n")

    def _use(self, rest: str) -> None:
        chosen = [self._named(name) for name in rest.split()]
        self._active = list(dict.fromkeys(chosen)) or self._answering.models
        answers().print(f"{', '.join(model.name for model in self._active)} from here on.")

    def _named(self, name: str) -> Model:
        """A model by its name, or by a beginning that only one has."""
        models = self._answering.models
        fitting = [model for model in models if model.name.startswith(name)]
        exact = [model for model in fitting if model.name == name]
        if len(found := exact or fitting) != 1:
            known = ", ".join(model.name for model in models)
            raise UserError(f"{name!r} {'fits several' if found else 'is none'} of {known}.")
        return found[0]

    def _show_models(self, _rest: str) -> None:
        table = Table.grid(padding=(0, 2))
        for model in self._answering.models:
            active = "*" if model in self._active else ""
            table.add_row(active, model.name, model.kind, "chat template" if model.chat else "plain prompt")
        answers().print(table)

    def _set_system(self, rest: str) -> None:
        if rest and not any(model.chat for model in self._answering.models):
            raise UserError("None of these models has a chat template, so there is no place for a system prompt.")
        self._system = rest or None
        answers().print("The system prompt is set." if rest else "There is no system prompt.")

    def _help(self, _rest: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (takes, does) in COMMANDS.items():
            table.add_row("", name, takes, does)
        answers().print(table)
        answers().print(_HELP)


class Names(Completer):
    """Completes commands, and after /use the names of models."""

    def __init__(self, models: Sequence[str]) -> None:
        self._models = models

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """What the last word may become."""
        text = document.text_before_cursor
        word = text.rpartition(" ")[2]
        yield from (Completion(name, start_position=-len(word)) for name in self._known(text) if name.startswith(word))

    def _known(self, text: str) -> Iterable[str]:
        if text.startswith("/use "):
            return self._models
        if not text.startswith("/") or " " in text:
            return ()
        return (f"{name} " if takes else name for name, (takes, _) in COMMANDS.items())


def open_history(home: Path) -> History:
    """The lines of before, readable by their owner alone; none where the home cannot be written."""
    path = home / HISTORY
    try:
        home.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _write(piece: str) -> None:
    sys.stdout.write(printable(piece))
    sys.stdout.flush()
