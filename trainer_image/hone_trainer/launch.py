"""How a run's processes are started: the command and its environment. Pure; the supervisor starts it.

One process is executed directly (a launcher costs about four seconds); several go through `accelerate launch` with
every value as a flag, so that neither a configuration file of the machine nor a variable of another launcher has a say.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from hone.job import Launch
from hone_trainer.node import Node, cores
from hone_trainer.scrub import without_secrets

RENDEZVOUS_S = 60
"""How long started ranks wait for each other; their supervisors have met before."""

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
}
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=0x2000000"
    ":glibc.malloc.trim_threshold=0x10000000000"
}
"""For CPUs: what a step gives back the next one takes again, so the C library keeps it, but for tensors above 32 MiB,
which come in huge pages. By default it returns the end of its heap to the kernel and asks for it anew, up to 90,000
page faults a second; how often is a lottery that a process keeps for life. docs/trainer.md has figures."""
_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "PET_")


def command(launch: Launch, directory: Path, *, node: Node, threads: int) -> list[str]:
    """The argument list that starts every worker of this machine."""
    worker = [sys.executable, "-m", "hone_trainer.worker", str(directory)]
    if launch.launcher == "direct":
        return worker
    return [
        sys.executable,
        "-m",
        "hone_trainer.launcher",
        # `--cpu` would silently start one process; `--multi_gpu` is torchrun, and the worker chooses gloo on a CPU.
        "--multi_gpu",
        f"--num_processes={launch.world_size}",
        f"--num_machines={launch.nodes}",
        f"--machine_rank={node.rank}",
        f"--main_process_ip={node.main_address}",
        f"--main_process_port={node.main_port}",
        "--rdzv_backend=static",
        f"--rdzv_conf=timeout={RENDEZVOUS_S}",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--num_cpu_threads_per_process={threads}",
        "--max_restarts=0",
        "--module",
        *worker[2:],
    ]


def environment(launch: Launch, scratch: Path, inherited: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """The workers' environment: offline, without telemetry, without secrets, without leftovers of another launcher."""
    kept = {name: value for name, value in without_secrets(inherited).items() if name not in _LAUNCHER_VARIABLES}
    kept = {name: value for name, value in kept.items() if not name.startswith(_LAUNCHER_PREFIXES)}
    extra = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if launch.processes_per_node == 1 else "false",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "PYTHONUNBUFFERED": "1",
    }
    if launch.device == "cpu":
        extra |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        kept = {**KEEP_MEMORY, **kept}
    return {**kept, **_OFFLINE, **extra}


def offline(inherited: Mapping[str, str]) -> dict[str, str]:
    """An environment without secrets in which no library asks the Hub."""
    return {**without_secrets(inherited), **_OFFLINE}


def threads_of(launch: Launch, machine: Mapping[str, str]) -> int:
    """CPU threads of each process: as planned, else the machine's cores shared evenly."""
    return launch.threads_per_process or max(1, cores(machine) // launch.processes_per_node)


def killed_rank(lines: tuple[str, ...]) -> tuple[int, int] | None:
    """Rank and signal of a worker that was killed, from torchrun's last words; None when they name none."""
    found = re.search(r"rank\s*:\s*(\d+) .*\n.*exitcode\s*:\s*-(\d+)", "\n".join(lines))
    return (int(found[1]), int(found[2])) if found else None
