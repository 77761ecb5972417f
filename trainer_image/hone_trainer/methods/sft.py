"""Supervised fine-tuning (SFT) on TRL's trainer. Read from top to bottom; run(context) is what a worker calls."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hone.job import EventType
from hone_trainer import outputs
from hone_trainer.collate import Collator, FlatCollator, PackedCollator
from hone_trainer.context import RunContext, interrupted
from hone_trainer.data import Prepared, prepare
from hone_trainer.lora import add_lora
from hone_trainer.model import check_model, count_parameters, load_model, load_tokenizer, train_in_fp32, weights_dtype
from hone_trainer.samples import answer
from hone_trainer.training import Best, Progress, Trainer, without_input_casts


def run(context: RunContext) -> None:
    """Train, evaluate, save and check; leaves outputs and worker.json in scratch for the supervisor."""
    spec, clock = context.run.spec, outputs.Clock()

    context.phase("data")
    check_model(context.inputs.model)
    tokenizer = load_tokenizer(context.inputs.tokenizer, spec.model)
    data = prepare(context, tokenizer)
    clock.mark("data")

    context.phase("model")
    model, trainable, total = _model(context, tokenizer)
    trainer, progress, best = _trainer(context, model, tokenizer, data)
    clock.mark("model")

    _answer(context, trainer, tokenizer, data, when="before")
    before = trainer.evaluate() if spec.training.eval.at_start else None
    clock.mark("before_training")

    context.phase("training")
    with context.stop.deferred(), without_input_casts(trainer.model, active=_autocasts(context)):
        trainer.train()
    if context.stop.asked:
        raise interrupted()
    clock.mark("training")

    steps = trainer.state.global_step
    best_step = best.step if best else None
    moved = best.restore(trainer.model, step=steps) if best else False
    after = _final_evaluation(trainer, moved=moved) if data.evaluation is not None else None
    _answer(context, trainer, tokenizer, data, when="after")
    clock.mark("after_training")

    trainer.accelerator.wait_for_everyone()
    if context.is_main:
        context.phase("saving")
        merge = outputs.save(context, trainer.model, tokenizer)
        clock.mark("saving")
        record = outputs.record(
            context,
            data=data,
            clock=clock,
            parameters={"trainable": trainable, "all": total},
            metrics={
                "first_loss": progress.first_loss,
                "last_loss": progress.last_loss,
                "eval_before": before,
                "eval_after": after,
                "merge": merge,
            },
            steps={"done": steps, "max": trainer.state.max_steps, "best": best_step},
        )
        (context.scratch / "worker.json").write_text(json.dumps(record), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def _model(context: RunContext, tokenizer: Any) -> tuple[Any, int, int]:
    """The model, adapted when asked, and its trainable and total parameters."""
    spec = context.run.spec
    dtype = weights_dtype(context.run.launch, adapted=spec.adapter is not None)
    model = load_model(context.inputs.model, spec.model, dtype=dtype, tokenizer=tokenizer)
    if spec.adapter:
        from transformers import set_seed

        set_seed(spec.training.seed)  # the adapter starts from random weights
        model = add_lora(model, spec.adapter.lora)
    trainable, total = count_parameters(model)
    line = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
    print(line, flush=True)  # noqa: T201
    context.event(EventType.NOTE, line, metrics={"trainable_parameters": float(trainable), "parameters": float(total)})
    return model, trainable, total


def _trainer(context: RunContext, model: Any, tokenizer: Any, data: Prepared) -> tuple[Trainer, Progress, Best | None]:
    """TRL's trainer, with our collator, our report and our idea of what is best."""
    evaluation = context.run.spec.training.eval
    progress = Progress(context)
    best = Best(context, patience=evaluation.early_stopping_patience) if evaluation.keep_best else None
    trainer = Trainer(
        context=context,
        model=model,
        args=_arguments(context, has_evaluation=data.evaluation is not None),
        data_collator=_collator(context, tokenizer),
        train_dataset=_dataset(data.train, data.fingerprint),
        eval_dataset=_dataset(data.evaluation, "eval") if data.evaluation is not None else None,
        processing_class=tokenizer,
        callbacks=[progress, *([best] if best else [])],
    )
    trainer.eval_collator = Collator(pad_token_id=tokenizer.pad_token_id)
    progress.trainer = trainer
    _silence(trainer)
    train_in_fp32(trainer.model)
    return trainer, progress, best


def _final_evaluation(trainer: Trainer, *, moved: bool) -> dict[str, float]:
    """Figures of the weights that are kept; those of the last step may be known already."""
    if trainer.last_eval and trainer.last_eval[0] == trainer.state.global_step and not moved:
        return trainer.last_eval[1]
    return trainer.evaluate()


def _arguments(context: RunContext, *, has_evaluation: bool) -> Any:
    """The request in TRL's words. What TRL would do beside training (saving, reporting, cards) is off."""
    from trl import SFTConfig

    run, launch, training = context.run, context.run.launch, context.run.spec.training
    assert training.learning_rate is not None and run.spec.method.sft is not None
    evaluates = has_evaluation and training.eval.steps is not None
    # transformers 5.18 renamed it, and warns of the old name; TRL's default is on.
    renamed = "activation_checkpointing" in SFTConfig.__dataclass_fields__
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    return SFTConfig(
        output_dir=str(context.scratch / "trainer"),
        num_train_epochs=training.epochs or 1.0,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_steps if training.warmup_steps is not None else training.warmup_ratio or 0,
        optim="adamw_torch_fused",
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        per_device_train_batch_size=launch.micro_batch_size,
        per_device_eval_batch_size=training.eval.batch_size or launch.micro_batch_size,
        gradient_accumulation_steps=launch.gradient_accumulation_steps,
        **{checkpointing: launch.activation_checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": False}},
        ddp_find_unused_parameters=False,
        bf16=launch.precision == "bf16",
        use_cpu=launch.device == "cpu",
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=run.spec.reporting.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.eval.steps if evaluates else None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=launch.device == "cuda",
        max_length=None,  # rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _collator(context: RunContext, tokenizer: Any) -> Callable[..., dict[str, Any]]:
    sft = context.run.spec.method.sft
    assert sft is not None
    if not sft.packing:
        return Collator(pad_token_id=tokenizer.pad_token_id)
    if context.run.spec.model.attention == "flash_attention_2":
        return FlatCollator()
    return PackedCollator(pad_token_id=tokenizer.pad_token_id)


def _dataset(table: Any, fingerprint: str) -> Any:
    """An Arrow table as `datasets` wants it; the fingerprint is given, because making one hashes every byte again."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table), fingerprint=fingerprint)


def _silence(trainer: Trainer) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        with suppress(ValueError):
            trainer.remove_callback(callback)


def _autocasts(context: RunContext) -> bool:
    return context.run.spec.adapter is not None and context.run.launch.precision == "bf16"


def _answer(context: RunContext, trainer: Trainer, tokenizer: Any, data: Prepared, *, when: str) -> None:
    """Answer the sample prompts and report them; the first rank alone, on its own copy of the weights."""
    if not (context.is_main and data.questions):
        return
    limit = context.run.spec.reporting.samples.max_new_tokens
    for question, text in answer(trainer.accelerator.unwrap_model(trainer.model), tokenizer, data.questions, limit):
        context.event(
            EventType.SAMPLE,
            step=trainer.state.global_step,
            fields={"when": when, "prompt": question.prompt, "answer": text, "expected": question.expected},
        )
