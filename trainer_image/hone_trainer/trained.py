"""The model that a request trains: its base, in 4 bits where asked, with a new adapter or the one that it goes on from.

Called by the methods: trained_model(context, tokenizer) for language models; adapt(context, model) and
report_parameters(context, model) for what is loaded otherwise.
"""

from collections.abc import Sequence
from typing import Any

import torch

from hone.job import EventType
from hone.modelinfo import SavedAdapter
from hone.plan.continued import contradictions, lora_of
from hone.run import TrainerExit
from hone.spec import Lora
from hone_trainer import quantization
from hone_trainer.context import RunContext
from hone_trainer.failure import RunFailed
from hone_trainer.lora import add_lora, load_adapter, read_saved, rows_needed, target_modules
from hone_trainer.model import count_parameters, load_model, weights_dtype
from hone_trainer.optimizers import trains_in_bf16
from hone_trainer.sharding import splits_weights
from hone_trainer.vocabulary import token_ids


def trained_model(context: RunContext, tokenizer: Any, *, scores: bool = False) -> tuple[Any, dict[str, int]]:
    """The language model, with `scores` a reward model, adapted when asked, and its parameters, trainable and all,
    which are reported."""
    new = token_ids(tokenizer, context.run.spec.model.new_tokens)
    if new:
        names = ", ".join(context.run.spec.model.new_tokens)
        context.event(EventType.NOTE, f"{len(new)} tokens were added to the vocabulary: {names}.")
    base, task = base_model(context, tokenizer, scores=scores), "SEQ_CLS" if scores else "CAUSAL_LM"
    model = adapt(context, base, task=task, new_tokens=new)
    return model, report_parameters(context, model)


def base_model(context: RunContext, tokenizer: Any, *, scores: bool = False) -> Any:
    """The same as its files have it, in 4 bits where asked."""
    from transformers import set_seed

    spec, launch, source = context.run.spec, context.run.launch, context.inputs.model
    dtype = torch.bfloat16 if trains_in_bf16(spec) else weights_dtype(launch, adapted=spec.adapter is not None)
    config = None
    if spec.quantization:
        quantization.check_quantizable(source, scores=scores)
        config = quantization.nf4_for(launch, scores=scores)
    rows = rows_needed(context.inputs.adapters)
    if rows and splits_weights(launch):
        raise RunFailed(
            TrainerExit.USER,
            f"{context.inputs.adapters[0].asked} has new tokens, which strategy zero3 does not train.",
            fix="Set compute.strategy to zero2 or ddp, or merge the adapter first.",
        )
    device = "cpu" if launch.device == "cpu" else f"cuda:{context.local_rank}"
    set_seed(spec.training.seed)  # a reward model's head starts from random weights
    model = load_model(
        source,
        spec.model,
        dtype=dtype,
        tokenizer=tokenizer,
        quantization=config,
        device=device,
        scores=scores,
        rows=rows,
    )
    if config and device == "cpu":
        quantization.compute_alike(model)
    return model


def adapt(context: RunContext, model: Any, *, task: str = "CAUSAL_LM", new_tokens: Sequence[int] = ()) -> Any:
    """The model with a new adapter, or with the one that model.source names; itself where it is trained in full.

    The adapter is called `default` and trains. Raises RunFailed (USER).
    """
    spec, inputs = context.run.spec, context.inputs
    if spec.adapter is None:
        if inputs.adapters:
            raise RunFailed(
                TrainerExit.USER,
                f"model.source: {inputs.adapters[0].asked} is an adapter, and the request trains a whole model.",
                fix="Add `adapter: {lora: {}}` to go on training the adapter, or merge it first.",
            )
        return model
    lora = spec.adapter.lora
    if not inputs.adapters:
        from transformers import set_seed

        set_seed(spec.training.seed)  # the adapter starts from random weights
        return add_lora(model, lora, task=task, new_tokens=new_tokens)
    [source] = inputs.adapters
    saved = read_saved(source)
    _check_settings(model, saved, lora)
    if (was := saved.identity.get("quantization") or None) != spec.quantization and saved.identity:
        context.event(
            EventType.WARNING,
            f"{source.asked} was trained on {was or 'a base that was not quantized'}; here its base is "
            f"{spec.quantization or 'not quantized'}.",
        )
    return load_adapter(model, source, base=inputs.model, trains=True, dropout=lora.dropout, task=task)


def _check_settings(model: Any, saved: SavedAdapter, asked: Lora) -> None:
    """The plan takes them from the adapter; a request that was edited since is refused."""
    own = lora_of(saved)
    if isinstance(found := target_modules(model, asked), list) and set(found) == set(own.target_modules):
        asked = asked.model_copy(update={"target_modules": own.target_modules})  # the file has names
    if differing := contradictions(asked, own):
        raise RunFailed(TrainerExit.USER, " ".join(map(str, differing)))


def report_parameters(context: RunContext, model: Any) -> dict[str, int]:
    """Trainable parameters and all of them; said as everybody says them."""
    trainable, total = count_parameters(model)
    line = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
    print(line, flush=True)  # noqa: T201
    context.event(EventType.NOTE, line, metrics={"trainable_parameters": float(trainable), "parameters": float(total)})
    return {"trainable": trainable, "all": total}
