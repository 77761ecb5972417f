"""Answers drawn from the policy, with their scores: what PPO learns from, the same batch in every rank.

Called by ppo, and by grpo for its evaluation. Each rank answers and scores its share of the prompts; then all ranks
hold all of it, so that means, whitening and the order of mini-batches need no agreement. Every answer has chance
of its own, by a seed: it depends neither on the number of ranks, nor on what was drawn before.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

from hone_trainer.context import RunContext, StopSignal
from hone_trainer.policy import Sequences, without_adapter
from hone_trainer.rewards import Answer, Rewards
from hone_trainer.training import Cut


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row to be answered."""

    ids: list[int]
    text: str | list[dict[str, Any]]
    row: Mapping[str, Any]
    number: int
    """Of its row in the data set, from 1."""

    @staticmethod
    def of(example: Mapping[str, Any]) -> "Prompt":
        """A row of the table that prompts.py makes."""
        return Prompt(
            ids=list(example["prompt_ids"]),
            text=json.loads(example["prompt"]),
            row=json.loads(example["row"]),
            number=example["rows"][0],
        )

    def answered(self, text: str, *, num_tokens: int) -> Answer:
        """An answer to it, as the rewards see it."""
        return Answer(prompt=self.text, text=text, num_tokens=num_tokens, row=self.row)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    pad: int
    stops: tuple[int, ...]
    """Tokens that end an answer."""


class Chance:
    """Sampling as the likeliest token under noise: argmax(z/T + g) with Gumbel noise g is a draw from softmax(z/T).

    Called by transformers' `generate` with the logits of every token. Source: Gumbel 1954; Maddison et al. 2014.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, device: Any) -> None:
        """`seeds`: one for each answer."""
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, _ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits of shape (answers, vocabulary), with noise."""
        noise = torch.empty_like(logits, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return logits.float() / self._temperature - noise.log()


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One answer."""

    prompt_ids: list[int]
    ids: list[int]
    """Its tokens, the stop token included."""
    ended: bool
    """Whether it ends by itself."""
    number: int
    score: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """A batch of answers, of all ranks, in the order of their prompts."""

    answers: Sequence[Drawn]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What drawing and scoring took this rank: generate_s, score_s."""

    def sequences(self, pad: int, device: Any) -> Sequences:
        """As the policy reads them."""
        whole = [torch.tensor([*answer.prompt_ids, *answer.ids]) for answer in self.answers]
        ids = pad_sequence(whole, batch_first=True, padding_value=pad)
        starts = torch.tensor([len(answer.prompt_ids) for answer in self.answers])
        lengths = torch.tensor([len(tokens) for tokens in whole])
        return Sequences(ids.to(device), starts.to(device), lengths.to(device))

    def mask(self, device: Any) -> torch.Tensor:
        """(answers, width): 1 at the tokens of an answer."""
        lengths = torch.tensor([len(answer.ids) for answer in self.answers], device=device)
        return (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).float()

    @property
    def scores(self) -> torch.Tensor:
        """(answers,) in fp32."""
        return torch.tensor([answer.score for answer in self.answers], dtype=torch.float32)

    def figures(self) -> dict[str, float]:
        """Mean reward, whole and in parts, length, and the share that did not end."""
        found = {
            "reward": float(np.mean([answer.score for answer in self.answers])),
            "answer_tokens": float(np.mean([len(answer.ids) for answer in self.answers])),
            "truncated": float(np.mean([not answer.ended for answer in self.answers])),
        }
        for name in self.answers[0].parts:
            found[f"reward/{name}"] = float(np.mean([answer.parts[name] for answer in self.answers]))
        return found


def roll_out(
    model: Any,
    tokenizer: Any,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    missing_eos_penalty: float,
    seed: int,
    step: int,
    share: slice,
    stop: StopSignal,
) -> Rollouts:
    """Answers of `model` to all prompts, of which this rank draws and scores its `share`; the first has `seed`, the
    next one more. Raises Cut in every rank when one of them was asked to stop meanwhile."""
    seeds = range(seed, seed + len(prompts))[share]
    began = time.monotonic()
    drawn = draw(model, prompts[share], sampling, seeds=seeds, stop=stop)
    drawn_at = time.monotonic()
    mine = [] if stop.asked else score(rewards, tokenizer, prompts[share], drawn, step=step)
    penalised = [
        answer if answer.ended else replace(answer, score=answer.score - missing_eos_penalty) for answer in mine
    ]
    seconds = {"generate_s": drawn_at - began, "score_s": time.monotonic() - drawn_at}
    parts = gather_object([(penalised, stop.asked)])
    if any(asked for _, asked in parts):
        raise Cut
    whole: list[Drawn | None] = [None] * len(prompts)
    for rank, (part, _) in enumerate(parts):
        whole[rank :: len(parts)] = part
    return Rollouts(answers=[answer for answer in whole if answer is not None], seconds=seconds)


@torch.no_grad()
def draw(
    model: Any, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int], stop: StopSignal
) -> list[Drawn]:
    """One answer to each prompt; shorter than it would be where the run is asked to stop."""
    from transformers import GenerationConfig

    if not prompts:
        return []
    config = GenerationConfig(
        do_sample=False,  # the noise of Chance draws
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=sampling.pad,
        eos_token_id=list(sampling.stops),
        use_cache=True,
    )
    whole = [torch.tensor(prompt.ids) for prompt in prompts]
    ids = pad_sequence(whole, batch_first=True, padding_value=sampling.pad, padding_side="left")  # the answer follows
    mask = pad_sequence([torch.ones_like(one) for one in whole], batch_first=True, padding_side="left")
    chance = Chance(seeds, temperature=sampling.temperature, device=model.device)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with asked_alone(model, config):
        ends = [lambda tokens, _scores: torch.full(tokens.shape[:1], stop.asked, device=tokens.device)]
        out = model.generate(**inputs, generation_config=config, logits_processor=[chance], stopping_criteria=ends)
    return [
        _drawn(prompt, tokens, sampling)
        for prompt, tokens in zip(prompts, out[:, ids.shape[1] :].tolist(), strict=True)
    ]


