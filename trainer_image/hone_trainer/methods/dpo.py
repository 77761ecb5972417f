"""Direct preference optimisation (DPO) on TRL's trainer. Read from top to bottom; run(context) is what a worker calls.

The reference is the model as it was before: with a new adapter the base with the adapter switched off, with one that
training goes on from a frozen copy of the adapter, in full fine-tuning a frozen copy of the model, unless its
log-probabilities are computed once, before training.
"""

from copy import deepcopy
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer

from hone_trainer import outputs, sharding
from hone_trainer.arguments import training_arguments
from hone_trainer.collate import PairCollator
from hone_trainer.context import RunContext
from hone_trainer.course import follow
from hone_trainer.data import Prepared, as_dataset, prepare
from hone_trainer.model import check_model, load_tokenizer
from hone_trainer.pairs import pairs_for, prepare_pairs, tell_cut_pairs
from hone_trainer.preference import check_positions, measure_pairs, pair_figures, without_dropout
from hone_trainer.trained import base_model, trained_model
from hone_trainer.training import Watch
from hone_trainer.vocabulary import copy_rows
from hone_trainer.world import agree


def run(context: RunContext) -> None:
    """Train, evaluate, save and check; leaves outputs and worker.json in scratch for the supervisor."""
    clock = outputs.Clock()

    context.phase("data")
    check_model(context.inputs.model)
    tokenizer = load_tokenizer(context.inputs.tokenizer, context.run.spec.model)
    asked = context.run.spec.reporting.samples.prompts
    data = prepare(
        context,
        lambda train, held_out: prepare_pairs(
            *pairs_for(context.run.spec, tokenizer, train), train, held_out, questions=asked
        ),
        tell=tell_cut_pairs,
    )
    agree(context.run.launch, "the data set", data.fingerprint)
    clock.mark("data")

    context.phase("model")
    arguments = _arguments(context, has_evaluation=data.evaluation is not None)
    model, parameters = trained_model(context, tokenizer)
    check_positions(model, data)
    trainer = _trainer(context, arguments, without_dropout(model), tokenizer, data)
    clock.mark("model")

    follow(context, trainer, tokenizer, data=data, parameters=parameters, clock=clock)


class Trainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on tokens that are ready, with an honest evaluation; it reports through its watch."""

    def __init__(self, *, watch: Watch, **arguments: Any) -> None:
        self.watch = watch
        super().__init__(callbacks=watch.callbacks, **arguments)
        watch.attach(self)

    def _prepare_dataset(self, dataset: Any, *_arguments: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        sides = [f"{side}_{what}" for side in ("chosen", "rejected") for what in ("ids", "start")]
        self._signature_columns = [*sides, "rows", "ref_chosen_logps", "ref_rejected_logps"]

    @torch.no_grad()
    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with the reference's log-probabilities, each rank's share gathered.

        TRL's own leaves them in a cache file of one process's temporary directory, where other ranks do not look.
        """
        context = self.watch.context
        mine = dataset.select(range(context.rank, len(dataset), context.world_size))
        found: list[tuple[list[float], list[float]]] = [([], [])]
        for batch in DataLoader(mine, batch_size=batch_size, collate_fn=self.data_collator):
            context.stop.check()
            inputs = {key: value.to(self.args.device) for key, value in batch.items() if torch.is_tensor(value)}
            for kept, new in zip(found[0], self.compute_ref_log_probs(self.model, inputs), strict=True):
                kept.extend(new.tolist())
        shares = gather_object(found)
        for side, column in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            values = [0.0] * len(dataset)
            for rank, share in enumerate(shares):
                values[rank :: context.world_size] = share[side]
            dataset = dataset.add_column(column, values)
        return dataset

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> torch.Tensor:
        """One forward and backward pass; a loss that is NaN or infinite ends the run before it reaches the weights."""
        rows = self.watch.take(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *arguments, **options)
        return self.watch.checked(loss, step=self.state.global_step + 1, rows=rows)

    def evaluate(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        """Loss, rewards, margin and accuracy over all evaluation pairs."""
        return self.watch.evaluate(lambda: measure_pairs(self))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the figures of the pairs to the callbacks, and none of TRL's other counters."""
        logs |= pair_figures(self._metrics["train"])
        self._metrics["train"].clear()
        super().log(logs, start_time)


def _arguments(context: RunContext, *, has_evaluation: bool) -> Any:
    dpo = context.run.spec.method.dpo
    assert dpo is not None
    return training_arguments(
        DPOConfig,
        context,
        has_evaluation=has_evaluation,
        beta=dpo.beta,
        loss_type=list(dpo.loss),
        label_smoothing=dpo.label_smoothing,
        precompute_ref_log_probs=dpo.precompute_reference,
    )


def _reference(context: RunContext, model: Any, tokenizer: Any) -> Any:
    """A frozen copy of the model; a second one from its files where a rank holds a share of the weights only."""
    split = sharding.splits_weights(context.run.launch)
    copy = without_dropout(base_model(context, tokenizer)) if split else deepcopy(model)
    return copy.eval().requires_grad_(False)


def _trainer(context: RunContext, arguments: Any, model: Any, tokenizer: Any, data: Prepared) -> Trainer:
    spec = context.run.spec
    copies = spec.adapter is None and not arguments.precompute_ref_log_probs
    trainer = Trainer(
        watch=Watch(context),
        model=model,
        ref_model=_reference(context, model, tokenizer) if copies else None,
        args=arguments,
        data_collator=PairCollator(pad_token_id=tokenizer.pad_token_id, with_answers=True),
        train_dataset=as_dataset(data.train, data.fingerprint),
        eval_dataset=as_dataset(data.evaluation, "eval") if data.evaluation is not None else None,
        processing_class=tokenizer,
    )
    if spec.adapter and not context.inputs.adapters:
        # TRL copies every adapter as `ref`; a new one that is switched off leaves the base, which is the reference.
        trainer.model.delete_adapter("ref")
    elif spec.adapter:
        copy_rows(trainer.model, "default", "ref")
    return trainer
