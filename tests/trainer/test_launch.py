import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hone.job import Launch
from hone_trainer.launch import command, environment, killed_rank, threads

ONE = Launch(
    launcher="direct", strategy="none", device="cpu", nodes=1, processes_per_node=1, gpus_per_node=0, precision="fp32",
    micro_batch_size=1, gradient_accumulation_steps=1, activation_checkpointing=False,
)  # fmt: skip
TWO = replace(ONE, launcher="accelerate", strategy="ddp", processes_per_node=2)


def test_one_process_needs_no_launcher() -> None:
    assert command(ONE, Path("/run")) == [sys.executable, "-m", "hone_trainer.worker", "/run"]


def test_several_processes_leave_nothing_to_a_configuration_file() -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(command(TWO, Path("/run"))[3:])
    checked, *_ = _validate_launch_command(arguments)
    assert (checked.num_processes, checked.multi_gpu, checked.mixed_precision) == (2, True, "no")
    assert (checked.module, checked.training_script, checked.training_script_args) == (
        True, "hone_trainer.worker", ["/run"],
    )  # fmt: skip
    assert not checked.cpu  # it would silently start one process


def test_workers_are_offline_and_tell_nobody(tmp_path: Path) -> None:
    found = environment(ONE, tmp_path, {"HF_HUB_OFFLINE": "0", "PATH": "/bin"})
    assert found["PATH"] == "/bin"
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        assert found[name] == "1"


@pytest.mark.parametrize(
    "leftover", ["WORLD_SIZE", "RANK", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"]
)
def test_leftovers_of_another_launcher_are_taken_away(tmp_path: Path, leftover: str) -> None:
    assert leftover not in environment(ONE, tmp_path, {leftover: "7"})


def test_a_cpu_run_sees_no_gpu(tmp_path: Path) -> None:
    assert environment(ONE, tmp_path, {"CUDA_VISIBLE_DEVICES": "0"})["CUDA_VISIBLE_DEVICES"] == ""
    on_gpu = environment(replace(ONE, device="cuda"), tmp_path, {"CUDA_VISIBLE_DEVICES": "0"})
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "0"


def test_cores_are_shared_evenly_and_a_planned_number_is_kept() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads(ONE) == cores
    assert threads(TWO) == max(1, cores // 2)
    assert threads(replace(TWO, threads_per_process=5)) == 5


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
