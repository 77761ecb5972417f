"""The model card: base, data, settings and figures of one output; without paths of the machine that trained.

Written beside every output, so that what is pushed to the Hub is what the store holds, byte by byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hone import __version__
from hone.spec import Dataset, MixedDataset
from hone_trainer.base_identity import public_name
from hone_trainer.context import RunContext
from hone_trainer.data import Prepared

_USE = {
    "adapter": "PeftModel.from_pretrained(base, directory)",
    "merged": "AutoModelForCausalLM.from_pretrained(directory)",
    "model": "AutoModelForCausalLM.from_pretrained(directory)",
}
_USE_OF_SCORES = {
    "adapter": "base = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1); "
    "base.config.pad_token_id = tokenizer.pad_token_id; PeftModel.from_pretrained(base, directory)",
    "model": "AutoModelForSequenceClassification.from_pretrained(directory)",
}
_METHODS = {
    "sft": "trained by supervised fine-tuning",
    "dpo": "trained by direct preference optimisation",
    "reward": "trained as a reward model",
    "ppo": "trained by proximal policy optimisation (PPO)",
    "grpo": "trained by group relative policy optimisation (GRPO)",
    "merge": "merged from adapters",
}
_KL = {"kl_nats": "from the model as trained", "kl_nats_bf16_base": "from the adapter on the base in bf16"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known at the end of a run only."""

    data: Prepared | None = None
    steps: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """As result.json has them."""


def card(context: RunContext, facts: Facts, *, kind: str) -> str:
    """README.md of one output."""
    spec, base = context.run.spec, context.inputs.model
    method = spec.method.name
    front = ["---", "library_name: peft" if kind == "adapter" else "library_name: transformers"]
    if base.asked.startswith("hf://"):
        front.append(f"base_model: {public_name(base)}")
    asked = [source for source in (context.inputs.dataset, *context.inputs.mixed) if source]
    if named := [public_name(source) for source in asked if source.asked.startswith("hf://")]:
        front.append(f"datasets: [{', '.join(named)}]")
    what = "LoRA adapter" if kind == "adapter" else "Model"
    lines = [
        *front,
        f"tags: [hone, {method}]",
        "---",
        "",
        f"# {spec.name}",
        "",
        f"{what} {_METHODS.get(method, f'trained by {method}')} with Hone {__version__}.",
        "",
        f"- base: {public_name(base)}{_at(base.revision)}"
        f"{f', in 4 bits ({spec.quantization})' if spec.quantization else ''}",
        *(_merged(context) if spec.method.merge else [*_data(context, facts), *_trained(context)]),
        *_results(facts),
    ]
    use = (_USE_OF_SCORES if spec.method.reward else _USE)[kind]
    return "\n".join([*lines, "", f"Use: `{use}`", ""])


def _data(context: RunContext, facts: Facts) -> list[str]:
    """The data sets by their public names, with revision, split and rows."""
    spec, inputs, data = context.run.spec.dataset, context.inputs, facts.data
    if spec is None or inputs.dataset is None or data is None:
        return []
    chosen: list[Dataset | MixedDataset] = [spec, *spec.mix]
    parts = zip(chosen, [inputs.dataset, *inputs.mixed], strict=True)
    lines = [
        f"- data: {public_name(source)}{_at(source.revision)}, split {part.split}"
        f"{f', weight {part.weight:g}' if spec.mix else ''}"
        for part, source in parts
    ]
    used, rows = data.train_counts.rows_used, data.train_counts.rows
    lines.append(f"- trained on {used:,} of {rows:,} rows; SHA-256 of their tokens {data.fingerprint}")
    if data.eval_counts:
        other = inputs.eval_dataset
        where = f"{public_name(other)}{_at(other.revision)}" if other else "rows held out of the same data"
        lines.append(f"- evaluated on {data.eval_counts.rows_used:,} rows: {where}")
    return lines


def _results(facts: Facts) -> list[str]:
    """Losses before and after, and how exact a merge is; what was not measured is not mentioned."""
    metrics, lines = facts.metrics, []
    if facts.steps:
        losses = [metrics.get("first_loss"), metrics.get("last_loss")]
        lines.append(f"- {facts.steps:,} steps, training loss {_change(losses)}")
    before, after = metrics.get("eval_before") or {}, metrics.get("eval_after") or {}
    for name, text in (
        ("eval_loss", "evaluation loss"),
        ("eval_rewards/accuracies", "held-out pairs in the right order"),
        ("eval_reward", "reward of answers to held-out prompts"),
    ):
        if name in after:
            lines.append(f"- {text} {_change([before.get(name), after[name]])}")
    if merge := metrics.get("merge"):
        figures = ", ".join(f"{value:.2g} {_KL[name]}" for name, value in merge.items() if name in _KL)
        lines.append(f"- merged; divergence in nats a token: {figures}")
    return lines


def _at(revision: str) -> str:
    return f" at {revision}" if revision else ""


def _change(values: list[float | None]) -> str:
    return " → ".join(f"{value:.4g}" for value in values if value is not None) or "not measured"


def _trained(context: RunContext) -> list[str]:
    spec, training = context.run.spec, context.run.spec.training
    part = spec.method.sft or spec.method.dpo or spec.method.reward
    lines = [
        f"- learning rate {training.learning_rate:g}, {training.scheduler}, seed {training.seed}, "
        f"{context.run.launch.global_batch_size} rows a step{f', max_length {part.max_length}' if part else ''}"
    ]
    if context.inputs.adapters:
        lines.append(f"- goes on from the adapter {public_name(context.inputs.adapters[0])}")
    if spec.adapter:
        lora = spec.adapter.lora
        lines.append(f"- LoRA rank {lora.rank}, alpha {lora.alpha:g}, targets {', '.join(lora.target_modules)}")
    return lines


def _merged(context: RunContext) -> list[str]:
    merge = context.run.spec.method.merge
    assert merge is not None
    parts = zip(context.inputs.adapters, merge.adapters, strict=True)
    lines = [f"- adapter: {public_name(source)}, weight {part.weight:g}" for source, part in parts]
    return [*lines, f"- combined by {merge.combination}"] if len(lines) > 1 else lines
