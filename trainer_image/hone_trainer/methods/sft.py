"""Supervised fine-tuning (SFT) on TRL's trainer. Read from top to bottom; run(context) is what a worker calls."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from hone_trainer import outputs
from hone_trainer.arguments import training_arguments
from hone_trainer.collate import Collator, FlatCollator, PackedCollator
from hone_trainer.context import RunContext
from hone_trainer.course import follow
from hone_trainer.data import Prepared, as_dataset, prepare, prepare_rows, tell_rows
from hone_trainer.model import check_model, load_tokenizer
from hone_trainer.trained import trained_model
from hone_trainer.training import Watch
from hone_trainer.world import agree


def run(context: RunContext) -> None:
    """Train, evaluate, save and check; leaves outputs and worker.json in scratch for the supervisor."""
    clock = outputs.Clock()

    context.phase("data")
    check_model(context.inputs.model)
    tokenizer = load_tokenizer(context.inputs.tokenizer, context.run.spec.model)
    data = prepare(context, partial(prepare_rows, context, tokenizer), tell=tell_rows)
    agree(context.run.launch, "the data set", data.fingerprint)
    clock.mark("data")

    context.phase("model")
    arguments = training_arguments(
        SFTConfig,
        context,
        has_evaluation=data.evaluation is not None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    model, parameters = trained_model(context, tokenizer)
    trainer = _trainer(context, arguments, model, tokenizer, data)
    clock.mark("model")

    follow(context, trainer, tokenizer, data=data, parameters=parameters, clock=clock)


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer on tokens that are ready, with an honest evaluation; it reports through its watch."""

    def __init__(self, *, watch: Watch, eval_collator: Callable[..., dict[str, Any]], **arguments: Any) -> None:
        self.watch = watch
        self._eval_collator = eval_collator
        """Makes padded batches of the evaluation set, which is never packed."""
        super().__init__(callbacks=watch.callbacks, **arguments)
        watch.attach(self)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "seq_lengths", "rows"]

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> torch.Tensor:
        """One forward and backward pass; a loss that is NaN or infinite ends the run before it reaches the weights."""
        rows = self.watch.take(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *arguments, **options)
        return self.watch.checked(loss, step=self.state.global_step + 1, rows=rows)

    def evaluate(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        """Loss per learned token over all evaluation rows: the same for every batch size and number of ranks.

        The mean of batch means, which is the library's, weighs a token by the batch it happens to stand in.
        """
        return self.watch.evaluate(self._measure)

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        totals = torch.zeros(3, dtype=torch.float64)
        """Sum of losses, number of tokens, number of right guesses."""
        trained = self.model.training
        self.model.eval()
        for batch, counts in self.watch.batches(self.eval_dataset, self._eval_collator):
            inputs = {k: v.to(self.args.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            with self.compute_loss_context_manager():
                found = self.model(**inputs, fused_lm_head=True)
            right = found.is_top1.sum().item()
            sums = [-found.log_probs.double().sum().item(), found.label_mask.sum().item(), right]
            totals += torch.tensor(sums if counts else [0.0, 0.0, 0.0])
        self.model.train(trained)
        loss, tokens, right = self.watch.summed(totals)
        return {
            "eval_loss": loss / tokens,
            "eval_perplexity": math.exp(min(loss / tokens, 700.0)),
            "eval_accuracy": right / tokens,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand figures to the callbacks without TRL's own counters, which are not right for packed rows."""
        self._metrics["train"].clear()
        super().log(logs, start_time)


def _trainer(context: RunContext, arguments: Any, model: Any, tokenizer: Any, data: Prepared) -> Trainer:
    return Trainer(
        watch=Watch(context),
        eval_collator=Collator(pad_token_id=tokenizer.pad_token_id),
        model=model,
        args=arguments,
        data_collator=_collator(context, tokenizer),
        train_dataset=as_dataset(data.train, data.fingerprint),
        eval_dataset=as_dataset(data.evaluation, "eval") if data.evaluation is not None else None,
        processing_class=tokenizer,
    )


def _collator(context: RunContext, tokenizer: Any) -> Callable[..., dict[str, Any]]:
    sft = context.run.spec.method.sft
    assert sft is not None
    if not sft.packing:
        return Collator(pad_token_id=tokenizer.pad_token_id)
    if context.run.spec.model.attention == "flash_attention_2":
        return FlatCollator()
    return PackedCollator(pad_token_id=tokenizer.pad_token_id)
