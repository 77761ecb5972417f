"""What is told, checked and kept at each step and evaluation, beside TRL's trainers. Used by the methods."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from itertools import takewhile
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hone.job import EventType
from hone.run import TrainerExit
from hone_trainer import sharding
from hone_trainer.checkpoints import BEST, Checkpoints
from hone_trainer.context import RunContext
from hone_trainer.failure import RunFailed
from hone_trainer.guards import POLICY_FIGURES
from hone_trainer.model import train_in
from hone_trainer.optimizers import own_optimizer
from hone_trainer.preference import FIGURES

_TOLD = ("loss", "learning_rate", "grad_norm", *FIGURES, *POLICY_FIGURES)


class Cut(Exception):
    """The run was asked to stop, so an evaluation, or a step that takes long, was not carried to its end."""


class Watch:
    """Beside every method's trainer: counts its tokens, ends a run whose loss is no number, reports evaluations."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.progress = Progress(context)
        self.checkpoints = Checkpoints(context, self)
        evaluation = context.run.spec.training.eval
        self.best = Best(context, patience=evaluation.early_stopping_patience) if evaluation.keep_best else None
        self.tokens_seen = 0
        """Tokens that this rank has trained on, padding left out."""
        self.before: dict[str, float] | None = None
        """The evaluation before the first step."""
        self.last_eval: tuple[int, dict[str, float]] | None = None
        """Step and figures of the latest evaluation."""
        self.is_stopping = False
        """Whether every rank knows that one of them was asked to stop. A signal that came since may be one rank's own:
        what all of them do together must not hang on it."""
        self._launch = context.run.launch
        self._trainer: Any = None

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """What the trainer calls at each step."""
        return [self.progress, *([self.best] if self.best else []), self.checkpoints]

    def attach(self, trainer: Any) -> None:
        """Take over a trainer that was just made: its printing is off, and what it trains is fp32, or bf16 where the
        optimizer is for that.

        Adam in bf16 loses small updates (14 % of the entries moved at 1e-5, against 96 % in fp32). DeepSpeed keeps its
        own fp32 master, and needs weights of one precision where it splits them.
        """
        self._trainer = self.progress.trainer = trainer
        sharding.check(self._launch, trainer.accelerator)
        for callback in (PrinterCallback, ProgressCallback):
            with suppress(ValueError):
                trainer.remove_callback(callback)
        if optimizer := own_optimizer(self.context.run.spec):
            trainer.optimizer_cls_and_kwargs = optimizer  # not every trainer of TRL's takes it as an argument
        elif sharding.splits_weights(self._launch) and self._launch.precision == "bf16":
            train_in(trainer.model, torch.bfloat16)
        else:
            train_in(trainer.model, torch.float32)

    def take(self, inputs: dict[str, Any]) -> list[int]:
        """Take out of a batch what the model does not read; the answer is the rows it was made of."""
        self.tokens_seen += inputs.pop("num_tokens")
        rows: list[int] = inputs.pop("rows")
        return rows

    def checked(self, loss: torch.Tensor, *, step: int, rows: list[int]) -> torch.Tensor:
        """The loss. Raises RunFailed (DIVERGED) when it is NaN or infinite."""
        if not math.isfinite(loss.item()):
            raise _diverged("loss", loss.item(), step=step, rows=rows)
        return loss

    def batches(self, rows: Any, collate: Callable[[Any], dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
        """This rank's share of an evaluation, until it is asked to stop; with each whether it counts.

        Where weights are split every forward pass is one of all ranks: all have as many batches, and stop together. A
        rank that has none of its own left computes one that does not count.
        """
        size, world = self._trainer.args.per_device_eval_batch_size, self.context.world_size
        mine = rows.select(range(self.context.rank, len(rows), world))
        loader = iter(DataLoader(mine, batch_size=size, collate_fn=collate))
        if not sharding.splits_weights(self._launch):
            yield from ((batch, True) for batch in takewhile(lambda _: not self.context.stop.asked, loader))
            return
        for _ in range(math.ceil(math.ceil(len(rows) / world) / size)):
            if self._one_is_asked():
                return
            batch = next(loader, None)
            yield (collate([rows[0]]), False) if batch is None else (batch, True)

    def _one_is_asked(self) -> bool:
        asked = torch.tensor([int(self.context.stop.asked)], device=self._trainer.args.device)
        return bool(self._trainer.accelerator.reduce(asked).item())

    def summed(self, totals: torch.Tensor) -> list[float]:
        """What every rank measured, added up. Raises Cut on all of them when one was asked to stop."""
        asked = torch.tensor([float(self.context.stop.asked)], dtype=totals.dtype)
        reduced = self._trainer.accelerator.reduce(torch.cat([totals, asked]).to(self._trainer.args.device))
        sums: list[float] = reduced.tolist()
        if sums.pop():
            raise Cut
        return sums

    def evaluate(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Measure, report, and let the callbacks decide; `measure` gives eval_loss among others."""
        trainer, context = self._trainer, self.context
        context.phase("evaluation")
        try:
            metrics, step = measure(), trainer.state.global_step
        except Cut:
            context.stop.leave()
            trainer.control.should_training_stop = trainer.control.should_save = True
            trainer.control.should_evaluate = False  # or it would begin again at the end of the epoch
            return {}
        loss = metrics["eval_loss"]
        context.event(EventType.EVAL, f"eval loss {loss:.4f}", step=step, metrics=metrics)
        if not math.isfinite(loss):
            raise _diverged("evaluation loss", loss, step=step, rows=[])
        self.last_eval = (step, metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        if 0 < step < trainer.state.max_steps:
            context.phase("training")
        return metrics


def _diverged(what: str, value: float, *, step: int, rows: list[int]) -> RunFailed:
    where = (
        f" on the batch of data set rows {', '.join(map(str, rows[:16]))}{' …' if len(rows) > 16 else ''}"
        if rows
        else ""
    )
    return RunFailed(
        TrainerExit.DIVERGED,
        f"The {what} is {value} at step {step}{where}.",
        fix="Look at these rows; lower training.learning_rate, raise training.warmup_steps, or use precision fp32.",
    )


class Progress(TrainerCallback):  # type: ignore[misc]
    """Reports each step, and stops every rank at the end of the same step when one was asked to."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self.trainer: Any = None
        self.begin: Callable[[], None] = lambda: None
        """Called before the first step, once the model can compute."""
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self._began = self._last_time = 0.0
        self._began_step = 0
        self._tokens = self._last_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_rest: Any
    ) -> None:
        """Start the clock."""
        self.begin()
        self._began = self._last_time = time.monotonic()
        self._began_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_rest: Any) -> None:
        """Agree on stopping, and add up tokens, over all ranks."""
        assert self.trainer is not None
        asked, self._tokens = self._context.stop.asked, self.trainer.watch.tokens_seen
        if self._context.world_size > 1:
            mine = torch.tensor([int(asked), self._tokens], device=args.device)
            stops, self._tokens = self.trainer.accelerator.reduce(mine).tolist()
            asked = stops > 0
        if asked:
            self._context.stop.asked = self.trainer.watch.is_stopping = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_rest: Any,
    ) -> None:
        """One progress event."""
        if "loss" not in logs:
            return
        norm = logs.get("grad_norm")
        if norm is not None and not math.isfinite(norm):
            raise _diverged("gradient norm", norm, step=state.global_step, rows=[])
        loss = logs["loss"]
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        self._context.event(
            EventType.PROGRESS, step=state.global_step, metrics=self._metrics(state, logs, time.monotonic())
        )

    def _metrics(self, state: TrainerState, logs: Mapping[str, float], now: float) -> dict[str, float]:
        steps = state.global_step - self._began_step
        metrics = {
            "max_steps": float(state.max_steps),
            "epoch": float(state.epoch or 0.0),
            "tokens_per_second": round((self._tokens - self._last_tokens) / max(now - self._last_time, 1e-9), 1),
            "eta_s": round((now - self._began) / max(steps, 1) * (state.max_steps - state.global_step), 1),
            "tokens": float(self._tokens),
        }
        self._last_time, self._last_tokens = now, self._tokens
        told = [name for name in logs if name in _TOLD or name.startswith("reward/")]
        return metrics | {name: float(logs[name]) for name in told}


