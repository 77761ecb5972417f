"""The model card: short, and without paths of the machine that trained."""

from hone import __version__
from hone_trainer.context import RunContext
from hone_trainer.model import public_name

_USE = {
    "adapter": "PeftModel.from_pretrained(base, directory)",
    "merged": "AutoModelForCausalLM.from_pretrained(directory)",
    "model": "AutoModelForCausalLM.from_pretrained(directory)",
}


def card(context: RunContext, *, kind: str) -> str:
    """README.md of one output."""
    spec, base = context.run.spec, context.inputs.model
    training, sft = spec.training, spec.method.sft
    front = ["---", "library_name: peft" if kind == "adapter" else "library_name: transformers"]
    if base.asked.startswith("hf://"):
        front.append(f"base_model: {public_name(base)}")
    lines = [
        *front,
        "tags: [hone, sft]",
        "---",
        "",
        f"# {spec.name}",
        "",
        f"{'LoRA adapter' if kind == 'adapter' else 'Model'} trained by supervised fine-tuning with Hone "
        f"{__version__}.",
        "",
        f"- base: {public_name(base)}{f' at {base.revision}' if base.revision else ''}",
        f"- learning rate {training.learning_rate:g}, {training.scheduler}, seed {training.seed}, "
        f"{context.run.launch.global_batch_size} rows a step, max_length {sft.max_length if sft else ''}",
    ]
    if spec.adapter:
        lora = spec.adapter.lora
        lines.append(f"- LoRA rank {lora.rank}, alpha {lora.alpha:g}, targets {', '.join(lora.target_modules)}")
    return "\n".join([*lines, "", f"Use: `{_USE[kind]}`", ""])
