"""How fast finished runs were on each kind of device: what tightens the time that a plan expects. Asked by the Planner
of a service."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from hone.job import Job
from hone.plan.coefficients import Speed, speed_of

KEPT_S = 600.0
"""How long an answer is good enough."""
RUNS = 100
"""So many of the newest finished runs are looked at."""
LEAST_S = 300.0
"""Shorter runs load longer than they train."""


class Speeds:
    """Speeds by the name of the GPU profile, "" for a CPU. Safe to use from several threads."""

    def __init__(
        self, finished: Callable[[int], Sequence[Job]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`finished` gives so many of the newest runs that succeeded."""
        self._finished, self._clock = finished, clock
        self._known: tuple[float, Mapping[str, Speed]] = (float("-inf"), {})

    def __call__(self) -> Mapping[str, Speed]:
        """What is known; asks the store once in a while."""
        asked_at, known = self._known
        if self._clock() - asked_at > KEPT_S:
            known = speeds(self._finished(RUNS))
            self._known = (self._clock(), known)
        return known


def speeds(jobs: Sequence[Job]) -> dict[str, Speed]:
    """By what each run reached: the plan's FLOPs of its steps over the time from its start to its end."""
    reached = defaultdict[str, list[float]](list)
    for job in jobs:
        if flops := _reached(job):
            reached[job.plan.gpu].append(flops)
    found = {gpu: speed_of(values) for gpu, values in reached.items()}
    return {gpu: speed for gpu, speed in found.items() if speed}


def _reached(job: Job) -> float | None:
    """FLOP/s of one device; None for a run that says nothing: short, interrupted, or of unknown FLOPs."""
    if len(job.attempts) != 1 or job.progress is None or not job.progress.step or job.plan.step_flops is None:
        return None
    attempt = job.attempts[0]
    if attempt.start_time is None or attempt.end_time is None:
        return None
    seconds = (attempt.end_time - attempt.start_time).total_seconds()
    if seconds < LEAST_S:
        return None
    return job.plan.step_flops * job.progress.step / job.plan.launch.world_size / seconds
