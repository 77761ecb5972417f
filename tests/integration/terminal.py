"""`hone` on a terminal, for tests of what people type."""

import os
import pty
import re
import select
import sys
import time
from pathlib import Path

HONE = str(Path(sys.executable).parent / "hone")


class Terminal:
    """`hone` on a terminal of 100 columns."""

    def __init__(self, *arguments: object) -> None:
        self.seen = ""
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", COLUMNS="100", LINES="40")
            os.execv(HONE, [HONE, *map(str, arguments)])

    def read_until(self, pattern: str, *, timeout: float = 120) -> None:
        """Read until what was seen since the last key matches."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, f"{pattern!r} never came in:\n{self.seen}"
            if select.select([self._file], [], [], 0.2)[0]:
                self.seen += os.read(self._file, 65536).decode(errors="replace")

    def type(self, keys: str) -> None:
        """Keys, as a person would press them."""
        self.seen = ""
        os.write(self._file, keys.encode())

    def exit_code(self) -> int:
        """Read to the end and wait."""
        while True:
            try:
                data = os.read(self._file, 65536)
            except OSError:  # the other side is closed
                break
            if not data:
                break
            self.seen += data.decode(errors="replace")
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
