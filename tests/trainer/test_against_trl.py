"""Our PPO beside the one that TRL had until 1.12, in an environment of its own: the task of letters.py by a rule, pairs
of runs from the same base, prompts and settings.

What differs: TRL trains a second model for the values, in full; we a head on the policy. TRL's old probabilities are
those of its sampling, and its whitening and losses are means of a forward pass; ours are of the training's own forward
pass, and of the whole batch. AGAINST_TRL_SEEDS says how many pairs.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from . import letters
from .conftest import MakeAttempt, RunHere, write_rows
from .test_learning import load

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("learning"), pytest.mark.timeout(7200)]
PAIRS = int(os.environ.get("AGAINST_TRL_SEEDS", "8"))
STEPS = 40
T_90 = {4: 1.638, 8: 1.415}
"""Student's t of 90 % from one side, by the number of pairs."""
LEAST = -0.05
SAME = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
"""Libraries that both environments have in one version."""


@pytest.fixture(scope="module")
def trl_python() -> Path:
    """A Python with TRL 1.12 and else the libraries of this one; made once, in the cache of this checkout."""
    place = Path(__file__).parents[2] / ".cache" / "trl-1.12"
    python = place / "bin" / "python"
    if not (place / "made").exists():
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, place], check=True)
        pins = [f"{name}=={version(name)}" for name in SAME]
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "trl==1.12.0", *pins], check=True)
        (place / "made").touch()
    return python


def test_ppo_learns_no_less_than_trls(
    trl_python: Path, make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    pairs = []
    for seed in range(1, PAIRS + 1):
        base = letters.make_base(tmp_path / f"base-{seed}", seed=seed)
        rows = write_rows(tmp_path / f"rows-{seed}.jsonl", letters.answered(7680, seed=seed))
        ours, our_seconds = _ours(make_attempt, run_here, base, rows, seed)
        theirs, their_seconds = _trls(trl_python, base, rows, seed)
        pairs.append((ours, theirs))
        with capsys.disabled():
            print(  # noqa: T201
                f"\nseed {seed}: ours {ours:.3f} in {our_seconds:.0f} s, TRL 1.12 {theirs:.3f} in {their_seconds:.0f} s"
            )
    differences = [ours - theirs for ours, theirs in pairs]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    bound = mean - T_90[PAIRS] * error
    with capsys.disabled():
        print(f"difference {mean:+.3f}, 90 % lower bound {bound:+.3f}")  # noqa: T201
    assert bound >= LEAST


def _ours(make_attempt: MakeAttempt, run_here: RunHere, base: Path, rows: Path, seed: int) -> tuple[float, float]:
    changes = {
        "model": {"source": f"file://{base}"},
        "dataset": {"source": f"file://{rows}"},
        "method": {
            "sft": None,
            "ppo": {
                "rewards": [{"answer": {"column": "completion"}, "weight": 4.0}],
                "batch_size": 128,
                "mini_batch_size": 32,
                "init_kl_coef": 0.2,
                "max_new_tokens": 6,
            },
        },
        "adapter": {"lora": {"rank": 16, "alpha": 32}},
        "training": {"max_steps": STEPS, "learning_rate": 1e-3, "warmup_ratio": 0.1, "seed": seed},
    }
    attempt = make_attempt(changes, micro_batch_size=32)
    began = time.monotonic()
    run_here(attempt)
    seconds = time.monotonic() - began
    adapter = attempt.directory.scratch / "outputs" / "adapter"
    return letters.exact(load(base, adapter), count=500, seed=seed), seconds


def _trls(python: Path, base: Path, rows: Path, seed: int) -> tuple[float, float]:
    script = Path(__file__).with_name("trl_ppo.py")
    words = [str(python), "-W", "ignore", str(script), str(base), str(rows), str(seed), str(STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    return told["exact"], told["seconds"]
