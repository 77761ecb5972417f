"""What dpo and reward measure of pairs: the same four figures for both, in training and over the evaluation set."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc
import torch

from hone.run import TrainerExit
from hone_trainer.data import Prepared
from hone_trainer.failure import RunFailed
from hone_trainer.pairs import SIDES

FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""By the names of TRL's DPOTrainer: mean reward of each side, mean difference, share of pairs in the right order."""


def pair_figures(noted: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """FIGURES from what a TRL trainer noted since its last log; nothing where it noted nothing."""
    means = {name: sum(values) / len(values) for name, values in noted.items() if values}
    if "margin" in means:  # TRL's RewardTrainer
        score, half = means["mean_reward"], means["margin"] / 2
        return dict(zip(FIGURES, (score + half, score - half, means["margin"], means["accuracy"]), strict=True))
    return {name: means[name] for name in FIGURES if name in means}


@torch.no_grad()
def measure_pairs(trainer: Any) -> dict[str, float]:
    """Loss and FIGURES as means over all evaluation pairs, whatever the batch size and the number of ranks."""
    totals = torch.zeros(2 + len(FIGURES), dtype=torch.float64)
    trained = trainer.model.training
    trainer.model.eval()
    with _each_rank_alone(trainer.accelerator):
        for batch, counts in trainer.watch.batches(trainer.eval_dataset, trainer.data_collator):
            inputs = {name: value.to(trainer.args.device) for name, value in batch.items() if torch.is_tensor(value)}
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, inputs)
            noted = pair_figures(trainer._metrics["eval"])
            trainer._metrics["eval"].clear()
            pairs = len(batch["rows"]) if counts else 0
            totals += pairs * torch.tensor([1.0, loss.item(), *noted.values()], dtype=torch.float64)
    trainer.model.train(trained)
    count, *sums = trainer.watch.summed(totals)
    return {f"eval_{name}": total / count for name, total in zip(("loss", *FIGURES), sums, strict=True)}


def check_positions(model: Any, data: Prepared) -> None:
    """Raise RunFailed (USER) where a pair is longer than a model with a table of positions has rows in it."""
    tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    if not any("position" in name or name.endswith("wpe") for name in tables):
        return
    places = model.config.max_position_embeddings
    sides = [table[f"{side}_ids"] for table in (data.train, data.evaluation) if table for side in SIDES]
    longest = max(pc.max(pc.list_value_length(side)).as_py() for side in sides)
    if longest > places:
        raise RunFailed(
            TrainerExit.USER,
            f"The model has {places:,} positions, and the longest pair {longest:,} tokens.",
            fix=f"Set max_length of the method to {places:,}.",
        )


def without_dropout(model: Any) -> Any:
    """The model with all dropout off, or its two forward passes would differ. TRL turns off modules of dropout only;
    attention drops by a number that each of its modules keeps."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@contextmanager
def _each_rank_alone(accelerator: Any) -> Iterator[None]:
    """TRL gathers its figures from all ranks inside the loss, and here ranks have unequal numbers of batches."""

    def keep(tensor: Any) -> Any:
        return tensor

    accelerator.gather = accelerator.gather_for_metrics = keep
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
