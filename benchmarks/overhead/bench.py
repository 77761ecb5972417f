"""What Hone costs beside a bare TRL script of the same job: start-up and step time, in interleaved A-B-B-A runs.

A is `python benchmarks/overhead/bare_trl.py`, B is `hone run` of the same request. Printed: seconds from the command to
the end of the first training step of each run, the mean step time of each, and the ratio of step times with its 95 %
interval (bootstrap over blocks of 20 steps).

    python benchmarks/overhead/bench.py [--steps 200] [--rounds 1] [--json FILE]

Needs the demo's data and base model (`make demo`, or the two scripts in examples/). Bounded: two runs of each kind a
round.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA, BASE = ROOT / "examples/data/stdlib/train.jsonl", ROOT / "examples/base/stdlib-4m"
SKIPPED_STEPS = 10
"""The first steps of a run warm caches and allocators; they are left out on both sides."""
BLOCK = 20


@dataclass(frozen=True)
class Timing:
    """One run: seconds from the command to the end of step 1, and the seconds of every later step."""

    first_step_s: float
    steps_s: list[float]


def main() -> None:
    """Run A-B-B-A and print the table."""
    arguments = _arguments()
    if not (DATA.exists() and BASE.exists()):
        sys.exit(
            "The demo's data or base model is missing: python examples/make_dataset.py && python examples/make_base.py"
        )
    bare: list[Timing] = []
    hone: list[Timing] = []
    for number in range(arguments.rounds):
        for kind in "ABBA":
            timing = run_bare(arguments.steps) if kind == "A" else run_hone(arguments.steps)
            (bare if kind == "A" else hone).append(timing)
            name = "bare TRL script" if kind == "A" else "hone run"
            mean = statistics.fmean(timing.steps_s) * 1000
            print(
                f"round {number + 1}  {name:16} first step after {timing.first_step_s:5.2f} s, {mean:6.1f} ms a step",
                flush=True,
            )
    report(bare, hone, arguments.json)


def run_bare(steps: int) -> Timing:
    """The baseline: it takes the times itself and prints them in its last line."""
    with tempfile.TemporaryDirectory() as directory:
        script = ROOT / "benchmarks/overhead/bare_trl.py"
        command = [sys.executable, str(script), "--output", directory, "--steps", str(steps), "--logging-steps", "1"]
        started = time.time()
        times = json.loads(_run(command, directory).splitlines()[-1])
    return Timing(times["first_step_ended_at"] - started, times["steps_s"][SKIPPED_STEPS:])


def run_hone(steps: int) -> Timing:
    """The same job as a request; step ends are the times of its progress events."""
    with tempfile.TemporaryDirectory() as home:
        command = [str(Path(sys.executable).with_name("hone")), "run", str(ROOT / "benchmarks/overhead/request.yaml")]
        sets = [f"training.max_steps={steps}"]
        started = time.time()
        _run([*command, *(part for item in sets for part in ("--set", item))], home)
        ends = [
            datetime.fromisoformat(event["time"]).timestamp()
            for file in Path(home).glob("runs/*/*/attempt-1/events.jsonl")
            for event in map(json.loads, file.read_text().splitlines())
            if event["type"] == "progress"
        ]
    steps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return Timing(ends[0] - started, steps[SKIPPED_STEPS:])


def report(bare: list[Timing], hone: list[Timing], path: Path | None) -> None:
    """Print ratios against the baseline; `path` gets the same as JSON."""
    low, ratio, high = interval([t.steps_s for t in bare], [t.steps_s for t in hone])
    start_bare = statistics.fmean(t.first_step_s for t in bare)
    start_hone = statistics.fmean(t.first_step_s for t in hone)
    print(f"\nfirst step   bare {start_bare:.2f} s   hone {start_hone:.2f} s   {start_hone - start_bare:+.2f} s")
    print(f"step time    hone / bare = {ratio:.4f}   95 % interval {low:.4f} to {high:.4f}")
    if path:
        result = {
            "first_step_bare_s": start_bare,
            "first_step_hone_s": start_hone,
            "ratio": ratio,
            "low": low,
            "high": high,
        }
        path.write_text(json.dumps(result))


def interval(bare: list[list[float]], hone: list[list[float]], draws: int = 4000) -> tuple[float, float, float]:
    """Ratio of mean step times and its 95 % interval, bootstrapped over blocks of consecutive steps."""
    chance = random.Random(0)
    blocks_a, blocks_b = _blocks(bare), _blocks(hone)
    ratios = sorted(
        statistics.fmean(chance.choices(blocks_b, k=len(blocks_b)))
        / statistics.fmean(chance.choices(blocks_a, k=len(blocks_a)))
        for _ in range(draws)
    )
    middle = statistics.fmean(blocks_b) / statistics.fmean(blocks_a)
    return ratios[int(draws * 0.025)], middle, ratios[int(draws * 0.975)]


def _blocks(runs: list[list[float]]) -> list[float]:
    return [statistics.fmean(run[i : i + BLOCK]) for run in runs for i in range(0, len(run) - BLOCK + 1, BLOCK)]


def _run(command: list[str], home: str) -> str:
    environment = {**os.environ, "HONE_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if answer.returncode:
        sys.exit(f"{' '.join(command)} ended with {answer.returncode}:\n{answer.stdout[-2000:]}{answer.stderr[-2000:]}")
    return answer.stdout


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run")
    parser.add_argument("--rounds", type=int, default=1, help="A-B-B-A rounds")
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
