"""A training loop of our own where TRL has none: what course.py, training.py and checkpoints.py expect of a trainer.

Called by methods/ppo.py, which says what a step is. Optimizer, schedule, the process group, callbacks, checkpoints and
going on from one are here. A step ends whole: nothing of it is left to be kept beside the weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer as Optimizers
from transformers import TrainerControl, TrainerState, get_scheduler
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hone_trainer.context import RunContext
from hone_trainer.training import Cut, Watch

WEIGHTS = "trained.safetensors"
"""What a checkpoint holds of the weights: those that are trained."""


class Loop(ABC):
    """Steps of training, each made by `step`, until there are enough or one rank is asked to stop."""

    def __init__(
        self, context: RunContext, *, module: nn.Module, model: Any, tokenizer: Any, args: Any, max_steps: int
    ) -> None:
        """`module`: what is trained and wrapped; `model`: the language model in it."""
        launch = context.run.launch
        self.context, self.args, self.model, self.module, self.tokenizer = context, args, model, module, tokenizer
        self.watch = Watch(context)
        self.optimizer_cls_and_kwargs: Any = None
        self.accelerator = Accelerator(
            cpu=launch.device == "cpu",
            mixed_precision="bf16" if launch.precision == "bf16" else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.state, self.control = TrainerState(max_steps=max_steps), TrainerControl()
        self.state.compute_steps(args, max_steps)
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), *self.watch.callbacks], model, tokenizer, None, None
        )
        self.watch.attach(self)
        module.to(self.accelerator.device)
        self.wrapped: Any = self.accelerator.prepare(module)
        kind, settings = self.optimizer_cls_and_kwargs or Optimizers.get_optimizer_cls_and_kwargs(args)
        weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices, rest = ([one for one in weights if (one.ndim > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = kind([group for group in groups if group["params"]], **settings)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type, self.optimizer, args.get_warmup_steps(max_steps), max_steps
        )
        self._noted: dict[str, list[float]] = {}
        self._kept_step = 0
        """The last one that there is a checkpoint of."""

    @abstractmethod
    def step(self, number: int) -> dict[str, float]:
        """Make step `number`, from 1; the answer is its figures, `loss` and `grad_norm` among them. Raises Cut in every
        rank when one was asked to stop before anything of the step changed the state."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Figures over the evaluation set, `eval_loss` among them."""

    @abstractmethod
    def extra_state(self) -> dict[str, float]:
        """What a checkpoint keeps beside weights, optimizer, schedule and random numbers."""

    @abstractmethod
    def restore_extra(self, state: Mapping[str, float]) -> None:
        """The other way round."""

    def remove_callback(self, callback: Any) -> None:
        """As transformers' trainer has it."""
        self.callback_handler.remove_callback(callback)

    def evaluate(self) -> dict[str, float]:
        """Measure, report, and let the callbacks decide."""
        return self.watch.evaluate(self.measure)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Train to the end, from a checkpoint where one is given."""
        if resume_from_checkpoint:
            self._load(Path(resume_from_checkpoint))
        args, state = self.args, self.state
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        while state.global_step < state.max_steps and not self.control.should_training_stop:
            try:
                figures = self.step(state.global_step + 1)
            except Cut:
                self._end_before_step()
                break
            rate = self.scheduler.get_last_lr()[0]
            self.scheduler.step()
            state.global_step += 1
            self._note(figures)
            self.control = self.callback_handler.on_step_end(args, state, self.control)
            self._report(rate)
        self.control = self.callback_handler.on_train_end(args, state, self.control)

    def _end_before_step(self) -> None:
        """Every rank was asked to stop inside a step: keep what was there before it, which nothing has touched."""
        self.context.stop.asked = self.watch.is_stopping = self.control.should_training_stop = True
        if self.state.global_step > self._kept_step:
            self._keep()

    def _note(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._noted.setdefault(name, []).append(value)

    def _report(self, rate: float) -> None:
        """Log, evaluate and save where the callbacks want it."""
        args, state, control = self.args, self.state, self.control
        if control.should_log:
            control.should_log = False
            logs = {name: sum(values) / len(values) for name, values in self._noted.items()}
            self._noted.clear()
            self.control = self.callback_handler.on_log(args, state, control, logs | {"learning_rate": rate})
        if self.control.should_evaluate:
            self.control.should_evaluate = False
            self.evaluate()
        if self.control.should_save:
            self.control.should_save = False
            self._keep()

    def _keep(self) -> None:
        """A checkpoint of this step."""
        self._save(Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self._kept_step = self.state.global_step

    def _save(self, folder: Path) -> None:
        """What goes into a checkpoint; the callback of checkpoints.py completes it and hands it over."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.get_rng_state(), folder / f"rng_state_{self.context.rank}.pth")
        if self.context.is_main:
            save_file({name: tensor.detach().contiguous() for name, tensor in self._trained()}, folder / WEIGHTS)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            torch.save({"schedule": self.scheduler.state_dict(), "extra": self.extra_state()}, folder / "scheduler.pt")
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self.accelerator.wait_for_everyone()

    def _load(self, folder: Path) -> None:
        """Raises the libraries' own errors; checkpoints.py has looked for the files, and their manifest verified."""
        self._load_from_checkpoint(str(folder))
        # The optimizer moves what it is given to its weights' device, which of several ranks is called cpu:0.
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        kept = torch.load(folder / "scheduler.pt", weights_only=True)
        self.scheduler.load_state_dict(kept["schedule"])
        self.restore_extra(kept["extra"])
        step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        self.state.global_step = self._kept_step = step
        torch.set_rng_state(torch.load(folder / f"rng_state_{self.context.rank}.pth", weights_only=True))

    def _load_from_checkpoint(self, folder: str) -> None:
        """The weights alone: what a run that had ended takes of its last checkpoint."""
        stored = load_file(Path(folder, WEIGHTS))
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(stored[name].to(parameter.device))

    def _trained(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor) for name, tensor in self.module.named_parameters() if tensor.requires_grad]
