"""Checkpoints as a worker makes and reads them; uploads.py sends them away, and fetches the one to go on from.

TRL's trainer writes its own files first, which is not atomic; what every rank has to add follows, and then the whole
directory is moved to where the supervisor looks. A checkpoint that is there is complete.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hone.run import TrainerExit
from hone.storage import ManifestFile, files_of
from hone_trainer import sharding
from hone_trainer.context import RunContext
from hone_trainer.failure import RunFailed
from hone_trainer.uploads import ELSEWHERE
from hone_trainer.world import agree

BEST = "best.safetensors"
_COURSE = "course.json"
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", _COURSE)
_UNWANTED = ("training_args.bin", "README.md", "zero_to_fp32.py", "zero_to_torch.py")
"""A pickle of every setting, a model card with paths of this machine, DeepSpeed's scripts; none is read again."""


@dataclass(kw_only=True)
class Course:
    """What a run knows of its course beside what TRL's trainer keeps."""

    step: int = 0
    world_size: int = 1
    tokens_seen: tuple[int, ...] = (0,)
    """Of each rank."""
    first_loss: float | None = None
    before: dict[str, float] | None = None
    """The evaluation before the first step."""
    best_step: int | None = None
    best_loss: float | None = None
    best_bad: int = 0
    """Evaluations since the best one."""


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Moves what the trainer saved to where the supervisor finds it."""

    def __init__(self, context: RunContext, watch: Any) -> None:
        self._context, self._watch = context, watch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_rest: Any) -> None:
        """One where every rank stops on request, whatever the interval."""
        if self._watch.is_stopping:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_rest: Any) -> None:
        """Complete what the trainer has just written."""
        context, step = self._context, state.global_step
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        # Machines share no files. What is small the first rank writes for all; what is not, each node sends itself.
        parts = gather_object([(_own_files(folder, context.rank), self._watch.tokens_seen)])
        is_share = context.leads_node and not context.is_main
        shares = gather_object([_share(folder) if is_share else ()]) if context.run.launch.is_sharded else []
        if context.is_main:
            for files, _ in parts:
                for name, data in files.items():
                    (folder / name).write_bytes(data)
            if elsewhere := [asdict(file) for share in shares for file in share]:
                (folder / ELSEWHERE).write_text(json.dumps(elsewhere), encoding="utf-8")
            self._complete(folder, step, tuple(tokens for _, tokens in parts))
        elif is_share and shares:
            self._hand_over(folder, step)
        elif is_share:
            shutil.rmtree(folder, ignore_errors=True)

    def _complete(self, folder: Path, step: int, tokens: tuple[int, ...]) -> None:
        watch, best = self._watch, self._watch.best
        course = Course(
            step=step,
            world_size=self._context.world_size,
            tokens_seen=tokens,
            first_loss=watch.progress.first_loss,
            before=watch.before,
        )
        if best and best.step is not None:
            shutil.copyfile(self._context.scratch / BEST, folder / BEST)
            course.best_step, course.best_loss, course.best_bad = best.step, best.loss, best.bad
        for name in _UNWANTED:
            (folder / name).unlink(missing_ok=True)
        (folder / _COURSE).write_text(json.dumps(asdict(course)), encoding="utf-8")
        self._hand_over(folder, step)

    def _hand_over(self, folder: Path, step: int) -> None:
        made = self._context.directory.checkpoints
        made.mkdir(exist_ok=True)
        folder.rename(made / f"step-{step:06d}")


def resume(context: RunContext, watch: Any) -> Path | None:
    """The checkpoint that this run goes on from, after its course was told to the watch; None where there is none.

    Raises RunFailed (WRONG_WORLD) for one of another number of ranks, and (INTEGRITY) for one that lacks a file.
    """
    folder = context.directory.resume
    course = _read(folder) if folder.exists() else None
    agree(context.run.launch, "the checkpoint", str(course.step) if course else "none")
    if course is None:
        return None
    if course.world_size != context.world_size:
        raise RunFailed(
            TrainerExit.WRONG_WORLD,
            f"The checkpoint of step {course.step} was made by {course.world_size} processes, and this run has "
            f"{context.world_size}.",
            fix="Go on with as many processes as before, or start again without the checkpoint.",
        )
    watch.tokens_seen = course.tokens_seen[context.rank]
    watch.before, watch.progress.first_loss = course.before, course.first_loss
    if watch.best and course.best_step is not None:
        watch.best.step, watch.best.bad = course.best_step, course.best_bad
        watch.best.loss = math.inf if course.best_loss is None else course.best_loss
        if context.leads_node:
            shutil.copyfile(folder / BEST, context.scratch / BEST)
    return folder


def train(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint where there is one. Of one after the last step only the weights are taken:
    transformers would train one step more."""
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    trainer.state = state
    with sharding.whole(trainer.model.parameters(), written=True):
        trainer._load_from_checkpoint(str(checkpoint))
    sharding.prepare_forward(trainer)


def _read(folder: Path) -> Course:
    """Transformers goes on without an optimizer or a scheduler and says nothing."""
    names = {path.name for path in folder.iterdir()}
    needed = [name for name in _NEEDED if not (name == "optimizer.pt" and "latest" in names)]  # DeepSpeed has its own
    missing = [name for name in needed if name not in names]
    if not any(name.startswith("rng_state") for name in names):
        missing.append("rng_state.pth")
    if missing:
        raise RunFailed(TrainerExit.INTEGRITY, f"The checkpoint in {folder} lacks {', '.join(missing)}.")
    data = json.loads((folder / _COURSE).read_text(encoding="utf-8"))
    return Course(**{**data, "tokens_seen": tuple(data["tokens_seen"])})


def _share(folder: Path) -> tuple[ManifestFile, ...]:
    """What is left of a node's own files once those of `_own_files` are gone; all its ranks have written theirs."""
    for name in [*_UNWANTED, *(path.name for path in folder.glob("rng_state*"))]:
        (folder / name).unlink(missing_ok=True)
    return files_of(folder)


def _own_files(folder: Path, rank: int) -> dict[str, bytes]:
    """What this rank alone has written: the state of its random numbers."""
    own = folder / f"rng_state_{rank}.pth"
    return {own.name: own.read_bytes()} if own.exists() else {}
