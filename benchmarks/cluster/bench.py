"""What the service costs beside a bare client of the same API server: time to a Job, bursts, a thousand live jobs.

    .venv/bin/python -m benchmarks.cluster.bench [idle] [burst] [live] [steady] [churn] [--json FILE]

Needs the cluster of `make cluster`, or that of KUBECONFIG, and loads nothing of it but the API server. Without a part
named, all of them run, in that order. The service is a process of this tree with TLS, tokens and SQLite. Its Jobs are
created suspended (serve.py: there is no Kueue here to do it), so none of them is ever scheduled. The bare client
(bare.py) creates Jobs of the same body over the same HTTP library, from as many threads as the reconciler has workers.

- idle: one job at a time, from CreateJob's answer to the Job's event in a watch of the benchmark's own; beside it one
  bare Job at a time, from its request to its event. Wanted: at most 300 ms at the median.
- burst: --burst calls of CreateJob at once, no two alike, from the first call to the last Job's event; the same for the
  bare client, in the order A-B-B-A. With each its own processor time for a Job, which a busy machine changes less.
  Wanted: at least 0.8 of the bare client's rate.
- live: with --live jobs, ListJobs by pages of 50 and as one page of all, an empty call alone, and the same call while
  20 callers watch and two list without a pause; the memory of the service. Wanted: less than 300 MiB, and a p99 of
  100 ms for a page.
- steady: requests to the API server in --minutes, of two services with --live jobs and with ten, each counted by a
  proxy in front of it. Wanted: at most 10 % more. A watch lasts two minutes and everything is listed again after ten,
  so that less than twelve minutes count roughly.
- churn: jobs of one request are created, cancelled and deleted, --rounds times 50; what the service's memory grows by
  after the third, for each job. Wanted: less than 50 KiB, half of what a live one takes.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from benchmarks.cluster import bare
from benchmarks.cluster.place import Eye, Place, Service, open_place
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.cluster.fault_proxy import FaultProxy
from tests.cluster.harness import access
from tests.cluster.harness.failure import CannotStart

from hone.machine import plan_here
from hone.manifests import render_job
from hone.reconcile import NUM_WORKERS
from hone.rpc import calls
from hone.rpc.async_client import AsyncClient
from hone.run import Run
from hone.spec import JobSpec
from hone.spec.parse import parse
from hone.v1 import training_service_pb2_grpc

FEW = 10
WATCHERS = 20
CHURNED = 50
WARM_ROUNDS = 3
SETTLED_S = 3.0
_SPEC: dict[str, Any] = {
    "name": "bench",
    "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
    "dataset": {"source": "hf://HuggingFaceH4/ultrachat_200k", "split": "train_sft[:5000]"},
    "method": {"sft": {"packing": True, "max_length": 2048}},
    "adapter": {"lora": {"rank": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}},
    "training": {"epochs": 1, "learning_rate": 2e-4},
    "scheduling": {"queue": "nightly"},
    "output": {"merged": True},
}

Result = dict[str, float]


def main() -> int:
    """Run the parts that are asked for; 1 when one misses what is wanted."""
    arguments = _arguments()
    try:
        cluster = access.find()
    except CannotStart as error:
        sys.exit(str(error))
    if cluster is None:
        sys.exit("There is no cluster: `make cluster` makes one, or set KUBECONFIG.")
    results: dict[str, Result] = {}
    with open_place(cluster) as place, Field(place, arguments) as field:
        for name, (part, _) in PARTS.items():
            if name in (arguments.parts or PARTS):
                results[name] = part(field)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    missed = [name for name, result in results.items() if not PARTS[name][1](result)]
    print(f"\nwanted: {'NO: ' + ', '.join(missed) if missed else 'yes'}")
    return 1 if missed else 0


class Field:
    """One service and its namespace, in which jobs gather from part to part."""

    def __init__(self, place: Place, arguments: argparse.Namespace) -> None:
        self.place, self.arguments = place, arguments
        self.namespace = place.new_namespace()
        self.service = Service(place, self.namespace)
        self._stack = ExitStack()

    def __enter__(self) -> "Field":
        self._stack.enter_context(self.service)
        self.eye = self._stack.enter_context(closing(Eye(self.place, self.namespace)))
        self.fill(1)  # the first one also warms connections, imports and the look-up of its caller
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fill(self, count: int) -> None:
        """Have that many live jobs."""
        if (missing := count - len(self.eye.seen)) > 0:
            asyncio.run(submit(self.service, missing))
            self.eye.wait(count)
            time.sleep(SETTLED_S)


def idle(field: Field) -> Result:
    """One at a time."""
    other = field.place.new_namespace()
    hone, plain = [], []
    with closing(Eye(field.place, other)) as eye, closing(bare.Client(1, field.place.cluster.kubeconfig)) as client:
        jobs = bodies(field.place, other, field.arguments.idle)
        client.connect()
        for number, job in enumerate(jobs, 1):
            already = len(field.eye.seen)
            asyncio.run(submit(field.service, 1))
            answered = time.perf_counter()
            field.eye.wait(already + 1)
            hone.append(1000 * (max(field.eye.seen.values()) - answered))
            time.sleep(0.3)
            asked = time.perf_counter()
            client.create(job)
            eye.wait(number)
            plain.append(1000 * (max(eye.seen.values()) - asked))
    field.place.empty(other)
    result = {
        "hone_ms": statistics.median(hone),
        "hone_p90_ms": quantile(hone, 0.9),
        "bare_ms": statistics.median(plain),
    }
    print(f"idle, {len(hone)} times: a Job is there {result['hone_ms']:.0f} ms after CreateJob's answer (median; p90 "
          f"{result['hone_p90_ms']:.0f}); a bare one {result['bare_ms']:.0f} ms after its request")  # fmt: skip
    return result


def burst(field: Field) -> Result:
    """Many at once, A-B-B-A."""
    count = field.arguments.burst
    found: dict[str, list[tuple[float, float]]] = {"A": [], "B": []}
    other = field.place.new_namespace()
    for kind in "ABBA":
        found[kind].append(hone_burst(field, count) if kind == "A" else bare_burst(field, other, count))
        print(f"  {'hone' if kind == 'A' else 'bare'}: {found[kind][-1][0]:.0f} Jobs/s", flush=True)
        time.sleep(SETTLED_S)
    hone, hone_ms = (statistics.mean(values) for values in zip(*found["A"], strict=True))
    plain, plain_ms = (statistics.mean(values) for values in zip(*found["B"], strict=True))
    print(f"burst of {count}: {hone:.0f} Jobs/s ({hone_ms:.1f} ms of processor time a Job), bare client {plain:.0f} "
          f"({plain_ms:.1f}), ratio {hone / plain:.2f}")  # fmt: skip
    rates = {"hone_per_s": hone, "bare_per_s": plain, "ratio": hone / plain}
    return {**rates, "hone_cpu_ms": hone_ms, "bare_cpu_ms": plain_ms}


def hone_burst(field: Field, count: int) -> tuple[float, float]:
    """Jobs a second, from the first call to the last Job's event; milliseconds of the service's processor for each."""
    already, used = len(field.eye.seen), field.service.processor_s()
    started = time.perf_counter()
    acknowledged = asyncio.run(submit(field.service, count))
    field.eye.wait(already + count)
    took = max(field.eye.seen.values()) - started
    print(f"  acknowledged at {count / (acknowledged - started):.0f}/s", flush=True)
    return count / took, 1000 * (field.service.processor_s() - used) / count


def bare_burst(field: Field, namespace: str, count: int) -> tuple[float, float]:
    """The same of the bare client, in a process of its own; its Jobs are deleted again."""
    file = field.place.directory / "jobs.jsonl"
    file.write_text("".join(json.dumps(job) + "\n" for job in bodies(field.place, namespace, count)))
    command = [sys.executable, "-m", bare.__name__, str(file), str(NUM_WORKERS), str(field.place.cluster.kubeconfig)]
    with closing(Eye(field.place, namespace)) as eye:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin and process.stdout and process.stdout.readline().strip() == "ready"
            started = time.perf_counter()
            process.stdin.write("go\n")
            process.stdin.flush()
            eye.wait(count)
            used = float(process.stdout.readline())
        assert process.returncode == 0
        took = max(eye.seen.values()) - started
    field.place.empty(namespace)
    return count / took, 1000 * used / count


def live(field: Field) -> Result:
    """Calls and memory with a thousand jobs."""
    field.fill(field.arguments.live)
    result = asyncio.run(_live(field.service, field.arguments.lists, field.arguments.live))
    result["memory_mib"], result["most_mib"] = field.service.memory_mib()
    print(f"with {len(field.eye.seen)} live jobs (ms)      p50     p99")
    for name, label in _CALLS.items():
        print(f"  {label:32}{result[f'{name}_p50_ms']:7.1f} {result[f'{name}_p99_ms']:7.1f}")
    print(f"  memory {result['memory_mib']:.0f} MiB, at most {result['most_mib']:.0f}")
    return result


_CALLS = {
    "empty": "an empty call",
    "page": "ListJobs, a page of 50",
    "all": "ListJobs, all in one page",
    "busy": "an empty call among the others",
}


async def _live(service: Service, times: int, count: int) -> Result:
    async with service.access.open_aio(service.address) as channel:
        training: Any = training_service_pb2_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]
        health: Any = health_pb2_grpc.HealthStub(channel)
        metadata = service.access.metadata()

        def lister(size: int) -> Callable[[], Awaitable[Any]]:
            request = calls.page(service.namespace, filter="", page_size=size, page_token="").request

            async def ask() -> None:
                answer = await training.ListJobs(request, metadata=metadata)
                assert len(answer.jobs) == min(size, count)

            return ask

        async def empty() -> None:
            await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)

        async def watch() -> None:
            method, request = calls.watch(service.namespace, "", after_seq=0)
            async for _ in getattr(training, method)(request, metadata=metadata):
                pass

        async def for_ever(ask: Callable[[], Awaitable[Any]]) -> None:
            while True:
                await ask()

        found = {"empty": await timed(empty, times), "page": await timed(lister(50), times)}
        found["all"] = await timed(lister(count), max(times // 5, 20))
        others = [asyncio.create_task(watch()) for _ in range(WATCHERS)]
        others += [asyncio.create_task(for_ever(lister(size))) for size in (50, count)]
        await asyncio.sleep(SETTLED_S)
        found["busy"] = await timed(empty, times)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    points = {"p50": 0.5, "p99": 0.99}
    return {f"{name}_{point}_ms": quantile(times, at) for name, times in found.items() for point, at in points.items()}


def steady(field: Field) -> Result:
    """Requests of two services at the same time, one with a hundred times the jobs."""
    field.fill(field.arguments.live)
    seconds = 60 * field.arguments.minutes
    kubeconfig = field.place.cluster.kubeconfig
    with ExitStack() as stack:
        few = stack.enter_context(Service(field.place, field.place.new_namespace()))
        asyncio.run(submit(few, FEW))
        counted = []
        for service in (few, field.service):
            proxy = stack.enter_context(closing(FaultProxy(kubeconfig)))
            service.stop()
            service.start(proxy.configuration.host)
            stack.callback(service.stop)
            counted.append(proxy)
        time.sleep(SETTLED_S)
        before = [proxy.requests.copy() for proxy in counted]
        time.sleep(seconds)
        after = [proxy.requests - earlier for proxy, earlier in zip(counted, before, strict=True)]
    with_few, with_many = (sum(requests.values()) for requests in after)
    result = {"few_per_minute": 60 * with_few / seconds, "many_per_minute": 60 * with_many / seconds}
    result["ratio"] = with_many / max(with_few, 1)
    print(f"requests in {field.arguments.minutes:g} minutes: with {FEW} jobs {with_few} {dict(after[0])}, "
          f"with {len(field.eye.seen)} {with_many} {dict(after[1])}, ratio {result['ratio']:.2f}")  # fmt: skip
    field.service.start()
    return result


def churn(field: Field) -> Result:
    """Create, cancel, delete; memory after each round."""
    with Service(field.place, field.place.new_namespace()) as service:
        memory = [asyncio.run(_churn(service)) for _ in range(field.arguments.rounds)]
    growth = 1024 * (memory[-1] - memory[WARM_ROUNDS - 1]) / (CHURNED * (len(memory) - WARM_ROUNDS))
    print(f"memory over {len(memory)} rounds of {CHURNED} jobs (MiB): {' '.join(f'{each:.0f}' for each in memory)}, "
          f"{growth:.0f} KiB a job")  # fmt: skip
    return {"first_mib": memory[0], "last_mib": memory[-1], "growth_kib": growth}


async def _churn(service: Service) -> float:
    token, ca = service.access.token, service.access.tls_ca
    async with AsyncClient(service.address, namespace=service.namespace, token=token, tls_ca=ca) as client:
        jobs = [await client.submit(parse(_SPEC)) for _ in range(CHURNED)]
        while [job async for job in client.list(filter="state = PENDING")]:
            await asyncio.sleep(0.1)
        for job in jobs:
            await client.cancel(job.id)
        for job in jobs:
            await client.wait(job.id, timeout_s=120)
            await client.delete(job.id)
        while [job async for job in client.list()]:
            await asyncio.sleep(0.1)
    return service.memory_mib()[0]


async def submit(service: Service, count: int) -> float:
    """Submit jobs, all of them at once; when the last one was acknowledged."""
    requests = [calls.submit(service.namespace, varied()).request for _ in range(count)]
    metadata = service.access.metadata()
    async with service.access.open_aio(service.address) as channel:
        training: Any = training_service_pb2_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]
        await asyncio.gather(*(training.CreateJob(request, metadata=metadata) for request in requests))
    return time.perf_counter()


async def timed(ask: Callable[[], Awaitable[Any]], times: int) -> list[float]:
    """Milliseconds of each call, one after the other."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        await ask()
        found.append(1000 * (time.perf_counter() - started))
    return found


