"""The request in TRL's words: what SFTConfig, DPOConfig and RewardConfig have in common. Called by the methods."""

from typing import Any

from hone_trainer import sharding
from hone_trainer.context import RunContext
from hone_trainer.optimizers import transformers_name


def training_arguments(config: Any, context: RunContext, *, has_evaluation: bool, **own: Any) -> Any:
    """A TRL configuration of class `config`, with the method's `own` values.

    What TRL would do beside training (saving, reporting, cards) is off, and rows are cut before TRL sees them. Under
    zero3 it has to be there before a model is loaded: transformers splits weights as it loads them, by these settings.
    """
    run, launch, training = context.run, context.run.launch, context.run.spec.training
    assert training.learning_rate is not None
    evaluates = has_evaluation and training.eval.steps is not None
    # transformers 5.18 renamed it, and warns of the old name; TRL's default is on.
    renamed = "activation_checkpointing" in config.__dataclass_fields__
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    # DeepSpeed's stage 3 gathers weights in hooks that the other way of checkpointing passes by.
    reentrant = sharding.splits_weights(launch) and run.spec.adapter is not None
    return config(
        output_dir=str(context.scratch / "trainer"),
        num_train_epochs=training.epochs or 1.0,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_steps if training.warmup_steps is not None else training.warmup_ratio or 0,
        optim=transformers_name(run.spec, launch),
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        per_device_train_batch_size=launch.micro_batch_size,
        per_device_eval_batch_size=training.eval.batch_size or launch.micro_batch_size,
        gradient_accumulation_steps=launch.gradient_accumulation_steps,
        **{checkpointing: launch.activation_checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": reentrant}},
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
        save_strategy="steps" if training.checkpoint.steps else "no",
        save_steps=training.checkpoint.steps or 1,
        deepspeed=sharding.configuration(launch) if launch.is_sharded else None,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=launch.device == "cuda",
        **({"max_length": None} if "max_length" in config.__dataclass_fields__ else {}),
        **own,
    )
