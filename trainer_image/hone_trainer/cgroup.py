"""Whether the kernel killed a process of this container because its memory limit was reached; control groups count it.

Called by workers.py around a run: a worker that was killed by SIGKILL while the count grew ran out of memory.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def memory_kills(root: Path = ROOT, own: Path = OWN) -> int:
    """Processes of this group that the kernel has killed for want of memory so far; 0 where nothing counts them."""
    for file in _counters(root, own):
        with suppress(OSError, ValueError, KeyError):
            return int(dict(line.split() for line in file.read_text(encoding="ascii").splitlines())["oom_kill"])
    return 0


def _counters(root: Path, own: Path) -> Iterator[Path]:
    """Where the count may stand: version 2 and version 1, by the group's own path and, inside a container, without."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    groups = {controllers: path.lstrip("/") for _, controllers, path in (line.split(":", 2) for line in lines)}
    for group in (groups.get(""), ""):
        if group is not None:
            yield root / group / "memory.events"
    for group in (groups.get("memory"), ""):
        if group is not None:
            yield root / "memory" / group / "memory.oom_control"
