"""The model card: short, and without paths of the machine that trained."""

from hone import __version__
from hone_trainer.base_identity import public_name
from hone_trainer.context import RunContext

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
    "merge": "merged from adapters",
}


def card(context: RunContext, *, kind: str) -> str:
    """README.md of one output."""
    spec, base = context.run.spec, context.inputs.model
    method = spec.method.name
    front = ["---", "library_name: peft" if kind == "adapter" else "library_name: transformers"]
    if base.asked.startswith("hf://"):
        front.append(f"base_model: {public_name(base)}")
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
        f"- base: {public_name(base)}{f' at {base.revision}' if base.revision else ''}"
        f"{f', in 4 bits ({spec.quantization})' if spec.quantization else ''}",
        *(_merged(context) if spec.method.merge else _trained(context)),
    ]
    use = (_USE_OF_SCORES if spec.method.reward else _USE)[kind]
    return "\n".join([*lines, "", f"Use: `{use}`", ""])


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
