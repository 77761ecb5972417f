"""The job of examples/quickstart.yaml as a person would write it with TRL alone: the overhead benchmark's baseline.

Called by bench.py and by people. It does nothing for comparison's sake that such a script would not do: it loads the
two files and the base, gives SFTTrainer a LoRA configuration, trains and saves. Only the clock is added, a callback of
two lines. The last line of its output is one JSON object.
"""

import time

STARTED = time.time()  # before the imports: they are part of the time to the first step

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.first_step_at = 0.0
        self.ended: list[float] = []
        """Seconds since 1970."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.first_step_at = self.first_step_at or time.time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended.append(time.time())


def main() -> None:
    arguments = parse_arguments()
    files = {split: str(arguments.data / f"{split}.jsonl") for split in ("train", "eval")}
    rows = load_dataset("json", data_files=files, cache_dir=str(arguments.output / "datasets"))
    prompts = rows["eval"]["prompt"][:: max(1, len(rows["eval"]) // max(1, arguments.samples))][: arguments.samples]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    if arguments.method == "reward":
        set_seed(arguments.seed)  # its head starts from random weights
        model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    answers_before = [answer(model, tokenizer, prompt) for prompt in prompts]
    clock = Clock()
    config, trainer_class, own = {
        "sft": (SFTConfig, SFTTrainer, {"packing": arguments.packing, "completion_only_loss": True}),
        "dpo": (DPOConfig, DPOTrainer, {}),
        "reward": (RewardConfig, RewardTrainer, {}),
    }[arguments.method]
    trainer = trainer_class(
        model=model,
        args=config(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=64,
            gradient_accumulation_steps=arguments.accumulation,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.warmup_ratio,
            max_length=arguments.max_length,
            gradient_checkpointing=False,
            bf16=arguments.bf16,
            use_cpu=not arguments.bf16,
            logging_steps=arguments.logging_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=arguments.seed,
            **own,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=arguments.rank,
            lora_alpha=arguments.alpha,
            target_modules="all-linear",
            task_type="SEQ_CLS" if arguments.method == "reward" else "CAUSAL_LM",
        ),
        callbacks=[clock],
    )
    evaluated_s = -time.perf_counter()
    eval_loss_before = trainer.evaluate()["eval_loss"] if arguments.eval else None
    evaluated_s += time.perf_counter()
    result = trainer.train()
    eval_loss_after = trainer.evaluate()["eval_loss"] if arguments.eval else None
    trainer.save_model(str(arguments.output / "adapter"))
    for prompt, before in zip(prompts, answers_before, strict=True):
        print(f"{prompt.strip()}\n   base     {before}\n   adapter  {answer(trainer.model, tokenizer, prompt)}")
    steps_s = [after - before for before, after in zip(clock.ended, clock.ended[1:], strict=False)]
    report = {
        "time_to_first_step_s": clock.first_step_at - STARTED,  # from this script's first line
        "ended_at": clock.ended,
        "train_s": result.metrics["train_runtime"],
        "eval_s": evaluated_s if arguments.eval else None,
        "step_median_s": sorted(steps_s)[len(steps_s) // 2] if steps_s else math.nan,
        "train_loss": result.training_loss,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss_before": eval_loss_before,
        "eval_loss_after": eval_loss_after,
    }
    print(json.dumps(report))


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The likeliest answer, word by word (greedy)."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        tokens = model.generate(
            **inputs, max_new_tokens=40, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id
        )
    return repr(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--method", choices=("sft", "dpo", "reward"), default="sft", help="(default: %(default)s)")
    parser.add_argument("--model", type=Path, default=EXAMPLES / "base" / "stdlib-4m", help="the base")
    parser.add_argument("--data", type=Path, default=EXAMPLES / "data" / "stdlib", help="train.jsonl and eval.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at once (default: %(default)s)")
    parser.add_argument("--accumulation", type=int, default=1, help="batches a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (default: %(default)s)")
    parser.add_argument("--warmup-ratio", type=float, default=0.1, help="of the steps (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="on a GPU, in bf16 (default: on the CPU, in float32)")
    parser.add_argument("--packing", action="store_true", help="several rows in one sequence")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (default: %(default)s)")
    parser.add_argument("--alpha", type=int, default=32, help="of LoRA (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    parser.add_argument("--logging-steps", type=int, default=10, help="steps between losses (default: %(default)s)")
    parser.add_argument("--eval", action="store_true", help="eval loss before and after")
    parser.add_argument("--samples", type=int, default=0, help="held-out prompts answered before and after")
    return parser.parse_args()


if __name__ == "__main__":
    main()
