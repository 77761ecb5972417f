"""The cgroups of one node, in every hierarchy of cgroup v1."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from . import process

_HIERARCHIES = Path("/sys/fs/cgroup")


def are_supported() -> bool:
    """Whether this machine has the hierarchies of cgroup v1."""
    return (_HIERARCHIES / "cpuset").is_dir() and not (_HIERARCHIES / "cgroup.controllers").exists()


def make(name: str) -> None:
    """The node's own root; a kubelet does not make it, and a cpuset without processors takes no process."""
    for hierarchy in _HIERARCHIES.iterdir():
        if hierarchy.is_dir() and not hierarchy.is_symlink():
            (hierarchy / name).mkdir(exist_ok=True)
    cpuset = _HIERARCHIES / "cpuset"
    for file in ("cpuset.cpus", "cpuset.mems"):
        (cpuset / name / file).write_text((cpuset / file).read_text())


def kill(name: str, *, timeout_s: float = 10) -> None:
    """SIGKILL to every process in it, until none is left."""
    deadline = time.monotonic() + timeout_s
    while pids := {pid for group in _groups(name) for pid in _pids(group)}:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(pids)} of {name} do not end")
        for pid in pids:
            process.send(pid, signal.SIGKILL)
        time.sleep(0.05)


def pids_of_pod(name: str, uid: str) -> list[int]:
    """Every process of one pod of the node, as this machine numbers them."""
    directories = (Path(directory) for directory, _, _ in os.walk(_HIERARCHIES / "memory" / name))
    return [pid for group in directories if f"pod{uid}" in group.parts for pid in _pids(group)]


def remove(name: str, *, timeout_s: float = 10) -> None:
    """Remove it with all below; the kernel lets go of a group some time after its last process."""
    deadline = time.monotonic() + timeout_s
    while groups := list(_groups(name)):
        for group in groups:
            try:
                group.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
        time.sleep(0.05)


def _groups(name: str) -> Iterator[Path]:
    """Deepest first."""
    for hierarchy in _HIERARCHIES.iterdir():
        for directory, _, _ in os.walk(hierarchy / name, topdown=False):
            yield Path(directory)


def _pids(group: Path) -> list[int]:
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []
