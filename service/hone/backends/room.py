"""Who holds what of this machine: memory, cores, GPUs. First come, first served.

Called by local.py, under its lock. Counted is what the plans say, not what is free at the moment, so that the answer is
the same whenever it is asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hone.job import Plan

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one attempt takes of one machine."""

    memory_bytes: int
    processes: int
    gpus: int

    @staticmethod
    def of(plan: Plan) -> "Needs":
        """What a plan asks for."""
        launch = plan.launch
        return Needs(
            memory_bytes=plan.host_memory_bytes, processes=launch.processes_per_node, gpus=launch.gpus_per_node
        )


@dataclass(frozen=True)
class Share:
    """What an attempt holds: its needs, and which GPUs."""

    job: str
    needs: Needs
    gpus: tuple[str, ...]


class Room:
    """The machine's book. GPUs have the names that CUDA_VISIBLE_DEVICES takes."""

    def __init__(self, *, memory_bytes: int, cores: int, gpus: tuple[str, ...]) -> None:
        self._memory_bytes = memory_bytes
        self._cores = cores
        self._gpus = gpus
        self._held: dict[str, Share] = {}
        self._waiting: dict[str, tuple[str, Needs]] = {}

    @property
    def held(self) -> Mapping[str, Share]:
        """Key of an attempt → what it holds."""
        return dict(self._held)

    def take(self, key: str, job: str, needs: Needs) -> Share | str:
        """Room for an attempt; or a sentence that says why there is none.

        Whoever waits longer goes first: what they need counts as taken. When nothing is held there always is room, so a
        plan that counts too much still runs, alone.
        """
        self._waiting.setdefault(key, (job, needs))
        ahead = self._ahead_of(key)
        if (self._held or ahead) and (why := self._lack(needs, ahead)):
            return why
        free = [gpu for gpu in self._gpus if not any(gpu in share.gpus for share in self._held.values())]
        if len(free) < needs.gpus:
            return f"It needs {needs.gpus} GPUs; {len(self._gpus)} are here, and {len(free)} of them free."
        share = Share(job, needs, tuple(free[: needs.gpus]))
        self.hold(key, share)
        return share

    def hold(self, key: str, share: Share) -> None:
        """Write down what an attempt holds."""
        self._waiting.pop(key, None)
        self._held[key] = share

    def give_back(self, key: str) -> None:
        """An attempt has ended, or does not wait any more."""
        self._held.pop(key, None)
        self._waiting.pop(key, None)

    def _ahead_of(self, key: str) -> list[tuple[str, Needs]]:
        ahead = []
        for other, waiting in self._waiting.items():
            if other == key:
                break
            ahead.append(waiting)
        return ahead

    def _lack(self, needs: Needs, ahead: list[tuple[str, Needs]]) -> str:
        taken = [(share.job, share.needs) for share in self._held.values()] + ahead
        who = _names([job for job, _ in taken])
        processes = sum(other.processes for _, other in taken)
        if needs.processes + processes > self._cores:
            what = f"{needs.processes} of {self._cores} cores"
            return f"It waits for {what}: {who} hold {processes}."
        memory = sum(other.memory_bytes for _, other in taken)
        if needs.memory_bytes + memory > self._memory_bytes:
            what = f"{_gib(needs.memory_bytes)} of {_gib(self._memory_bytes)} of memory"
            return f"It waits for {what}: {who} hold {_gib(memory)}."
        gpus = sum(other.gpus for _, other in taken)
        if needs.gpus and needs.gpus + gpus > len(self._gpus):
            return f"It waits for {needs.gpus} of {len(self._gpus)} GPUs: {who} hold {gpus}."
        return ""


def _names(jobs: list[str]) -> str:
    shown = ", ".join(jobs[:3])
    rest = f" and {len(jobs) - 3} more" if len(jobs) > 3 else ""
    return f"{'jobs' if len(jobs) > 1 else 'job'} {shown}{rest}, running or waiting longer,"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
