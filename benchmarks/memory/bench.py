"""Peaks of real shapes on the GPU at hand, from random weights, beside what the plan said of them.

Each case is one `hone run` of a few steps on one GPU: a model of a published shape whose weights are random, rows that
fill the sequence, the method and adapter of the case. Printed, and written with --json: what PyTorch's allocator had
allocated and reserved at its peak (result.json), the plan's figure for the same, and their ratio; the median step time.

    python benchmarks/memory/bench.py [--only TEXT] [--seconds 420] [--json FILE]

Needs a GPU and no network. A case that does not begin within --seconds is left out and said to be. The plan counts what
the whole device holds, so the CUDA context, which the allocator does not see, is taken from it before they are held
side by side. Models and runs are made in a temporary directory and removed again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # before what is imported from there

from hone.modelinfo.sources import shipped_configs  # noqa: E402
from hone.plan.memory import GIB  # noqa: E402

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
HONE = [sys.executable, "-c", "from hone.cli import main; main()"]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls", "on", "roofs"]


@dataclass(frozen=True)
class Case:
    """One run."""

    shape: str
    """Of shapes.yaml."""
    adapter: str
    length: int
    batch: int
    method: str = "sft"
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    packing: bool = False
    steps: int = 8
    """The first three are left out of the step time."""

    @property
    def name(self) -> str:
        """`Llama-3.2-1B sft lora 4 × 1024`, and what else it sets."""
        words = [self.shape.partition("/")[2], self.method, self.adapter, f"{self.batch} × {self.length}"]
        words += [f"{key}={value}" for key, value in {**self.training, **self.lora}.items()]
        return " ".join(words + ["packing"] * self.packing)


ONE_B, SMALL, MISTRAL, LLAMA = (
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen2.5-0.5B",
    "mistralai/Mistral-7B-v0.3",
    "meta-llama/Llama-3.1-8B",
)
OFF = {"activation_checkpointing": False}
ON = {"activation_checkpointing": True}
CASES = (
    Case(ONE_B, "lora", 1024, 4, training=OFF),
    Case(ONE_B, "lora", 1024, 4, training=ON),
    Case(ONE_B, "qlora", 1024, 4, training=ON),
    Case(ONE_B, "full", 1024, 4, training=ON),
    Case(ONE_B, "full", 1024, 4, training={**ON, "optimizer": "paged_adamw_8bit"}),
    Case(ONE_B, "full", 1024, 4, training={**ON, "optimizer": "adamw_bf16_sr"}),
    Case(ONE_B, "lora", 1024, 2, method="dpo", training=ON),
    Case(ONE_B, "lora", 1024, 2, method="reward", training=ON),
    Case(ONE_B, "lora", 2048, 8, training=OFF),
    Case(ONE_B, "lora", 1024, 4, training=OFF, lora={"dropout": 0.05}),
    Case(MISTRAL, "qlora", 2048, 4, training=ON),
    Case(MISTRAL, "lora", 2048, 4, training=ON),
    Case(MISTRAL, "lora", 1024, 2, training=OFF),
    Case(LLAMA, "lora", 2048, 2, training=ON),
    Case(LLAMA, "qlora", 1024, 2, method="dpo", training=ON),
    Case(SMALL, "full", 1024, 8, training=OFF),
    Case(SMALL, "lora", 2048, 8, training=OFF, packing=True),
)


def main() -> None:
    """Run the cases and print what they took."""
    arguments = _arguments()
    began, rows, left = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as directory:
        made: tuple[str, Path] | None = None
        for case in (case for case in CASES if arguments.only in case.name):
            if time.monotonic() - began > arguments.seconds:
                left.append(case.name)
                continue
            if made is None or made[0] != case.shape:
                if made:
                    shutil.rmtree(made[1])
                made = (case.shape, make_model(Path(directory) / "model", case.shape))
            rows.append(run(case, made[1], Path(directory)))
            print(line(rows[-1]), flush=True)
            save(arguments.json, rows, left)  # a run may be cut off
    for name in left:
        print(f"left out for want of time: {name}")
    save(arguments.json, rows, left)


def save(path: Path | None, rows: list[dict[str, Any]], left: list[str]) -> None:
    """Every figure, where it is asked for."""
    if path:
        path.write_text(json.dumps({"cases": rows, "left_out": left}, indent=1), encoding="utf-8")


def make_model(path: Path, shape: str) -> Path:
    """Random weights in bf16, made on the GPU, with a byte tokenizer that fits any vocabulary."""
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "from tests.trainer.conftest import make_tokenizer\n"
        "values = json.loads(sys.argv[2])\n"
        "torch.set_default_device('cuda')\n"
        "kind, ids = values.pop('model_type'), {'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 2}\n"
        "config = AutoConfig.for_model(kind, **values, **ids)\n"
        "AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])\n"
        "make_tokenizer().save_pretrained(sys.argv[1])\n"
    )
    values = dict(shipped_configs()[shape])
    command = [sys.executable, "-c", script, str(path), json.dumps(values)]
    subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return path


def run(case: Case, model: Path, directory: Path) -> dict[str, Any]:
    """One `hone run`; what it took, and what was planned."""
    home = Path(tempfile.mkdtemp(dir=directory))
    (home / "rows.jsonl").write_text("".join(json.dumps(row(case, i)) + "\n" for i in range(64)), encoding="utf-8")
    request = request_of(case, model=f"file://{model}", rows=f"file://{home / 'rows.jsonl'}")
    (home / "request.json").write_text(json.dumps(request), encoding="utf-8")
    done = subprocess.run(
        [*HONE, "run", str(home / "request.json"), "--json"],
        capture_output=True, text=True, env={**ENVIRONMENT, "HONE_HOME": str(home)}, check=False, cwd=ROOT,
    )  # fmt: skip
    found: dict[str, Any] = {"case": case.name, "exit_code": done.returncode}
    if done.returncode:
        return {**found, "error": (done.stdout + done.stderr)[-3000:]}
    job = json.loads(done.stdout)
    (result_file,) = home.glob("artifacts/*/*/result.json")
    result = json.loads(result_file.read_text(encoding="utf-8"))
    (events_file,) = home.glob("runs/*/*/attempt-1/events.jsonl")
    events = [json.loads(text) for text in events_file.read_text(encoding="utf-8").splitlines()]
    ends = [datetime.fromisoformat(event["time"]).timestamp() for event in events if event["type"] == "progress"]
    steps = [after - before for before, after in pairwise(ends[2:])]
    plan = job["plan"]
    context = sum(item["size_bytes"] for item in plan["memory"] if item["name"] in ("context", "margin"))
    return {
        **found,
        "allocated_bytes": result["peak_memory_bytes"]["gpu"],
        "reserved_bytes": result["peak_memory_bytes"]["gpu_reserved"],
        "host_bytes": result["peak_memory_bytes"]["host"],
        "planned_bytes": plan["peak_bytes"] - context,
        "planned": {item["name"]: item["size_bytes"] for item in plan["memory"]},
        "planned_host_bytes": plan["host_memory_bytes"],
        "step_s": statistics.median(steps),
        "losses": [event["metrics"]["loss"] for event in events if event["type"] == "progress"],
        "durations_s": result["durations_s"],
        "trained": result["parameters"],
    }


def request_of(case: Case, *, model: str, rows: str) -> dict[str, Any]:
    """What `hone run` is given."""
    adapters = {"lora": {"adapter": {"lora": {"rank": 16, **case.lora}}}, "full": {}}
    adapters["qlora"] = {**adapters["lora"], "quantization": "nf4"}
    return {
        "name": "peak",
        "model": {"source": model},
        "dataset": {"source": rows},
        "method": {case.method: {"max_length": case.length, **({"packing": True} if case.packing else {})}},
        "training": {"max_steps": case.steps, "learning_rate": 1e-5, "micro_batch_size": case.batch, **case.training},
        "reporting": {"logging_steps": 1},
        "compute": {"gpus_per_node": 1},
        **adapters[case.adapter],
    }


def row(case: Case, number: int) -> dict[str, str]:
    """A row that fills the sequence, or a third of it where rows are packed."""
    characters = case.length // 3 if case.packing else case.length
    text = " ".join(WORDS[(number * 7 + i * 3) % len(WORDS)] for i in range(characters // 4))[:characters]
    half = text[: len(text) // 2], text[len(text) // 2 : -8]
    if case.method == "sft":
        return {"prompt": half[0], "completion": half[1]}
    return {"prompt": half[0], "chosen": half[1], "rejected": half[1][::-1]}


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    if "error" in found:
        return f"{found['case']}: ended with {found['exit_code']}\n{found['error']}"
    ratio = found["planned_bytes"] / found["reserved_bytes"]
    return (
        f"{found['case']:70} allocated {found['allocated_bytes'] / GIB:6.2f} reserved "
        f"{found['reserved_bytes'] / GIB:6.2f} planned {found['planned_bytes'] / GIB:6.2f} GiB "
        f"({ratio:.2f} of reserved)  {found['step_s'] * 1000:7.1f} ms a step"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--seconds", type=float, default=420, help="no case begins later (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    return parser.parse_args()


if __name__ == "__main__":
    main()
