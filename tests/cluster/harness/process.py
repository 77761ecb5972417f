"""Processes that outlive the command that starts them, and are found again whatever happened in between.

Each carries a mark in its environment, and its children inherit it. So a pid file of another boot, a pid used again, or
a process whose starter was killed before it wrote the pid file can mislead nobody.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .places import LOGS, RUN

_MARK = "HONE_CLUSTER_PROCESS"


class Ended(RuntimeError):
    """A process that should run does not; the message has the end of its log."""

    def __init__(self, name: str) -> None:
        log = LOGS / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else ["(no log)"]
        super().__init__("\n".join([f"{name} ended, and its log with:", *lines[-15:]]))


def start(name: str, command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None) -> None:
    """Start one process in a session of its own; its output goes to log/<name>.log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    (RUN / "pid").mkdir(exist_ok=True)
    with (LOGS / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            env={"PATH": os.environ["PATH"], "HOME": str(RUN), _MARK: f"{RUN}/{name}", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (RUN / "pid" / name).write_text(str(process.pid))
    while process.poll() is None and _mark(process.pid) is None:
        time.sleep(0.001)  # the kernel shows an environment some moments after exec has let go of us
    process.returncode = process.returncode or 0  # Popen would warn of a child that outlives it, which is what is meant


def find(name: str) -> int | None:
    """Its pid while it runs."""
    try:
        pid = int((RUN / "pid" / name).read_text())
    except (OSError, ValueError):
        return None
    return pid if _mark(pid) == f"{RUN}/{name}" and not _is_zombie(pid) else None


def stop(name: str, *, kill: bool = False, wait_s: float = 10.0, first: signal.Signals = signal.SIGTERM) -> None:
    """End it; SIGKILL at once when asked, or after wait_s."""
    pid = find(name)
    if pid is None:
        return
    send(pid, signal.SIGKILL if kill else first)
    deadline = time.monotonic() + wait_s
    while find(name) is not None or _has_threads(pid):
        if time.monotonic() > deadline:
            send(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked() -> list[int]:
    """Every process of this cluster that runs, with children that kept their environment."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if (_mark(pid) or "").startswith(f"{RUN}/") and not _is_zombie(pid)]


def command_of(pid: int) -> list[str]:
    """The words of its command line; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def is_first(pid: int) -> bool:
    """Whether it is the first process of its container."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return any(line.split()[-1] == "1" for line in status.splitlines() if line.startswith("NSpid:"))


def variable_of(pid: int, name: str) -> str:
    """One variable of the environment that it was started with; empty where it has none, or is gone."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    prefix = f"{name}=".encode()
    return next((word[len(prefix) :].decode() for word in words if word.startswith(prefix)), "")


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _mark(pid: int) -> str | None:
    return variable_of(pid, _MARK) or None


def _is_zombie(pid: int) -> bool:
    return _state(Path(f"/proc/{pid}")) == "Z"


def _has_threads(pid: int) -> bool:
    """Whether any thread of it still ends, and holds its ports: the first one is a zombie by then."""
    return any(_state(task) != "Z" for task in Path(f"/proc/{pid}/task").glob("*"))


def _state(entry: Path) -> str:
    """One letter; that of a zombie for what is gone."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
