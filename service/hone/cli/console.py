"""Where text goes: one console for answers (stdout), one for errors and progress (stderr).

Nothing is read as markup, so names with brackets come out as they are. Where the output is no terminal, lines are never
wrapped, so that `grep` finds whole sentences; colour is an addition that NO_COLOR and pipes lose without harm.
"""

import sys
from typing import IO

from rich.console import Console

UNWRAPPED = 10_000
"""Columns of what is no terminal."""


def answers() -> Console:
    """Answers, on stdout."""
    return _console(sys.stdout)


def remarks() -> Console:
    """Errors and remarks, on stderr."""
    return _console(sys.stderr)


def _console(stream: IO[str]) -> Console:
    width = None if stream.isatty() else UNWRAPPED
    return _Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to app.py, which knows what the exit code is then; rich would end the process with 1."""
        raise BrokenPipeError
