"""Merging adapters into their base. Read from top to bottom; run(context) is what a worker calls."""

from hone.job import EventType
from hone_trainer import outputs
from hone_trainer.card import Facts
from hone_trainer.context import RunContext
from hone_trainer.lora import rows_needed
from hone_trainer.merging import Part
from hone_trainer.model import check_model, load_tokenizer


def run(context: RunContext) -> None:
    """Merge, save, reload and measure; leaves the output and worker.json in scratch for the supervisor."""
    spec, clock = context.run.spec, outputs.Clock()
    merge = spec.method.merge
    assert merge is not None

    context.phase("model")
    check_model(context.inputs.model)
    grown = [adapter for adapter in context.inputs.adapters if rows_needed([adapter])]  # they have new tokens
    tokenizer = load_tokenizer((grown or [context.inputs.tokenizer])[0], spec.model)
    parts = [
        Part(adapter=source, weight=part.weight)
        for source, part in zip(context.inputs.adapters, merge.adapters, strict=True)
    ]
    if merge.combination == "linear" and len(parts) > 1:
        warning = "linear combines the factors, which has cross terms: the sum of the adapters is what cat gives."
        context.event(EventType.WARNING, warning)
    clock.mark("model")

    context.phase("saving")
    quality = outputs.save_merged(
        context,
        tokenizer,
        parts,
        Facts(),
        combination=merge.combination,
        limit=merge.max_kl,
        fix="Raise method.merge.max_kl, where the model is good enough all the same.",
    )
    clock.mark("saving")
    metrics = {
        "merge": quality,
        "adapters": [{"source": part.adapter.asked, "weight": part.weight} for part in parts],
        "combination": merge.combination,
    }
    outputs.record(context, clock=clock, parameters={}, metrics=metrics, steps={})