def evaluated(
    context: RunContext,
    accelerator: Any,
    prompts: Sequence[Prompt],
    figures: Callable[[list[Prompt], int], Mapping[str, float]],
    *,
    size: int,
) -> dict[str, float]:
    """Means over all prompts of what `figures` says of batches of them, each with the number of its first one.

    Raises Cut in every rank when one of them was asked to stop.
    """
    sums: dict[str, float] = {}
    for start in range(0, len(prompts), size):
        batch = list(prompts[start : start + size])
        for name, value in figures(batch, start).items():
            sums[name] = sums.get(name, 0.0) + value * len(batch)
        if accelerator.reduce(torch.tensor([int(context.stop.asked)], device=accelerator.device)).item():
            raise Cut
    return {f"eval_{name}": value / len(prompts) for name, value in sums.items()}


@contextmanager
def asked_alone(model: Any, config: Any, *, training: bool = False) -> Iterator[None]:
    """What is not set would come from the model's own files: penalties, forbidden tokens, a narrower choice. The model
    is in training mode meanwhile only with `training`."""
    base = without_adapter(model)
    own, trained = base.generation_config, model.training
    base.generation_config = config
    model.train(training)
    try:
        yield
    finally:
        base.generation_config = own
        model.train(trained)


def score(
    rewards: Rewards, tokenizer: Any, prompts: Sequence[Prompt], drawn: Sequence[Drawn], *, step: int
) -> list[Drawn]:
    """The answers with what the rewards give them."""
    if not drawn:
        return []
    answers = [
        prompt.answered(tokenizer.decode(answer.ids, skip_special_tokens=True), num_tokens=len(answer.ids))
        for prompt, answer in zip(prompts, drawn, strict=True)
    ]
    found = rewards.score(answers, step=step)
    return [
        replace(
            answer,
            score=float(found.total[index]),
            parts={name: float(part[index]) for name, part in found.parts.items()},
        )
        for index, answer in enumerate(drawn)
    ]


def _drawn(prompt: Prompt, tokens: list[int], sampling: Sampling) -> Drawn:
    end = next((place + 1 for place, token in enumerate(tokens) if token in sampling.stops), None)
    return Drawn(
        prompt_ids=prompt.ids, ids=tokens[:end] if end else tokens, ended=end is not None, number=prompt.number
    )
