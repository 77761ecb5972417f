"""What of a plan is measured instead of derived: how a kind of device fills its memory, and how fast it trains.

Shipped ones stand for every device; `hone calibrate` measures those of the one at hand, finished runs its speed. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MODEL_FLOP_UTILIZATION = (0.20, 0.42)
"""Share of the peak that training reaches: plain Hugging Face code at the low end, the best published at the high."""
LEAST_RUNS = 3
"""So many finished runs of a kind of device say more than its data sheet."""
WIDER = 1.1
"""Runs to come differ from those that were by at least so much."""


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Of one kind of device."""

    fragmentation: float = 0.04
    """Share that the caching allocator holds and cannot use."""
    margin: float = 0.08
    """Share kept free: the uncalibrated formulas were 7.8 % off on average over 13 published peaks."""
    flops_low: float | None = None
    """FLOP/s that training reached at least, by the plan's own count of FLOPs; None: not measured."""
    flops_high: float | None = None
    """FLOP/s that it reached at most."""
    source: str = ""
    """When and by what they were measured; empty for the shipped ones."""


SHIPPED = Coefficients()


@dataclass(frozen=True, kw_only=True)
class Speed:
    """FLOP/s of one device over whole runs, loading and saving included, by the plan's own count of FLOPs."""

    low: float
    high: float
    runs: int


def speed_of(reached: Sequence[float]) -> Speed | None:
    """What is to be expected after runs that reached so many FLOP/s; None where they are too few to say."""
    if len(reached) < LEAST_RUNS:
        return None
    ordered = sorted(reached)
    cut = len(ordered) // 10  # the odd ones out
    kept = ordered[cut : len(ordered) - cut]
    return Speed(low=kept[0] / WIDER, high=kept[-1] * WIDER, runs=len(ordered))
