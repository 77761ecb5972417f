"""What Hone costs beside a bare TRL script of the same job: start-up and step time, in A-B-B-A order.

A is `python benchmarks/overhead/bare_trl.py`, B is `hone run` of the same request. In a round each is started while the
other is stopped (SIGSTOP), and trains alone until its first steps are done. Then both train at once, each with all that
it started on a core of its own and with one thread, and change cores every few seconds; so what the machine does hits
both alike, and what Hone does beside its worker is paid by its worker. On a GPU they take turns instead, A-B, B-A, ….
On CPUs A gets the settings of the C library's allocator that Hone gives its workers, so that what is left is what Hone
costs; with --as-started it is started as a person would, without them.
Printed: seconds from the command to the end of the first training step, the mean step time of both, and the ratio of
step times with its 95 % interval. Both make the same steps on the same rows (their losses are held side by side), so
step is paired with step; the interval is a bootstrap over rounds and over stretches of each, so one round alone says
little. A step that was stopped in its middle, in A or in B, does not count.

    python benchmarks/overhead/bench.py [--steps 200] [--rounds 2] [--as-started] [--json FILE]
    python benchmarks/overhead/bench.py --packing [--steps 200] [--rounds 1]
    python benchmarks/overhead/bench.py --method dpo [--steps 100] [--rounds 1]     # or reward
    python benchmarks/overhead/bench.py --gpu meta-llama/Llama-3.2-1B [--steps 200] [--rounds 1]

With --packing A is `hone run` of that request and B the same with packing, one after the other in A-B-B-A; printed are
tokens a second that are no padding, their ratio, and how full the packed rows are.

With --method both train on pairs: the demo's answers, each preferred to its own words in another order.

With --gpu both train LoRA on a model of that shape with random weights, in bf16, 4 rows of 1,024 tokens a step.

Else it needs the demo's data and base model (`make demo`, or the two scripts in examples/). Bounded: one run of each
kind a round, two with --packing.
"""

import argparse
import itertools
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # before what is imported from there

from benchmarks.memory import bench as shapes  # noqa: E402
from examples.make_dataset import pairs  # noqa: E402

from hone_trainer.launch import KEEP_MEMORY  # noqa: E402

