"""What ties processes together: dying with the parent, who a process is, and being the first one of a container."""

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends: no worker outlives its supervisor, whatever killed
    that."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid, its identity for as long as the machine is
    up."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    return int(stat.rpartition(")")[2].split()[19])


def run_as_first(body: Callable[[], int]) -> int:
    """Run `body` in a child, as the first process of a container has to: signals are passed on, orphans are reaped.

    The answer is the child's exit code, or minus the signal that killed it. Stop signals reach the body when it
    unblocks them (`unblock_stop_signals`), never before: one that comes early is not lost. Call it before any thread
    is started.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # process 1 is one anyway; this holds for tests too
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child = os.fork()
    if child == 0:
        os._exit(_body_in_child(body))

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    unblock_stop_signals()
    return _reap_until(child)


def unblock_stop_signals() -> None:
    """From here on a stop signal is heard; whoever calls has a handler."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _body_in_child(body: Callable[[], int]) -> int:
    die_with_parent()
    try:
        return body()
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
        return 10  # TrainerExit.INTERNAL; nothing else may run here


def _reap_until(child: int) -> int:
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _prctl(option: int, argument: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, argument)
