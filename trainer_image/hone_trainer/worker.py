"""One rank of a run: `python -m hone_trainer.worker DIRECTORY`, started by the supervisor or its launcher.

It checks the world, builds the RunContext and runs the method. When it fails it says why in error-<rank>.json and ends
with the TrainerExit code of that reason.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from hone.run import Run, RunDirectory, TrainerExit
from hone.spec.rewards import scorers
from hone_trainer import trackers, world
from hone_trainer.context import RunContext, StopSignal
from hone_trainer.failure import write_error
from hone_trainer.fit import check_gpu
from hone_trainer.guard import forbid_network, hosts
from hone_trainer.inputs import Inputs
from hone_trainer.process import die_with_parent
from hone_trainer.report import EventLog


def main(path: Path) -> int:
    """Run this rank to its end; the answer is the exit code."""
    die_with_parent()
    trackers.hide()
    directory = RunDirectory(path)
    stop = StopSignal()
    stop.install()
    rank = world.rank()
    _log_to(directory.log(rank))
    try:
        (directory.scratch / f"worker-{rank}.pid").write_text(str(os.getpid()), encoding="ascii")
        _run(directory, stop, rank)
    except BaseException as error:
        return int(write_error(directory, error, rank=rank).code)
    return int(TrainerExit.SUCCEEDED)


def _run(directory: RunDirectory, stop: StopSignal, rank: int) -> None:
    run = Run.from_yaml(directory.run_file.read_text(encoding="utf-8"))
    peers = [os.environ["MASTER_ADDR"]] if "MASTER_ADDR" in os.environ else []
    forbid_network([*peers, *hosts(scorers(run.spec))])
    world.join(run.launch, directory)
    check_gpu(run.launch, directory.scratch / "plan.json")
    context = RunContext(
        run=run,
        directory=directory,
        inputs=Inputs.read(directory.scratch / "inputs.json"),
        events=EventLog(directory.events),
        rank=rank,
        world_size=run.launch.world_size,
        local_rank=world.local_rank(),
        stop=stop,
    )
    METHODS[run.spec.method.name](context)


def _run_sft(context: RunContext) -> None:
    from hone_trainer.methods import sft

    sft.run(context)


def _run_dpo(context: RunContext) -> None:
    from hone_trainer.methods import dpo

    dpo.run(context)


def _run_reward(context: RunContext) -> None:
    from hone_trainer.methods import reward

    reward.run(context)


def _run_ppo(context: RunContext) -> None:
    from hone_trainer.methods import ppo

    ppo.run(context)


def _run_grpo(context: RunContext) -> None:
    from hone_trainer.methods import grpo

    grpo.run(context)


def _run_merge(context: RunContext) -> None:
    from hone_trainer.methods import merge

    merge.run(context)


METHODS: dict[str, Callable[[RunContext], None]] = {
    "sft": _run_sft,
    "dpo": _run_dpo,
    "reward": _run_reward,
    "ppo": _run_ppo,
    "grpo": _run_grpo,
    "merge": _run_merge,
}
"""What this trainer runs; validation answers NotServed for the rest."""


def _log_to(path: Path) -> None:
    """Send stdout and stderr of this process, and of C++ code in it, to the rank's own log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Process groups and dataloaders may wait for peers that are gone; everything that matters is on disk.
    os._exit(code)
