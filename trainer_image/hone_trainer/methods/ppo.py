"""Proximal policy optimisation (PPO) of a language model, a loop of our own. Read from top to bottom beside Schulman et
al. 2017 and Ziegler et al. 2019; run(context) is what a worker calls.

A step: draw an answer to each of batch_size prompts; score them; ask policy and reference for the log-probability of
every token, and the policy for values; turn scores and distance from the reference into rewards of tokens, and those
into advantages; then ppo_epochs times over the batch, in mini-batches, one optimizer step each.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import TrainingArguments

from hone_trainer import advantages, outputs
from hone_trainer.advantages import KlController
from hone_trainer.arguments import training_arguments
from hone_trainer.context import RunContext
from hone_trainer.course import follow
from hone_trainer.data import Prepared, as_dataset, prepare
from hone_trainer.guards import Guards
from hone_trainer.loop import Loop
from hone_trainer.lora import load_adapter
from hone_trainer.model import check_model, load_tokenizer, stop_tokens
from hone_trainer.policy import REFERENCE, Judged, Policy, Reference, Sequences
from hone_trainer.preference import without_dropout
from hone_trainer.prompts import prepare_prompts, tell_prompts
from hone_trainer.rewards import Rewards
from hone_trainer.rollouts import Prompt, Rollouts, Sampling, evaluated, roll_out
from hone_trainer.trained import trained_model
from hone_trainer.world import agree


def run(context: RunContext) -> None:
    """Train, evaluate, save and check; leaves outputs and worker.json in scratch for the supervisor."""
    clock = outputs.Clock()

    context.phase("data")
    check_model(context.inputs.model)
    tokenizer = load_tokenizer(context.inputs.tokenizer, context.run.spec.model)
    data = prepare(context, partial(prepare_prompts, context.run.spec, tokenizer), tell=tell_prompts)
    agree(context.run.launch, "the data set", data.fingerprint)
    clock.mark("data")

    context.phase("model")
    model, parameters = trained_model(context, tokenizer)
    if context.inputs.adapters:  # training goes on from an adapter: the reference is what it was
        model = load_adapter(model, context.inputs.adapters[0], base=context.inputs.model, name=REFERENCE)
        model.set_adapter("default")
    trainer = Trainer(context, model=without_dropout(model), tokenizer=tokenizer, data=data)
    clock.mark("model")

    try:
        follow(context, trainer, tokenizer, data=data, parameters=parameters, clock=clock)
    finally:
        trainer.rewards.close()


class Trainer(Loop):
    """The loop: one step is one batch of answers."""

    def __init__(self, context: RunContext, *, model: Any, tokenizer: Any, data: Prepared) -> None:
        spec, launch = context.run.spec, context.run.launch
        assert spec.method.ppo is not None
        self.ppo = spec.method.ppo
        policy = Policy(model, temperature=self.ppo.temperature)
        self.reference = Reference(policy, adapted=spec.adapter is not None)
        self.prompts = as_dataset(data.train, data.fingerprint)
        self.eval_prompts = as_dataset(data.evaluation, "eval") if data.evaluation is not None else None
        args = training_arguments(TrainingArguments, context, has_evaluation=data.evaluation is not None)
        if launch.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        steps = spec.training.max_steps or math.ceil(
            (spec.training.epochs or 1.0) * len(self.prompts) / self.ppo.batch_size
        )
        super().__init__(context, module=policy, model=model, tokenizer=tokenizer, args=args, max_steps=steps)
        if self.reference.copy is not None:
            self.reference.copy.to(self.accelerator.device)
        self.rewards = Rewards.load(context, self.ppo.rewards, device=self.accelerator.device)
        self.controller = KlController(self.ppo.init_kl_coef, self.ppo.kl_target)
        self.guards = Guards(max_kl=self.ppo.max_kl, gold=self.rewards.gold)
        self.sampling = Sampling(
            max_new_tokens=self.ppo.max_new_tokens,
            temperature=self.ppo.temperature,
            pad=tokenizer.pad_token_id,
            stops=tuple(stop_tokens(model, tokenizer)),
        )
        model.train()

    def step(self, number: int) -> dict[str, float]:
        """One batch of answers, and what is learned from it."""
        rollouts = self.collect(self.batch_of(number), step=number)
        self.state.epoch = number * self.ppo.batch_size / len(self.prompts)
        return self.learn(rollouts, step=number)

    def batch_of(self, number: int) -> list[Prompt]:
        """The prompts of step `number`: pass after pass over all of them, each in an order of its own."""
        first, size = (number - 1) * self.ppo.batch_size, len(self.prompts)
        places = range(first, first + self.ppo.batch_size)
        orders = {turn: self._order(size, turn) for turn in {place // size for place in places}}
        return [Prompt.of(self.prompts[int(orders[place // size][place % size])]) for place in places]

    def collect(self, prompts: list[Prompt], *, step: int, first: int = 0) -> Rollouts:
        """Answers to prompts, scored; every rank gives its share and has all of them. Step 0 is the evaluation, of
        which the first of these prompts is number `first`."""
        with self.accelerator.autocast():
            return roll_out(
                self.model,
                self.tokenizer,
                self.rewards,
                prompts,
                self.sampling,
                missing_eos_penalty=self.ppo.missing_eos_penalty,
                seed=(self.args.seed * 1_000_003 + step) * 1_000_003 + first,
                step=step,
                share=slice(self.context.rank, None, self.context.world_size),
                stop=self.context.stop,
            )

    def learn(self, rollouts: Rollouts, *, step: int) -> dict[str, float]:
        """The update of one batch."""
        ppo, device = self.ppo, self.accelerator.device
        sequences, mask = rollouts.sequences(self.tokenizer.pad_token_id, device), rollouts.mask(device)
        began = time.monotonic()
        old, reference = self._judge(sequences, mask)
        log_ratio = (old.log_probs - reference) * mask
        rewards = advantages.token_rewards(
            rollouts.scores.to(device), log_ratio, mask, kl_coef=self.controller.coefficient
        )
        gains = advantages.generalised_advantages(rewards, old.values, mask, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda)
        returns, gains = gains + old.values, advantages.whitened(gains, mask)

        kl = float(log_ratio.sum(1).mean())  # of an answer, in nats
        numbers, judged_at = [answer.number for answer in rollouts.answers], time.monotonic()
        updates = [
            self._update(part, sequences, mask, old, gains, returns, step, numbers)
            for epoch in range(ppo.ppo_epochs)
            for part in self._mini_batches(len(numbers), step, epoch)
        ]
        figures = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        figures["ratio_deviation"] = updates[0]["ratio_deviation"]  # of the first: nothing has been learned yet

        figures["update_s"] = time.monotonic() - judged_at
        figures |= {**rollouts.seconds, "forward_s": judged_at - began}
        figures |= rollouts.figures() | {
            "kl": kl,
            "kl_coef": self.controller.coefficient,
            "entropy": float((old.entropy * mask).sum() / mask.sum()),
            "explained_variance": advantages.explained_variance(old.values, returns, mask),
        }
        self.controller.update(kl, answers=len(numbers))
        self._guard(figures, rollouts, step=step)
        self.watch.tokens_seen += sum(len(answer.ids) for answer in rollouts.answers[self._mine()])
        return figures

    def _update(
        self,
        part: torch.Tensor,
        sequences: Sequences,
        mask: torch.Tensor,
        old: Judged,
        gains: torch.Tensor,
        returns: torch.Tensor,
        step: int,
        numbers: list[int],
    ) -> dict[str, float]:
        """One optimizer step on the answers `part` of the batch, of which this rank takes its share."""
        ppo, world = self.ppo, self.context.world_size
        tokens, mine = mask[part].sum(), list(self._micro_batches(part))
        totals = torch.zeros(4, dtype=torch.float64, device=mask.device)
        """Sums over tokens: policy loss, value loss, tokens held by the clip, largest |ratio − 1|."""
        for place, rows in enumerate(mine):
            last = place == len(mine) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                new: Judged = self.wrapped(*sequences.rows(rows), mask.shape[1])
                policy, held = advantages.policy_losses(
                    new.log_probs, old.log_probs[rows], gains[rows], cliprange=ppo.cliprange
                )
                value = advantages.value_losses(
                    new.values, old.values[rows], returns[rows], cliprange=ppo.cliprange_value
                )
                here = mask[rows]
                policy_sum, value_sum = (policy * here).sum(), (value * here).sum()
                # The mean over all tokens of the mini-batch; DDP divides the ranks' gradients by their number.
                loss = (policy_sum + ppo.vf_coef * value_sum) / tokens * world
                self.watch.checked(loss, step=step, rows=[numbers[int(row)] for row in rows])
                self.accelerator.backward(loss)
            ratio = ((new.log_probs.detach() - old.log_probs[rows]).exp() - 1).abs() * here
            totals[:3] += torch.stack([policy_sum.detach(), value_sum.detach(), (held * here).sum()]).double()
            totals[3] = torch.maximum(totals[3], ratio.max().double())
        limit = self.args.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        policy_loss, value_loss, held_share = (self.accelerator.reduce(totals[:3]) / tokens).tolist()
        return {
            "loss": policy_loss + ppo.vf_coef * value_loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": held_share,
            "grad_norm": float(norm),
            "ratio_deviation": float(totals[3]),
        }

    @torch.no_grad()
    def _judge(self, sequences: Sequences, mask: torch.Tensor) -> tuple[Judged, torch.Tensor]:
        """What the policy says of the answers before it learns from them, and the reference's log-probabilities.

        In the batches of the first epoch, so that the ratio of its first mini-batch is exactly 1.
        """
        width, whole = mask.shape[1], len(mask)
        order = [rows for part in self._mini_batches(whole, 0, 0) for rows in self._micro_batches(part)]
        judged = [self.wrapped(*sequences.rows(rows), width) for rows in order]
        with self.reference.judge(self.wrapped) as reference:
            near = [self._judged_by(reference, sequences.rows(rows), width) for rows in order]
        mine = torch.stack([*map(torch.cat, zip(*judged, strict=True)), torch.cat(near)])
        found = torch.zeros(4, whole, width, device=mask.device, dtype=mine.dtype)
        found[:, torch.cat(order)] = mine
        log_probs, entropy, values, reference_log_probs = self.accelerator.reduce(found) * mask
        return Judged(log_probs, entropy, values), reference_log_probs

    def _judged_by(self, reference: Any, rows: Sequences, width: int) -> torch.Tensor:
        with self.accelerator.autocast():
            found: torch.Tensor = reference(*rows, width).log_probs
        return found

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Rewards and KL of answers to the evaluation prompts, drawn as in training, every time by the same chance."""
        prompts = [Prompt.of(example) for example in self.eval_prompts or ()]
        device, pad = self.accelerator.device, self.tokenizer.pad_token_id

        def figures(batch: list[Prompt], first: int) -> dict[str, float]:
            rollouts = self.collect(batch, step=0, first=first)
            sequences, mask = rollouts.sequences(pad, device), rollouts.mask(device)
            return rollouts.figures() | {"kl": self._distance(sequences, mask)}

        size = (self.args.per_device_eval_batch_size or 1) * self.context.world_size
        means = evaluated(self.context, self.accelerator, prompts, figures, size=size)
        return self.guards.tell_evaluation(self.context, means, step=self.state.global_step)

    def _distance(self, sequences: Sequences, mask: torch.Tensor) -> float:
        """Mean KL of these answers from the reference, in nats."""
        width, order = mask.shape[1], list(self._micro_batches(torch.arange(len(mask))))
        total = torch.zeros(1, device=mask.device)
        for rows in order:
            part = sequences.rows(rows)
            with self.accelerator.autocast():
                policy = self.module(*part, width).log_probs
            with self.reference.judge(self.module) as reference:
                total += ((policy - self._judged_by(reference, part, width)) * mask[rows]).sum()
        return float(self.accelerator.reduce(total) / len(mask))

    def _guard(self, figures: Mapping[str, float], rollouts: Rollouts, *, step: int) -> None:
        distinct = float(len({tuple(answer.ids) for answer in rollouts.answers}) > 1)
        if not self.guards.tell_step(self.context, {**figures, "distinct": distinct}, step=step):
            self.control.should_training_stop = True

    def _mini_batches(self, answers: int, step: int, epoch: int) -> Iterator[torch.Tensor]:
        """Answers of each optimizer step: in their order first, later shuffled, alike in every rank."""
        order = torch.arange(answers)
        if epoch:
            chance = torch.Generator().manual_seed((self.args.seed * 1_000_003 + step) * 1009 + epoch)
            order = torch.randperm(answers, generator=chance)
        yield from torch.split(order, self.ppo.mini_batch_size)

    def _micro_batches(self, part: torch.Tensor) -> Iterator[torch.Tensor]:
        """This rank's share of a mini-batch, in batches of one forward pass; none where there are fewer answers than
        ranks."""
        if len(share := part[self._mine()]):
            yield from torch.split(share, self.args.per_device_train_batch_size)

    def _mine(self) -> slice:
        return slice(self.context.rank, None, self.context.world_size)

    def _order(self, size: int, turn: int) -> torch.Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(self.args.seed * 1_000_003 + turn))

    def extra_state(self) -> dict[str, float]:
        """The KL coefficient; the order of prompts follows from the step."""
        return {"kl_coef": self.controller.coefficient}

    def restore_extra(self, state: Mapping[str, float]) -> None:
        """The other way round."""
        self.controller.coefficient = state["kl_coef"]