DATA, BASE = ROOT / "examples/data/stdlib/train.jsonl", ROOT / "examples/base/stdlib-4m"
SKIPPED_STEPS = 10
"""The first steps of a run warm caches and allocators; they are left out on both sides."""
ALONE_S = 25.0
"""For the start and the first steps of each, while the other is stopped."""
TURN_S = 3.0
"""On a GPU, where they take turns."""
STRETCH_S = 10.0
"""On CPUs, until they change cores."""
SAME_LOSS = 1e-3
"""Relative difference up to which a loss is the same: the log rounds it."""
TOO_LONG_S = 900.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HONE_CPU_LIMIT": "1"}
HONE = [sys.executable, "-c", "from hone.cli import main; main()"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Turn:
    """Seconds of the steps of a stretch of A, and of the same steps in B."""

    bare: list[float]
    hone: list[float]


@dataclass(frozen=True)
class Round:
    """One run of each kind, taking turns. Seconds."""

    first_step_bare: float
    first_step_hone: float
    turns: list[Turn]


def main() -> None:
    """Run the rounds and print what they took."""
    arguments = _arguments()
    if not arguments.gpu and not (DATA.exists() and BASE.exists()):
        sys.exit(
            "The demo's data or base model is missing: python examples/make_dataset.py && python examples/make_base.py"
        )
    if arguments.packing:
        return packing(arguments.steps, arguments.rounds)
    with tempfile.TemporaryDirectory() as directory:
        job = gpu_job(Path(directory), arguments.gpu) if arguments.gpu else Job()
        if arguments.method != "sft":
            job = pairs_job(Path(directory), arguments.method)
        measure(job, arguments)


def measure(job: "Job", arguments: argparse.Namespace) -> None:
    """Run the rounds and print what they took."""
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(run_round(job, arguments.steps, hone_first=number % 2 == 1, as_started=arguments.as_started))
        last = rounds[-1]
        print(
            f"round {number + 1}   first step after {last.first_step_bare:5.2f} s (bare TRL script) and "
            f"{last.first_step_hone:5.2f} s (hone run); {mean_ms([s for turn in last.turns for s in turn.bare])} and "
            f"{mean_ms([s for turn in last.turns for s in turn.hone])} ms a step, "
            f"{sum(len(turn.bare) for turn in last.turns)} steps in {len(last.turns)} turns",
            flush=True,
        )
    report(rounds, arguments.json)


@dataclass(frozen=True)
class Job:
    """What both are told beside the defaults of bare_trl.py and request.yaml, which are the same."""

    bare: tuple[str, ...] = ()
    hone: tuple[str, ...] = ()
    is_gpu: bool = False


def gpu_job(directory: Path, shape: str) -> Job:
    """A model of that shape with random weights, and rows that fill 1,024 tokens."""
    model, data = shapes.make_model(directory / "model", shape), directory / "data"
    data.mkdir()
    case = shapes.Case(shape, "lora", 1024, 4)
    rows = "".join(json.dumps(shapes.row(case, number)) + "\n" for number in range(2000))
    for split in ("train", "eval"):
        (data / f"{split}.jsonl").write_text(rows if split == "train" else rows[: rows.index("\n") + 1])
    common = {"model": str(model), "data": str(data), "max-length": "1024", "batch-size": "4", "learning-rate": "1e-5"}
    hone = {
        "model.source": f"file://{model}",
        "dataset.source": f"file://{data / 'train.jsonl'}",
        "method.sft.max_length": "1024",
        "training.micro_batch_size": "4",
        "training.learning_rate": "1e-5",
        "training.precision": "bf16",
        "compute.gpus_per_node": "1",
    }
    bare = [word for name, value in common.items() for word in (f"--{name}", value)]
    return Job(bare=(*bare, "--bf16"), hone=tuple(f"{path}={value}" for path, value in hone.items()), is_gpu=True)


def pairs_job(directory: Path, method: str) -> Job:
    """Pairs of the demo's rows, 4 a step."""
    for split in ("train", "eval"):
        rows = [json.loads(line) for line in (DATA.parent / f"{split}.jsonl").read_text().splitlines()]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(rows)))
    hone = {
        "dataset.source": f"file://{directory / 'train.jsonl'}",
        "method": json.dumps({method: {"max_length": 256}}),
        "training.micro_batch_size": "4",
    }
    bare = ("--method", method, "--data", str(directory), "--batch-size", "4")
    return Job(bare=bare, hone=tuple(f"{path}={value}" for path, value in hone.items()))


