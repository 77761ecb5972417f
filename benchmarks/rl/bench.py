"""What a step of PPO is made of: drawing answers, scoring, the forward passes over them, and the updates.

    python benchmarks/rl/bench.py [--steps 6]                                # the demo's base model, on this machine
    python benchmarks/rl/bench.py --gpu meta-llama/Llama-3.2-1B [--steps 6]  # random weights of that shape, bf16

Runs PPO with LoRA by `hone run` and prints the median seconds of each part of a step, the peak of memory beside the
plan's, and how many tokens a second are drawn, beside plain `generate` with sampling of the same batch in the same
process set-up. The first two steps are left out. It needs the demo's base model (`make demo`), or a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # before what is imported from there

from benchmarks.memory.bench import ENVIRONMENT, HONE, WORDS, make_model  # noqa: E402

from hone.plan.memory import GIB  # noqa: E402

BASE = ROOT / "examples/base/stdlib-4m"
ANSWERS, NEW_TOKENS, SKIPPED = 32, 64, 2
PARTS = ("generate_s", "score_s", "forward_s", "update_s")
PLAIN = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompts, new, repeats = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
model = model.to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
rates = []
for _ in range(repeats):
    began = time.monotonic()
    out = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=True, top_k=0, max_new_tokens=new
    )
    new_ids = out[:, inputs.input_ids.shape[1]:].tolist()
    eos = model.config.eos_token_id
    ends = [row.index(eos) + 1 if eos in row else len(row) for row in new_ids]
    rates.append(sum(ends) / (time.monotonic() - began))
print(json.dumps(rates))
"""


def main() -> None:
    """Run PPO, then plain generation, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="SHAPE", help="random weights of a model in shapes.yaml, on this GPU")
    parser.add_argument("--steps", type=int, default=6, help="batches of answers (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        model = make_model(home / "model", arguments.gpu) if arguments.gpu else BASE
        prompts = [" ".join(WORDS[(number * 7 + i * 3) % len(WORDS)] for i in range(24)) for number in range(ANSWERS)]
        report(run(home, model, prompts, arguments), plain(model, prompts, arguments.steps))


def run(home: Path, model: Path, prompts: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """One `hone run`: its plan, its result and the figures of its steps."""
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    ppo = {
        "rewards": [{"regex": {"pattern": "a"}}],
        "batch_size": ANSWERS,
        "mini_batch_size": 8,
        "ppo_epochs": 4,
        "max_prompt_length": 256,
        "max_new_tokens": NEW_TOKENS,
    }
    request = {
        "name": "rl",
        "model": {"source": f"file://{model}"},
        "dataset": {"source": f"file://{rows}"},
        "method": {"ppo": ppo},
        "adapter": {"lora": {"rank": 16}},
        "training": {"max_steps": arguments.steps, "learning_rate": 1e-5, "micro_batch_size": 8},
        "compute": {"gpus_per_node": 1 if arguments.gpu else 0},
    }
    (home / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [*HONE, "run", str(home / "request.json"), "--json"]
    environment = {**ENVIRONMENT, "HONE_HOME": str(home / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    (result,) = home.glob("home/artifacts/*/*/result.json")
    (events,) = home.glob("home/runs/*/*/attempt-1/events.jsonl")
    told = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    return {
        "plan": json.loads(done.stdout)["plan"],
        "peak": json.loads(result.read_text(encoding="utf-8"))["peak_memory_bytes"],
        "steps": [event["metrics"] for event in told if event["type"] == "progress"][SKIPPED:],
    }


def plain(model: Path, prompts: list[str], repeats: int) -> list[float]:
    """Tokens a second of transformers' own sampling, after the first two batches."""
    command = [sys.executable, "-c", PLAIN, str(model), json.dumps(prompts), str(NEW_TOKENS), str(repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    rates: list[float] = json.loads(done.stdout.splitlines()[-1])
    return rates[SKIPPED:]


def report(ran: dict[str, Any], rates: list[float]) -> None:
    """Print what a step is made of."""
    steps = ran["steps"]
    seconds = {name: statistics.median(step[name] for step in steps) for name in PARTS}
    whole = sum(seconds.values())
    for name, value in seconds.items():
        print(f"{name.removesuffix('_s'):10} {value:7.3f} s   {value / whole:4.0%} of a step")
    drawn = statistics.median(ANSWERS * step["answer_tokens"] / step["generate_s"] for step in steps)
    bare = statistics.median(rates)
    print(f"drawing    {drawn:,.0f} tokens/s   plain generate {bare:,.0f}   ratio {drawn / bare:.2f}")
    peak, plan = ran["peak"], ran["plan"]
    context = sum(item["size_bytes"] for item in plan["memory"] if item["name"] in ("context", "margin"))
    if peak["gpu"]:
        print(
            f"memory     {peak['gpu'] / GIB:.2f} GiB allocated, {peak['gpu_reserved'] / GIB:.2f} reserved; "
            f"planned {(plan['peak_bytes'] - context) / GIB:.2f} without context and margin"
        )
    else:
        print(f"memory     {peak['host'] / GIB:.2f} GiB of the process; planned {plan['peak_bytes'] / GIB:.2f}")


if __name__ == "__main__":
    main()
