"""The real trainer with a method that trains nothing, for tests about processes: started, killed, found, stopped.

Used as HONE_TRAINER_PYTHON through a two-line shell script: `quick_trainer.py -m hone_trainer run DIRECTORY`.
Supervisor, lock, event file, worker process, publishing and exit.json are the trainer's own. Labels of the request say
what the method does: `steps`, `pause_ms` between them, `checkpoints` every so many steps and when it is asked to stop
(then it goes on from what it was handed), `prompts` (what its rows were), `ending` (`crash` raises, `deaf` ignores
SIGTERM).
"""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from hone.job import EventType
from hone.run import RunDirectory
from hone_trainer import __main__, launch, worker, world
from hone_trainer.context import RunContext


def pretend(context: RunContext) -> None:
    """Report steps, leave outputs."""
    labels = context.run.spec.labels
    note_start(context)
    if labels.get("ending") == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "prompts" in labels:
        context.event(EventType.DATA, "rows", fields={"prompts": labels["prompts"]})
    steps = int(labels.get("steps", "3"))
    every = int(labels.get("checkpoints", "0"))
    context.phase("training")
    with context.stop.deferred() if every else nullcontext():
        for step in range(first_step(context), steps + 1):
            context.stop.check()
            time.sleep(int(labels.get("pause_ms", "10")) / 1000)
            metrics = {"loss": 1.0 / step, "max_steps": float(steps)}
            context.event(EventType.PROGRESS, f"step {step}", step=step, metrics=metrics)
            if every and (step % every == 0 or context.stop.asked):
                save(context, step)
        context.stop.check()
    if labels.get("ending") == "crash":
        sys.stdout.write("the last line before the end\n")
        raise RuntimeError("it was asked to fail")
    leave_outputs(context)
    record = {"durations_s": {"training": 0.0}, "seed": 0}
    (context.scratch / "worker.json").write_text(json.dumps(record), encoding="utf-8")


def leave_outputs(context: RunContext) -> None:
    """What was made before for a request of this name (HONE_TEST_OUTPUTS), else a small file."""
    prepared = Path(os.environ.get("HONE_TEST_OUTPUTS", "/nowhere")) / context.run.spec.name
    for kind in prepared.iterdir() if prepared.is_dir() else ():
        shutil.copytree(kind, context.output(kind.name), dirs_exist_ok=True)
    if not prepared.is_dir():
        (context.output("adapter") / "adapter_model.safetensors").write_bytes(b"weights")


def first_step(context: RunContext) -> int:
    """The step after the checkpoint that the supervisor fetched, where there was one."""
    saved = context.directory.resume / "step.json"
    return int(json.loads(saved.read_text())) + 1 if saved.exists() else 1


def save(context: RunContext, step: int) -> None:
    """Leave a checkpoint where the supervisor looks for them, in one move."""
    folder = context.scratch / "checkpoint"
    folder.mkdir()
    (folder / "step.json").write_text(json.dumps(step))
    context.directory.checkpoints.mkdir(exist_ok=True)
    folder.rename(context.directory.checkpoints / f"step-{step:06d}")


def note_start(context: RunContext) -> None:
    """Leave one line for each time that this attempt was really begun."""
    place = Path(os.environ["HONE_TEST_STARTS"])
    descriptor = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, f"{context.run.job} {context.run.attempt}\n".encode())


def main() -> int:
    """`-m hone_trainer run DIRECTORY`, or another command of it, or `worker DIRECTORY`."""
    if sys.argv[1] == "worker":
        world.join = lambda *_: None  # it would import torch, to meet nobody
        worker.METHODS["sft"] = pretend
        return worker.main(Path(sys.argv[2]))
    launch.command = lambda launch, directory, **_: [sys.executable, __file__, "worker", str(directory)]
    assert sys.argv[3] != "run" or RunDirectory(Path(sys.argv[4])).run_file.exists()
    return __main__.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
