"""Reward modelling (Bradley-Terry) on TRL's trainer. Read from top to bottom; run(context) is what a worker calls.

The model is the base with a head of one score: in a decoder it sits on the last token, in an encoder on the first. With
an adapter the head is trained in full beside it, and saved with it.
"""

from typing import Any

import torch
from trl import RewardConfig, RewardTrainer

from hone_trainer import outputs
from hone_trainer.arguments import training_arguments
from hone_trainer.collate import PairCollator
from hone_trainer.context import RunContext
from hone_trainer.course import follow
from hone_trainer.data import as_dataset, prepare
from hone_trainer.model import check_model, load_tokenizer, pad_apart
from hone_trainer.pairs import pairs_for, prepare_pairs, tell_whole_pairs
from hone_trainer.preference import check_positions, measure_pairs, pair_figures, without_dropout
from hone_trainer.trained import trained_model
from hone_trainer.training import Watch
from hone_trainer.world import agree


def run(context: RunContext) -> None:
    """Train, evaluate, save and check; leaves outputs and worker.json in scratch for the supervisor."""
    clock = outputs.Clock()

    context.phase("data")
    check_model(context.inputs.model, scores=True)
    tokenizer = pad_apart(load_tokenizer(context.inputs.tokenizer, context.run.spec.model))
    data = prepare(
        context,
        lambda train, held_out: prepare_pairs(*pairs_for(context.run.spec, tokenizer, train), train, held_out),
        tell=tell_whole_pairs,
    )
    agree(context.run.launch, "the data set", data.fingerprint)
    clock.mark("data")

    context.phase("model")
    reward = context.run.spec.method.reward
    assert reward is not None
    arguments = training_arguments(
        RewardConfig,
        context,
        has_evaluation=data.evaluation is not None,
        center_rewards_coefficient=reward.center_rewards_coefficient,
    )
    model, parameters = trained_model(context, tokenizer, scores=True)
    check_positions(model, data)
    trainer = Trainer(
        watch=Watch(context),
        model=without_dropout(model),
        args=arguments,
        data_collator=PairCollator(pad_token_id=tokenizer.pad_token_id, with_answers=False),
        train_dataset=as_dataset(data.train, data.fingerprint),
        eval_dataset=as_dataset(data.evaluation, "eval") if data.evaluation is not None else None,
        processing_class=tokenizer,
    )
    clock.mark("model")

    follow(context, trainer, tokenizer, data=data, parameters=parameters, clock=clock)


class Trainer(RewardTrainer):  # type: ignore[misc]
    """TRL's trainer on tokens that are ready, with an honest evaluation; it reports through its watch."""

    def __init__(self, *, watch: Watch, **arguments: Any) -> None:
        self.watch = watch
        super().__init__(callbacks=watch.callbacks, **arguments)
        watch.attach(self)

    def _prepare_dataset(self, dataset: Any, *_arguments: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "margin", "rows"]

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> torch.Tensor:
        """One forward and backward pass; a loss that is NaN or infinite ends the run before it reaches the weights."""
        rows = self.watch.take(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *arguments, **options)
        return self.watch.checked(loss, step=self.state.global_step + 1, rows=rows)

    def evaluate(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        """Loss, scores, margin and accuracy over all evaluation pairs."""
        return self.watch.evaluate(lambda: measure_pairs(self))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the figures of the pairs to the callbacks, and none of TRL's other counters."""
        logs |= pair_figures(self._metrics["train"])
        self._metrics["train"].clear()
        super().log(logs, start_time)
