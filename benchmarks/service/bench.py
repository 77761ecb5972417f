"""How fast the service answers, against an empty call on the same server.

    .venv/bin/python benchmarks/service/bench.py            # rates, about a minute
    .venv/bin/python benchmarks/service/bench.py watchers   # what 100 watchers cost a running job

Rates: a real server process on loopback with SQLite (WAL, synchronous=FULL), one client process, the same concurrency
for every call, rounds interleaved; a ratio is the median of the rounds' own ratios. "Empty" is
grpc.health.v1.Health/Check, which does nothing. "Get" asks for 200 jobs in turn. "Create" is durable when it answers;
its requests are equal, those of "Create, varied" all differ (a sweep), so that nothing of them is remembered. "Bare
insert" is one row a transaction on the same disk with the same settings and no service at all. Wanted: Get at least
0.50, Create at least 0.25 of the empty call.

Watchers: the trainer's own event file with a method that computes for 50 ms a step; blocks with 0 and with 100 watchers
in the order A-B-B-A-A-B-B-A; the ratio of their step times with a bootstrap confidence interval.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import truediv
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hone.home import owner
from hone.rpc import calls
from hone.rpc.access import Access
from hone.rpc.channel import channel_options
from hone.rpc.client import Client
from hone.spec import JobSpec
from hone.spec.parse import parse
from hone.v1 import training_service_pb2_grpc

CONCURRENCY = 16
ROUNDS = 7
CALLS = {"empty": 1500, "get": 1500, "create": 500, "sweep": 500}
LABELS = {"empty": "Empty", "get": "Get", "create": "Create", "sweep": "Create, varied", "insert": "Bare insert"}
JOBS = 200
SETTLED_S = 0.5
WATCHERS = 100
STEPS_PER_BLOCK = 60
_SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_SERVE = "import asyncio; from hone.rpc.server import serve; from hone.settings import Settings; "
_SERVE += "asyncio.run(serve(Settings()))"


def main(arguments: Sequence[str]) -> int:
    """`bench.py [rates|watchers]`."""
    place = Path(tempfile.mkdtemp(prefix="hone-bench-"))
    try:
        if "watchers" in arguments:
            return watchers(place)
        return rates(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def rates(place: Path) -> int:
    """Print calls a second and their ratios to the empty call."""
    found: dict[str, list[float]] = {name: [] for name in (*CALLS, "insert")}
    # The first job holds the machine until the benchmark ends, the others are queued.
    sleeper = script(place, f"while [ -d '{place}' ]; do sleep 1; done")
    with server(place / "home", sleeper) as address:
        spec = request(place)
        with Client(address, namespace="warm") as client:
            ids = [client.submit(spec).id for _ in range(JOBS)]
        for _ in range(ROUNDS):
            for name, rate in asyncio.run(one_round(address, ids, spec)).items():
                found[name].append(rate)
            found["insert"].append(bare_inserts(place / "bare.db", 1000))
    ratios = {name: statistics.median(map(truediv, found[name], found["empty"])) for name in found}
    print(f"{'':16}{'calls/s':>10}{'of empty':>10}   rounds")
    for name, label in LABELS.items():
        rate = statistics.median(found[name])
        print(f"{label:16}{rate:10.0f}{ratios[name]:10.2f}   {' '.join(f'{each:.0f}' for each in found[name])}")
    good = ratios["get"] >= 0.5 and ratios["create"] >= 0.25
    print("wanted: Get ≥ 0.50, Create ≥ 0.25:", "yes" if good else "NO")
    return 0 if good else 1


async def one_round(address: str, ids: Sequence[str], spec: JobSpec) -> dict[str, float]:
    """Calls a second of each kind."""
    async with grpc.aio.insecure_channel(address, options=channel_options(address)) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        training: Any = training_service_pb2_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]
        gets = [calls.get("warm", job).request for job in ids]
        creates = [calls.submit("made", spec).request for _ in range(CALLS["create"])]
        sweep = [calls.submit("made", varied(spec)).request for _ in range(CALLS["sweep"])]
        metadata = Access().metadata()

        async def call(name: str, number: int) -> None:
            if name == "empty":
                await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
            elif name == "get":
                await training.GetJob(gets[number % len(gets)], metadata=metadata)
            elif name == "create":
                await training.CreateJob(creates[number], metadata=metadata)
            else:
                await training.CreateJob(sweep[number], metadata=metadata)

        found = {}
        for name in random.sample(sorted(CALLS), len(CALLS)):
            await asyncio.sleep(SETTLED_S)  # what was started before is work of the rate before
            await rate_of(lambda number: call("empty", number), 100)
            found[name] = await rate_of(lambda number, name=name: call(name, number), CALLS[name])  # type: ignore[misc]
        return found


def varied(spec: JobSpec) -> JobSpec:
    """A request like no other, as in a sweep."""
    return parse({**spec.to_mapping(), "training": {"learning_rate": random.uniform(1e-5, 1e-3), "epochs": 1}})


async def rate_of(call: Callable[[int], Awaitable[None]], count: int) -> float:
    """Calls a second, CONCURRENCY at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await call(number)

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    return count / (time.perf_counter() - start)


