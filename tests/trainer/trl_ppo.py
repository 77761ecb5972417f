"""The task of letters.py by the PPO of TRL 1.12, for test_against_trl.py; run by a Python of its own that has it.

    python trl_ppo.py BASE ROWS SEED STEPS  →  one JSON line: exact, seconds

The same base, prompts in the same order, sizes of batches, passes, coefficients, schedule, rank and rate as our run.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import letters

REWARD = 4.0
END = 1
"""The token that ends an answer."""


class Backbone(nn.Module):
    """Passes the tokens on."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[input_ids.unsqueeze(-1).float()])


class Rule(nn.Module):
    """REWARD for the reversal and its end, at every token of the answer: what TRL takes for a reward model."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        ids = hidden.squeeze(-1).long()
        wanted = torch.cat([ids[:, 1:5].flip(1), torch.full_like(ids[:, :1], END)], dim=1)
        right = (ids[:, 6:11] == wanted).all(1)
        return REWARD * right.float()[:, None, None].expand(*ids.shape, 1)


def main(base: str, rows: str, seed: int, steps: int) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = letters.make_tokenizer()
    tokenizer.padding_side = "left"
    texts = [json.loads(line)["prompt"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    config = PPOConfig(
        output_dir=str(Path(rows).parent / "trl"),
        per_device_train_batch_size=128,
        gradient_accumulation_steps=1,
        num_mini_batches=4,
        num_ppo_epochs=4,
        total_episodes=128 * steps,
        local_rollout_forward_batch_size=128,
        response_length=6,
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=1.0,
        kl_coef=0.2,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.0,
        num_sample_generations=0,
        seed=seed,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=Rule(),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]}),
        eval_dataset=Dataset.from_dict({"input_ids": tokenizer(texts[:8])["input_ids"]}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    share = letters.exact(trainer.model.policy, count=500, seed=seed)
    sys.stdout.write(json.dumps({"exact": share, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
