"""TRL's trainer with an honest evaluation, and what is told, checked and kept at each step. Used by methods/sft.py."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from hone.job import EventType
from hone.run import TrainerExit
from hone_trainer.context import RunContext
from hone_trainer.failure import RunFailed


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer on tokens that are ready; it reports through Progress and stops on a loss that is not a number."""

    control: TrainerControl

    def __init__(self, *, context: RunContext, **arguments: Any) -> None:
        self._context = context
        self.eval_collator: Callable[..., dict[str, Any]] | None = None
        """Makes padded batches of the evaluation set, which is never packed."""
        self.last_eval: tuple[int, dict[str, float]] | None = None
        """Step and figures of the latest evaluation."""
        self.tokens_seen = 0
        """Tokens that this rank has trained on, padding left out."""
        super().__init__(**arguments)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "seq_lengths", "rows"]

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> torch.Tensor:
        """One forward and backward pass; a loss that is NaN or infinite ends the run before it reaches the weights."""
        rows = inputs.pop("rows")
        self.tokens_seen += inputs.pop("num_tokens")
        loss: torch.Tensor = super().training_step(model, inputs, *arguments, **options)
        if not math.isfinite(loss.item()):
            raise _diverged("loss", loss.item(), step=self.state.global_step + 1, rows=rows)
        return loss

    def evaluate(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        """Loss per learned token over all evaluation rows: the same for every batch size and number of ranks.

        The mean of batch means, which is the library's, weighs a token by the batch it happens to stand in.
        """
        self._context.phase("evaluation")
        totals = self._eval_totals()
        loss = totals[0] / totals[1]
        metrics = {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_accuracy": totals[2] / totals[1],
        }
        step = self.state.global_step
        self._context.event(EventType.EVAL, f"eval loss {loss:.4f}", step=step, metrics=metrics)
        if not math.isfinite(loss):
            raise _diverged("evaluation loss", loss, step=step, rows=[])
        self.last_eval = (step, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if 0 < step < self.state.max_steps:
            self._context.phase("training")
        return metrics

    @torch.no_grad()
    def _eval_totals(self) -> list[float]:
        """Sum of losses, number of tokens, number of right guesses, over all ranks."""
        rows = self.eval_dataset.select(range(self._context.rank, len(self.eval_dataset), self._context.world_size))
        loader = DataLoader(rows, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.eval_collator)
        totals = torch.zeros(3, dtype=torch.float64)
        trained = self.model.training
        self.model.eval()
        for batch in loader:
            self._context.stop.check()
            inputs = {k: v.to(self.args.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            with self.compute_loss_context_manager():
                found = self.model(**inputs, fused_lm_head=True)
            right = found.is_top1.sum().item()
            totals += torch.tensor([-found.log_probs.double().sum().item(), found.label_mask.sum().item(), right])
        self.model.train(trained)
        total: list[float] = self.accelerator.reduce(totals.to(self.args.device)).tolist()
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand figures to the callbacks without TRL's own counters, which are not right for packed rows."""
        self._metrics["train"].clear()
        super().log(logs, start_time)


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
        self.trainer: Trainer | None = None
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self._began = self._last_time = 0.0
        self._began_step = 0
        self._tokens = self._last_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_rest: Any
    ) -> None:
        """Start the clock."""
        self._began = self._last_time = time.monotonic()
        self._began_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_rest: Any) -> None:
        """Agree on stopping, and add up tokens, over all ranks."""
        assert self.trainer is not None
        asked, self._tokens = self._context.stop.asked, self.trainer.tokens_seen
        if self._context.world_size > 1:
            mine = torch.tensor([int(asked), self._tokens], device=args.device)
            stops, self._tokens = self.trainer.accelerator.reduce(mine).tolist()
            asked = stops > 0
        if asked:
            self._context.stop.asked = True
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
        return metrics | {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs}


class Best(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights of the lowest evaluation loss, and stops when it has not fallen for long enough.

    Only what is trained is kept, as safetensors: no optimizer, no pickles.
    """

    def __init__(self, context: RunContext, *, patience: int | None) -> None:
        self._context = context
        self._patience = patience
        self._path = context.scratch / "best.safetensors"
        self._bad = 0
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
            self.loss, self.step, self._bad = metrics["eval_loss"], state.global_step, 0
            if self._context.is_main:
                save_file(_trained(model), self._path)
            return
        self._bad += 1
        if self._patience is not None and self._bad >= self._patience and state.global_step:
            self.stopped_early = control.should_training_stop = True
            text = (
                f"evaluation loss has not fallen below {self.loss:.4f} (step {self.step}) for {self._bad} evaluations"
            )
            self._context.event(EventType.NOTE, f"Stopping early: {text}.", step=state.global_step)

    def restore(self, model: Any, *, step: int) -> bool:
        """Put the best weights back, unless they are those of the last step; whether that changed any."""
        if self.step is None or self.step == step:
            return False
        best = load_file(self._path)
        with torch.no_grad():
            for name, parameter in _named_trained(model):
                parameter.copy_(best[name].to(parameter.device))
        self._context.event(
            EventType.NOTE, f"The weights of step {self.step} are kept (evaluation loss {self.loss:.4f}).", step=step
        )
        return True


def _named_trained(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in _named_trained(model)}


def without_input_casts(model: Any, *, active: bool) -> Any:
    """Under autocast an adapter need not copy its input to fp32: 13 to 18 % less memory, the same gradients."""
    if not active:
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)