def bare_inserts(path: Path, count: int) -> float:
    """Transactions of one row a second, each of them durable."""
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, body TEXT)")
        start = time.perf_counter()
        for _ in range(count):
            connection.execute("INSERT INTO rows (body) VALUES (?)", ("x" * 2000,))
        return count / (time.perf_counter() - start)


def watchers(place: Path) -> int:
    """Print the step time with and without watchers, and their ratio."""
    steps = 40 * STEPS_PER_BLOCK
    worker = Path(__file__).with_name("steady_trainer.py")
    times = place / "times.jsonl"
    os.environ["HONE_BENCH_TIMES"] = str(times)
    trainer = script(place, f'exec "{sys.executable}" "{worker}" "$@"')
    blocks: dict[bool, list[float]] = {False: [], True: []}
    with server(place / "home", trainer) as address, Client(address) as client:
        job = client.submit(request(place, labels={"steps": str(steps)}))
        wait_for(times, 10, client, job.id)
        for watched in (False, True, True, False, False, True, True, False):
            with crowd(address, job.id, WATCHERS if watched else 0):
                first = lines(times)
                wait_for(times, first + STEPS_PER_BLOCK, client, job.id)
                found = [json.loads(line) for line in times.read_text().splitlines()]
                blocks[watched] += found[first : first + STEPS_PER_BLOCK]
        client.cancel(job.id)
        client.wait(job.id, timeout_s=60)
    without, with_them = blocks[False], blocks[True]
    ratio = statistics.median(with_them) / statistics.median(without)
    draws = sorted(
        statistics.median(random.choices(with_them, k=len(with_them)))
        / statistics.median(random.choices(without, k=len(without)))
        for _ in range(2000)
    )
    print(f"step time without watchers {1000 * statistics.median(without):.2f} ms ({len(without)} steps)")
    print(f"with {WATCHERS} watchers          {1000 * statistics.median(with_them):.2f} ms ({len(with_them)} steps)")
    print(f"ratio {ratio:.3f}, 95 % interval {draws[50]:.3f} to {draws[-51]:.3f}")
    return 0


@contextmanager
def crowd(address: str, job: str, size: int) -> Iterator[None]:
    """That many watchers in a process of their own; they are all connected when the block begins."""
    if not size:
        yield
        return
    command = [sys.executable, str(Path(__file__).with_name("crowd.py")), address, job, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline().strip() == "ready"
        yield
        process.terminate()
        answers = process.communicate()[0].strip()
        print(f"  {size} watchers read {answers} events", file=sys.stderr)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(path: Path, count: int, client: Client, job: str) -> None:
    """Until the trainer has written so many lines. Raises RuntimeError when it has ended before."""
    while lines(path) < count:
        time.sleep(0.5)
        if (found := client.get(job)).state.is_terminal:
            raise RuntimeError(f"The trainer has ended: {found.state_reason}")


def request(place: Path, **changes: Any) -> JobSpec:
    """A small request that this machine can run."""
    inputs = place / "inputs"
    (inputs / "model").mkdir(parents=True, exist_ok=True)
    (inputs / "model" / "config.json").write_text(json.dumps(_SHAPE))
    (inputs / "model" / "model.safetensors").write_bytes(b"weights")
    (inputs / "rows.jsonl").write_text('{"text": "one row"}\n')
    return parse(
        {
            "name": "bench",
            "model": {"source": f"file://{inputs / 'model'}"},
            "dataset": {"source": f"file://{inputs / 'rows.jsonl'}"},
            "method": {"sft": {"max_length": 512}},
            "adapter": {"lora": {"rank": 8, "target_modules": ["q_proj", "v_proj"]}},
            "training": {"epochs": 1, "learning_rate": 2e-4, "global_batch_size": 16},
            "compute": {"gpus_per_node": 0},
            **changes,
        }
    )


def script(place: Path, line: str) -> Path:
    path = place / "trainer-python"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


@contextmanager
def server(home: Path, trainer_python: Path) -> Iterator[str]:
    """A server process of its own; its address."""
    environment = {
        **os.environ,
        "HONE_HOME": str(home),
        "HONE_ADDRESS": "127.0.0.1:0",
        "HONE_TRAINER_PYTHON": str(trainer_python),
        "HONE_LOG_LEVEL": "warning",
        "HONE_GRACE_S": "1",
    }
    process = subprocess.Popen([sys.executable, "-c", _SERVE], env=environment)
    while not ((found := owner(home)) and found.address):
        assert process.poll() is None, "the server did not start"
        time.sleep(0.05)
    try:
        yield found.address
    finally:
        with Client(found.address, namespace="warm") as client:
            for job in client.list(filter="state = RUNNING"):
                client.cancel(job.id)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        process.wait(30)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
