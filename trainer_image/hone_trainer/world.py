"""The processes of a run: whether they are those that the plan launched, and who this one is.

Checked first thing in every rank, because a launcher that quietly starts one process of two trains with half the batch.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hone.job import Launch
from hone.run import RunDirectory, TrainerExit
from hone_trainer import sharding
from hone_trainer.failure import RunFailed, write_error

RENDEZVOUS_S = 60.0


def rank() -> int:
    """This process's number as the launcher gave it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(launch: Launch, directory: RunDirectory, *, timeout_s: float = RENDEZVOUS_S) -> None:
    """Meet the other ranks and compare the world with the plan. Raises WRONG_WORLD, at the latest after the timeout."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != launch.world_size:
        raise _wrong(f"{started} processes were started", launch)
    if launch.is_sharded:
        sharding.announce(launch)
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    on_cpu = launch.device == "cpu"
    backend = {"backend": "gloo"} if on_cpu and launch.world_size > 1 else {}
    with _deadline(launch, directory, timeout_s):
        state = PartialState(cpu=on_cpu, **backend)
    multi = DistributedType.MULTI_CPU if on_cpu else DistributedType.MULTI_GPU
    expected = multi if launch.world_size > 1 else DistributedType.NO
    if state.num_processes != launch.world_size or state.distributed_type != expected:
        raise _wrong(f"the world is {state.num_processes} processes of type {state.distributed_type.value}", launch)


def agree(launch: Launch, what: str, fingerprint: str) -> None:
    """Compare what every machine read for itself. Raises RunFailed (DATA) when they differ."""
    if launch.nodes == 1:
        return
    from accelerate.utils import gather_object

    found = gather_object([fingerprint])
    if odd := [rank for rank, other in enumerate(found) if other != found[0]]:
        raise RunFailed(
            TrainerExit.DATA,
            f"Rank {odd[0]} read another version of {what} than rank 0 ({found[odd[0]][:12]}… and {found[0][:12]}…).",
            fix="Pin the source to a revision (hf://organisation/name@commit), or do not change it while a run starts.",
        )


@contextmanager
def _deadline(launch: Launch, directory: RunDirectory, timeout_s: float) -> Iterator[None]:
    """End the process when the rendezvous hangs: gloo and NCCL wait half an hour for a peer that never comes."""

    def give_up() -> None:
        write_error(directory, _wrong(f"not all processes came within {timeout_s:g} s", launch), rank=rank())
        os._exit(TrainerExit.WRONG_WORLD)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wrong(found: str, launch: Launch) -> RunFailed:
    return RunFailed(
        TrainerExit.WRONG_WORLD,
        f"The launcher did not do what was planned: {found}, the plan says {launch.world_size} ({launch.strategy}).",
        fix="Check that nothing but Hone sets RANK and WORLD_SIZE.",
    )