class Best(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights of the lowest evaluation loss, and stops when it has not fallen for long enough.

    Only what is trained is kept, as safetensors: no optimizer, no pickles.
    """

    def __init__(self, context: RunContext, *, patience: int | None) -> None:
        self._context = context
        self._patience = patience
        self._path = context.scratch / BEST
        self.bad = 0
        """Evaluations since the best one."""
        self.loss = math.inf
        self.step: int | None = None
        self.stopped_early = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        model: Any = None,
        **_rest: Any,
    ) -> None:
        """Keep or count. Every rank has the same loss, so every rank decides alike."""
        if metrics["eval_loss"] < self.loss:
            self.loss, self.step, self.bad = metrics["eval_loss"], state.global_step, 0
            kept = sharding.copies(_trained(model), kept=self._context.leads_node)
            if self._context.leads_node:
                save_file(kept, self._path)
            return
        self.bad += 1
        if self._patience is not None and self.bad >= self._patience and state.global_step:
            self.stopped_early = control.should_training_stop = True
            text = f"evaluation loss has not fallen below {self.loss:.4f} (step {self.step}) for {self.bad} evaluations"
            self._context.event(EventType.NOTE, f"Stopping early: {text}.", step=state.global_step)

    def restore(self, model: Any, *, step: int) -> bool:
        """Put the best weights back, unless they are those of the last step; whether that changed any."""
        if self.step is None or self.step == step:
            return False
        best = load_file(self._path)
        for name, parameter in _trained(model):
            with torch.no_grad(), sharding.whole([parameter], written=True):
                parameter.copy_(best[name].to(parameter.device))
        self._context.event(
            EventType.NOTE, f"The weights of step {self.step} are kept (evaluation loss {self.loss:.4f}).", step=step
        )
        return True


def _trained(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def without_input_casts(model: Any, *, active: bool) -> Any:
    """Under autocast an adapter need not copy its input to fp32: 13 to 18 % less memory, the same gradients."""
    if not active:
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)
