"""How long PlanJob takes for a model of known shape, against an empty call of the same server.

    .venv/bin/python benchmarks/plan/bench.py

One server process on loopback, one client, one call at a time, rounds interleaved; requests differ in their learning
rate, batch and length, so that nothing of them is remembered. "Empty" is grpc.health.v1.Health/Check. Printed: median
and 99th percentile in milliseconds, and the ratio to the empty call's.
"""

import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hone.rpc.access import Access
from hone.rpc.channel import channel_options
from hone.rpc.client import Client
from hone.spec import JobSpec
from hone.spec.parse import parse

sys.path.insert(0, str(Path(__file__).parents[1] / "service"))

from bench import script, server

ROUNDS, CALLS = 5, 200
MODELS = ("mistralai/Mistral-7B-v0.3", "meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen2.5-0.5B")


def main() -> int:
    """Print the table."""
    place = Path(tempfile.mkdtemp(prefix="hone-bench-"))
    times: dict[str, list[float]] = {name: [] for name in ("empty", *MODELS)}
    try:
        with (
            server(place / "home", script(place, "exit 0")) as address,
            Client(address) as client,
            grpc.insecure_channel(address, options=channel_options(address)) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            metadata = Access().metadata()
            for _ in range(ROUNDS):
                times["empty"] += timed(lambda: health.Check(health_pb2.HealthCheckRequest(), metadata=metadata))
                for model in MODELS:
                    specs = iter([request(model) for _ in range(CALLS)])
                    times[model] += timed(lambda specs=specs: client.plan(next(specs)))  # type: ignore[misc]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    empty = statistics.quantiles(times["empty"], n=100)
    print(f"{'':36}{'median':>10}{'p99':>10}   of empty's")
    for name, found in times.items():
        parts = statistics.quantiles(found, n=100)
        ratios = f"{parts[49] / empty[49]:.1f} and {parts[98] / empty[98]:.1f}"
        print(f"{name:36}{1000 * parts[49]:7.2f} ms{1000 * parts[98]:7.2f} ms   {ratios}")
    return 0


def timed(call: Callable[[], object]) -> list[float]:
    """Seconds of each of CALLS calls."""
    found = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def request(model: str) -> JobSpec:
    """A request like no other."""
    return parse(
        {
            "name": "bench",
            "model": {"source": f"hf://{model}"},
            "dataset": {"source": "hf://org/data"},
            "method": {"sft": {"max_length": random.choice([512, 1024, 2048, 4096])}},
            "adapter": {"lora": {"rank": random.choice([8, 16, 32, 64])}},
            "training": {"learning_rate": random.uniform(1e-5, 1e-3), "max_steps": random.randint(10, 10_000)},
            "compute": {"gpu": random.choice(["A100-80GB", "H100-80GB", "L40S"])},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
