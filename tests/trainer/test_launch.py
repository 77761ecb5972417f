import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hone.job import Launch
from hone_trainer.launch import command, environment, killed_rank, threads_of
from hone_trainer.node import Node

ONE = Launch(
    launcher="direct", strategy="none", device="cpu", nodes=1, processes_per_node=1, gpus_per_node=0, precision="fp32",
    micro_batch_size=1, gradient_accumulation_steps=1, activation_checkpointing=False,
)  # fmt: skip
TWO = replace(ONE, launcher="accelerate", strategy="ddp", processes_per_node=2)


@pytest.mark.parametrize("module", ["pod", "supervisor", "worker", "trial"])
def test_what_starts_and_watches_a_run_takes_no_seconds_to_import(module: str) -> None:
    script = f"import sys, hone_trainer.{module}; sys.exit(bool({{'torch', 'transformers'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_one_process_needs_no_launcher() -> None:
    assert command(ONE, Path("/run"), node=Node(), threads=1) == [
        sys.executable,
        "-m",
        "hone_trainer.worker",
        "/run",
    ]


def test_several_processes_leave_nothing_to_a_configuration_file() -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(command(TWO, Path("/run"), node=Node(), threads=1)[3:])
    checked, *_ = _validate_launch_command(arguments)
    assert (checked.num_processes, checked.multi_gpu, checked.mixed_precision) == (2, True, "no")
    assert (checked.module, checked.training_script, checked.training_script_args) == (
        True, "hone_trainer.worker", ["/run"],
    )  # fmt: skip
    assert not checked.cpu  # it would silently start one process


def test_a_node_of_several_says_which_it_is_and_where_the_first_one_is() -> None:
    node = Node(rank=1, main_address="job-a1-0.hone-workers", main_port=29500)
    arguments = command(replace(TWO, nodes=4), Path("/run"), node=node, threads=3)
    assert {
        "--num_processes=8",
        "--num_machines=4",
        "--machine_rank=1",
        "--main_process_ip=job-a1-0.hone-workers",
        "--main_process_port=29500",
        "--rdzv_backend=static",
        "--num_cpu_threads_per_process=3",
    } <= set(arguments)
    assert list(node.ranks(replace(TWO, nodes=4))) == [2, 3]


def test_workers_are_offline_and_tell_nobody(tmp_path: Path) -> None:
    found = environment(ONE, tmp_path, {"HF_HUB_OFFLINE": "0", "PATH": "/bin"}, threads=1)
    assert found["PATH"] == "/bin"
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        assert found[name] == "1"


@pytest.mark.parametrize(
    "leftover", ["WORLD_SIZE", "RANK", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "PET_NNODES"]
)
def test_leftovers_of_another_launcher_are_taken_away(tmp_path: Path, leftover: str) -> None:
    assert leftover not in environment(ONE, tmp_path, {leftover: "7"}, threads=1)


def test_a_cpu_keeps_the_memory_that_the_next_step_needs_unless_somebody_chose_otherwise(tmp_path: Path) -> None:
    script = (
        "import resource, torch\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def step(): return torch.empty(16 << 20, dtype=torch.uint8).fill_(1)\n"
        "step(); before = faults(); [step() for _ in range(20)]; print(faults() - before)"
    )

    def faults(environment: dict[str, str]) -> int:
        done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
        return int(done.stdout)

    inherited = dict(os.environ) | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
    assert faults(environment(ONE, tmp_path, inherited, threads=1)) > 10_000
    del inherited["GLIBC_TUNABLES"]
    assert faults(environment(ONE, tmp_path, inherited, threads=1)) < 1_000
    assert "GLIBC_TUNABLES" not in environment(replace(ONE, device="cuda"), tmp_path, {}, threads=1)


def test_workers_are_not_handed_secrets(tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": "canary-1", "AWS_SECRET_ACCESS_KEY": "canary-2", "HTTPS_PROXY": "http://u:canary-3@proxy"}
    assert "canary" not in str(environment(ONE, tmp_path, secrets, threads=1))


def test_a_cpu_run_sees_no_gpu(tmp_path: Path) -> None:
    assert environment(ONE, tmp_path, {"CUDA_VISIBLE_DEVICES": "0"}, threads=1)["CUDA_VISIBLE_DEVICES"] == ""
    on_gpu = environment(replace(ONE, device="cuda"), tmp_path, {"CUDA_VISIBLE_DEVICES": "0"}, threads=1)
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "0"


def test_cores_are_shared_evenly_and_a_planned_number_is_kept() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_of(ONE, {}) == cores
    assert threads_of(TWO, {}) == max(1, cores // 2)
    assert threads_of(replace(TWO, threads_per_process=5), {}) == 5


def test_the_limit_of_a_container_counts_and_not_the_cores_of_its_machine() -> None:
    assert threads_of(ONE, {"HONE_CPU_LIMIT": "1"}) == 1
    assert threads_of(ONE, {"HONE_CPU_LIMIT": "4096"}) == len(os.sched_getaffinity(0))
    assert threads_of(ONE, {"HONE_CPU_LIMIT": ""}) == len(os.sched_getaffinity(0))


def test_the_rank_that_was_killed_is_read_from_torchruns_last_words() -> None:
    words = """
Other Failures:
[0]:
  time      : 2026-11-24_02:00:00
  rank      : 0 (local_rank: 0)
  exitcode  : 20 (pid: 10)
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_02:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 11)
"""
    assert killed_rank(tuple(words.splitlines())) == (1, 9)
    assert killed_rank(("exitcode  : 1 (pid: 10)",)) is None