def varied() -> JobSpec:
    """A request like no other, as in a sweep."""
    return parse({**_SPEC, "training": {"epochs": 1, "learning_rate": random.uniform(1e-5, 1e-3)}})


def bodies(place: Place, namespace: str, count: int) -> list[dict[str, Any]]:
    """Jobs as the service makes them, each of another request."""
    platform = place.platform(namespace)
    jobs = []
    for number in range(count):
        planned = plan_here(varied(), platform.hardware())
        run = Run(
            namespace=namespace,
            job=f"bare-{number}",
            attempt=1,
            nonce=f"{random.getrandbits(128):032x}",
            spec=planned.spec,
            launch=planned.plan.launch,
            store=platform.store.uri,
            inputs={},
        )
        job = render_job(run, planned.plan, platform, managed=True)
        job["spec"]["suspend"] = True
        jobs.append(job)
    return jobs


def quantile(values: Sequence[float], at: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(int(at * len(values)), len(values) - 1)]


PARTS: dict[str, tuple[Callable[[Field], Result], Callable[[Result], bool]]] = {
    "idle": (idle, lambda found: found["hone_ms"] <= 300),
    "burst": (burst, lambda found: found["ratio"] >= 0.8),
    "live": (live, lambda found: found["page_p99_ms"] <= 100 and found["most_mib"] < 300),
    "steady": (steady, lambda found: found["ratio"] <= 1.1),
    "churn": (churn, lambda found: found["growth_kib"] < 50),
}
"""Each part, and whether it found what is wanted."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all of them without one")
    parser.add_argument("--idle", type=int, default=30, help="jobs of that part")
    parser.add_argument("--burst", type=int, default=500, help="jobs of each burst")
    parser.add_argument("--live", type=int, default=1000, help="live jobs, at most 1000")
    parser.add_argument("--lists", type=int, default=500, help="calls of each kind")
    parser.add_argument("--minutes", type=float, default=12.0, help="how long requests are counted")
    parser.add_argument("--rounds", type=int, default=10, help="of churn")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.rounds <= WARM_ROUNDS:
        parser.error(f"--rounds: more than {WARM_ROUNDS}")
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"{' '.join(unknown)}: the parts are {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