class Run:
    """A command that can be stopped and let go on, with everything that it started."""

    def __init__(self, command: list[str], home: Path, environment: Mapping[str, str] = {}) -> None:
        self._home = home
        self._log = home / "output.log"
        self.started = time.time()
        self.turns: list[tuple[float, float]] = []
        """From when to when it ran, in turn with the other."""
        with self._log.open("wb") as log:
            whole = {**ENVIRONMENT, "HONE_HOME": str(home), **environment}
            self._process = psutil.Popen(command, env=whole, stdout=log, stderr=log)

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def take_turn(self, seconds: float) -> None:
        """Go on for so long, or to its end, and stop again."""
        self._signal(signal.SIGCONT)
        began = time.time()
        with suppress(psutil.TimeoutExpired):
            self._process.wait(seconds)
        self.turns.append((began, time.time()))
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """From here on without a stop."""
        self._signal(signal.SIGCONT)

    def move(self, core: int) -> None:
        """Everything that it started to this core."""
        for process in [self._process, *self._process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                for thread in process.threads():
                    with suppress(ProcessLookupError):
                        os.sched_setaffinity(thread.id, {core})

    def finish(self) -> None:
        """Go on to its end."""
        self.go_on()
        code = self._process.wait(TOO_LONG_S)
        if code:
            sys.exit(f"{' '.join(self._process.args)} ended with {code}:\n{self._log.read_text()[-4000:]}")

    def kill(self) -> None:
        """Whatever became of it: nothing of it stays."""
        self._signal(signal.SIGKILL)

    def steps(self) -> tuple[list[float], list[float]]:
        """When each step ended, and its loss: told by the bare script in its last line, and by a run in its events."""
        if events := [event for event in read_events(self._home) if event["type"] == "progress"]:
            ends = [datetime.fromisoformat(event["time"]).timestamp() for event in events]
            return ends, [event["metrics"]["loss"] for event in events]
        told = json.loads(self._log.read_text().splitlines()[-1])
        return told["ended_at"], told["losses"]

    def _signal(self, number: int) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in [self._process, *self._process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def run_round(job: Job, steps: int, *, hone_first: bool, as_started: bool) -> Round:
    """One run of each, stopped in turn."""
    environment: Mapping[str, str] = {} if job.is_gpu else ONE_THREAD
    environments = {
        "hone": environment,
        "bare": environment if as_started or job.is_gpu else {**environment, **KEEP_MEMORY},
    }
    script = ROOT / "benchmarks/overhead/bare_trl.py"
    with tempfile.TemporaryDirectory() as bare_home, tempfile.TemporaryDirectory() as hone_home, ExitStack() as stack:
        words = ["--output", bare_home, "--steps", str(steps), "--logging-steps", "1", *job.bare]
        commands = {
            "bare": ([sys.executable, str(script), *words], Path(bare_home)),
            "hone": (hone_command(list(job.hone), steps), Path(hone_home)),
        }
        runs = {}
        for name in ("hone", "bare") if hone_first else ("bare", "hone"):
            runs[name] = Run(*commands[name], environment=environments[name])
            stack.callback(runs[name].kill)
            runs[name].take_turn(ALONE_S)
        order = list(runs.values())
        take_turns(order) if job.is_gpu else side_by_side(order)
        for run in order:
            run.finish()
        bare, hone = runs["bare"], runs["hone"]
        (bare_ends, bare_losses), (hone_ends, hone_losses) = bare.steps(), hone.steps()
        if not all(
            math.isclose(a, b, rel_tol=SAME_LOSS) for a, b in zip(bare_losses, hone_losses, strict=True)
        ):  # what is compared would be other work
            sys.exit(f"The losses differ:\n{bare_losses}\n{hone_losses}")
        return Round(bare_ends[0] - bare.started, hone_ends[0] - hone.started, paired(bare, bare_ends, hone, hone_ends))


def take_turns(order: list[Run]) -> None:
    """One trains while the other is stopped, until one has ended."""
    while not any(run.is_over for run in order):
        for run in order:
            run.take_turn(TURN_S)
        order.reverse()


def side_by_side(order: list[Run]) -> None:
    """Each on a core of its own, until one has ended."""
    for run in order:
        run.go_on()
    began, cores = time.time(), sorted(os.sched_getaffinity(0))[:2]
    while not any(run.is_over for run in order):
        for run, core in zip(order, cores, strict=True):
            run.move(core)
        cores.reverse()
        time.sleep(STRETCH_S)
        for run in order:
            run.turns.append((began, time.time()))
        began = time.time()


def paired(bare: Run, bare_ends: list[float], hone: Run, hone_ends: list[float]) -> list[Turn]:
    """The steps that both made without being stopped, by the turns of `bare`, of which the first is left out."""
    inside, other = whole_steps(bare, bare_ends), whole_steps(hone, hone_ends)
    found: dict[int, Turn] = {}
    for number in inside.keys() & other.keys():
        turn = found.setdefault(inside[number][0], Turn([], []))
        turn.bare.append(inside[number][1])
        turn.hone.append(other[number][1])
    return list(found.values())


def whole_steps(run: Run, ends: list[float]) -> dict[int, tuple[int, float]]:
    """For each step that lies wholly in one turn after the first: which turn, and its seconds."""
    steps = list(enumerate(itertools.pairwise(ends)))[SKIPPED_STEPS:]
    turns = list(enumerate(run.turns))[1:]
    return {
        number: (turn, end - start)
        for number, (start, end) in steps
        for turn, (began, over) in turns
        if began < start and end < over
    }


def mean_ms(seconds: list[float]) -> str:
    return f"{statistics.fmean(seconds) * 1000:.1f}"


def packing(steps: int, rounds: int) -> None:
    """What packing gains: tokens a second of A-B-B-A runs, padding left out."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    fill = 0.0
    for packed in [kind == "B" for _ in range(rounds) for kind in "ABBA"]:
        events = run_events(["method.sft.packing=true"] if packed else [], steps)
        progress = [event["metrics"] for event in events if event["type"] == "progress"][SKIPPED_STEPS:]
        rates[packed].append(statistics.fmean(metrics["tokens_per_second"] for metrics in progress))
        if packed:
            fill = max(event["metrics"].get("packing_fill", 0.0) for event in events if event["type"] == "data")
        print(f"{'packed' if packed else 'padded':8} {rates[packed][-1]:8.0f} tokens/s", flush=True)
    ratio = statistics.fmean(rates[True]) / statistics.fmean(rates[False])
    print(f"\npacking      rows {100 * fill:.1f} % full; tokens/s packed / padded = {ratio:.2f}")


def run_events(sets: list[str], steps: int) -> list[dict[str, Any]]:
    """The events of one `hone run`."""
    with tempfile.TemporaryDirectory() as home:
        run = Run(hone_command(sets, steps), Path(home))
        try:
            run.finish()
        finally:
            run.kill()
        return read_events(Path(home))


def hone_command(sets: list[str], steps: int) -> list[str]:
    settings = [part for item in [f"training.max_steps={steps}", *sets] for part in ("--set", item)]
    return [*HONE, "run", str(ROOT / "benchmarks/overhead/request.yaml"), *settings]


def read_events(home: Path) -> list[dict[str, Any]]:
    files = home.glob("runs/*/*/attempt-1/events.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def report(rounds: list[Round], path: Path | None) -> None:
    """Print ratios against the baseline; `path` gets the same as JSON."""
    low, ratio, high = interval([round_.turns for round_ in rounds])
    start_bare = statistics.fmean(round_.first_step_bare for round_ in rounds)
    start_hone = statistics.fmean(round_.first_step_hone for round_ in rounds)
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


def interval(rounds: list[list[Turn]], draws: int = 4000) -> tuple[float, float, float]:
    """Ratio of mean step times and its 95 % interval, bootstrapped over rounds and over the turns in each: on some
    machines a process is a few per cent slower than its twin for as long as it lives."""
    chance = random.Random(0)
    ratios = sorted(
        _ratio([chance.choices(turns, k=len(turns)) for turns in chance.choices(rounds, k=len(rounds))])
        for _ in range(draws)
    )
    return ratios[int(draws * 0.025)], _ratio(rounds), ratios[int(draws * 0.975)]


def _ratio(rounds: list[list[Turn]]) -> float:
    steps = [(sum(turn.hone), sum(turn.bare)) for turns in rounds for turn in turns]
    return sum(hone for hone, _ in steps) / sum(bare for _, bare in steps)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of each kind")
    parser.add_argument("--method", choices=("sft", "dpo", "reward"), default="sft", help="what is trained")
    parser.add_argument(
        "--as-started", action="store_true", help="leave the bare script the C library's own allocator settings"
    )
    parser.add_argument("--packing", action="store_true", help="packed against padded rows instead")
    parser.add_argument("--gpu", metavar="SHAPE", help="on a GPU, with a model of this shape (of shapes.yaml)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
