"""A trainer for bench.py: the real supervisor around a method that computes for about 50 ms a step and reports each.

Used as HONE_TRAINER_PYTHON through a shell script. Each step's seconds go to the file HONE_BENCH_TIMES, a line each.
"""

import json
import os
import sys
import time
from pathlib import Path

from hone.job import EventType
from hone_trainer import __main__, launch, worker, world
from hone_trainer.context import RunContext

WORK = 1_500_000
"""Additions in one step."""


def steady(context: RunContext) -> None:
    """Compute and report, as many steps as the request's label says."""
    steps = int(context.run.spec.labels["steps"])
    context.phase("training")
    with Path(os.environ["HONE_BENCH_TIMES"]).open("a", encoding="utf-8") as times:
        for step in range(1, steps + 1):
            context.stop.check()
            start = time.perf_counter()
            total = 0
            for number in range(WORK):
                total += number
            context.event(
                EventType.PROGRESS, f"step {step}", step=step, metrics={"loss": 1.0 / step, "max_steps": float(steps)}
            )
            times.write(f"{time.perf_counter() - start}\n")
            times.flush()
    (context.output("adapter") / "adapter_model.safetensors").write_bytes(b"weights")
    record = {"durations_s": {"training": 0.0}, "seed": 0}
    (context.scratch / "worker.json").write_text(json.dumps(record), encoding="utf-8")


def main() -> int:
    """`-m hone_trainer run DIRECTORY`, or `worker DIRECTORY`."""
    if sys.argv[1] == "worker":
        world.join = lambda *_: None  # it would import torch, to meet nobody
        worker.METHODS["sft"] = steady
        return worker.main(Path(sys.argv[2]))
    launch.command = lambda launch, directory, **_: [sys.executable, __file__, "worker", str(directory)]
    return __main__.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
