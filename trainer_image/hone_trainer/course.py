"""The course of a run once its data and its trainer are there, the same for every method: evaluate, train, keep the
best weights, evaluate, save, record. Called by the methods."""

from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hone.job import EventType
from hone_trainer import outputs, sharding
from hone_trainer.card import Facts
from hone_trainer.checkpoints import resume, train
from hone_trainer.context import RunContext
from hone_trainer.data import Prepared
from hone_trainer.samples import answer
from hone_trainer.stop import interrupted
from hone_trainer.training import without_input_casts


def follow(
    context: RunContext,
    trainer: Any,
    tokenizer: Any,
    *,
    data: Prepared,
    parameters: dict[str, int],
    clock: outputs.Clock,
) -> None:
    """Train, evaluate, save and check; leaves outputs and worker.json in scratch for the supervisor."""
    watch = trainer.watch
    checkpoint = resume(context, watch)
    if checkpoint is None:
        look = partial(_look, context, trainer, tokenizer, data)
        if sharding.splits_weights(context.run.launch):
            watch.progress.begin = look  # the model computes once DeepSpeed has it
        else:
            look()
    clock.mark("before_training")

    if every := context.run.spec.reporting.samples.steps:
        look = partial(_answer, context, trainer, tokenizer, data, when="during")
        trainer.callback_handler.add_callback(Sampling(look, every=every))
    context.phase("training")
    with context.stop.deferred(), without_input_casts(trainer.model, active=_autocasts(context)):
        train(trainer, checkpoint)
    if context.stop.asked:
        raise interrupted()
    clock.mark("training")

    steps = trainer.state.global_step
    moved = watch.best.restore(trainer.model, step=steps) if watch.best else False
    after = _final_evaluation(trainer, moved=moved) if data.evaluation is not None else None
    _answer(context, trainer, tokenizer, data, when="after")
    clock.mark("after_training")

    trainer.accelerator.wait_for_everyone()
    if context.is_main:
        context.phase("saving")
    metrics = {
        "first_loss": watch.progress.first_loss,
        "last_loss": watch.progress.last_loss,
        "eval_before": watch.before,
        "eval_after": after,
    }
    merge = outputs.save(context, trainer.model, tokenizer, Facts(data=data, steps=steps, metrics=metrics))
    if context.is_main:
        clock.mark("saving")
        outputs.record(
            context,
            data=data,
            clock=clock,
            parameters=parameters,
            metrics={**metrics, "merge": merge},
            steps={
                "done": steps,
                "max": trainer.state.max_steps,
                "best": watch.best.step if watch.best else None,
            },
        )
    trainer.accelerator.wait_for_everyone()


class Sampling(TrainerCallback):  # type: ignore[misc]
    """Answers the sample prompts while it trains; before and after is the course's own."""

    def __init__(self, look: Callable[[], None], *, every: int) -> None:
        self._look, self._every = look, every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_rest: Any) -> None:
        """Every rank comes here at the same steps, as it must where weights are split."""
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._look()


def _final_evaluation(trainer: Any, *, moved: bool) -> dict[str, float]:
    """Figures of the weights that are kept; those of the last step may be known already."""
    last = trainer.watch.last_eval
    if last and last[0] == trainer.state.global_step and not moved:
        return dict(last[1])
    found: dict[str, float] = trainer.evaluate()
    return found


def _autocasts(context: RunContext) -> bool:
    return context.run.spec.adapter is not None and context.run.launch.precision == "bf16"


def _look(context: RunContext, trainer: Any, tokenizer: Any, data: Prepared) -> None:
    """What the model can do before the first step."""
    _answer(context, trainer, tokenizer, data, when="before")
    if sharding.splits_weights(context.run.launch):
        sharding.forget_order(trainer)
    if context.run.spec.training.eval.at_start:
        trainer.watch.before = trainer.evaluate()
        if not trainer.watch.before:  # every rank was asked to stop, and there is no step yet to keep
            raise interrupted()


def _answer(context: RunContext, trainer: Any, tokenizer: Any, data: Prepared, *, when: str) -> None:
    """Answer the sample prompts and report them; the first rank alone, where it has a copy of the weights."""
    questions, together = data.questions, sharding.splits_weights(context.run.launch)
    if together:
        [questions] = broadcast_object_list([questions])  # the first rank has read them
    if not questions or not (together or context.is_main):
        return
    limit, model = context.run.spec.reporting.samples.max_new_tokens, trainer.accelerator.unwrap_model(trainer.model)
    with trainer.accelerator.autocast():
        for question, text in answer(model, tokenizer, questions, limit):
            context.event(
                EventType.SAMPLE,
                step=trainer.state.global_step,
                fields={"when": when, "prompt": question.prompt, "answer": text, "expected": question.expected},
            )
