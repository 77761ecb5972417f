"""Group relative policy optimisation (GRPO, Shao et al. 2024) on TRL's trainer. Read from top to bottom; run(context)
is what a worker calls.

Every prompt is answered num_generations times; an answer's advantage is its reward against the mean of its group. A
step is one optimizer step on training.global_batch_size answers.
"""

from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from hone_trainer import outputs
from hone_trainer.arguments import training_arguments
from hone_trainer.context import RunContext
from hone_trainer.course import follow
from hone_trainer.data import Prepared, as_dataset, prepare
from hone_trainer.guards import Guards
from hone_trainer.model import check_model, load_tokenizer, stop_tokens
from hone_trainer.preference import without_dropout
from hone_trainer.prompts import prepare_prompts, tell_prompts
from hone_trainer.rewards import Rewards
from hone_trainer.rollouts import Prompt, Sampling, asked_alone, evaluated, roll_out
from hone_trainer.trained import trained_model
from hone_trainer.training import Watch
from hone_trainer.vocabulary import copy_rows
from hone_trainer.world import agree

_NAMES = {
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_fraction",
    "completions/mean_length": "answer_tokens",
    "completions/clipped_ratio": "truncated",
}
"""Figures of TRL by the names that ppo has for the same; its kl is the mean of a token."""


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
    arguments = _arguments(context, has_evaluation=data.evaluation is not None)
    model, parameters = trained_model(context, tokenizer)
    trainer = Trainer(context, model=without_dropout(model), args=arguments, tokenizer=tokenizer, data=data)
    clock.mark("model")

    try:
        follow(context, trainer, tokenizer, data=data, parameters=parameters, clock=clock)
    finally:
        trainer.rewards.close()


class Trainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer on prompts that are tokens already and on the reward layer; it reports through its watch."""

    def __init__(self, context: RunContext, *, model: Any, args: Any, tokenizer: Any, data: Prepared) -> None:
        spec = context.run.spec
        assert spec.method.grpo is not None
        self.watch, self.grpo = Watch(context), spec.method.grpo
        self.rewards = Rewards.load(context, self.grpo.rewards, device=args.device)
        self.guards = Guards(max_kl=self.grpo.max_kl, gold=self.rewards.gold)
        self._parts: dict[str, list[float]] = {}
        self._distinct = True
        super().__init__(
            model=model,
            reward_funcs=self._reward,
            args=args,
            train_dataset=as_dataset(data.train, data.fingerprint),
            eval_dataset=as_dataset(data.evaluation, "eval") if data.evaluation is not None else None,
            processing_class=tokenizer,
            callbacks=self.watch.callbacks,
        )
        if spec.adapter and "ref" in self.model.peft_config:
            if context.inputs.adapters:
                copy_rows(self.model, "default", "ref")
            else:
                self.model.delete_adapter("ref")  # a new adapter that is switched off leaves the base
        if self.ref_model is not None:  # TRL reads it from the model's files, which may lack tokens and an adapter
            self.ref_model.resize_token_embeddings(self.model.get_input_embeddings().num_embeddings)
            self.ref_model.load_state_dict(self.model.state_dict())
        self.watch.attach(self)
        self.sampling = Sampling(
            max_new_tokens=self.grpo.max_new_tokens,
            temperature=self.grpo.temperature,
            pad=tokenizer.pad_token_id,
            stops=tuple(stop_tokens(model, tokenizer)),
        )

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        """One forward and backward pass; a loss that is NaN or infinite ends the run before it reaches the weights."""
        rows = [example["rows"][0] for example in inputs]
        loss: torch.Tensor = super().training_step(model, inputs, *arguments, **options)
        return self.watch.checked(loss, step=self.state.global_step + 1, rows=rows)

    def evaluate(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        """Rewards of one answer to each evaluation prompt, drawn from all tokens, every time by the same chance."""
        return self.watch.evaluate(self._measure)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the figures of the answers to the callbacks under the names that ppo has for them."""
        noted = {name: sum(values) / len(values) for name, values in self._metrics["train"].items() if values}
        found = {ours: noted[theirs] for theirs, ours in _NAMES.items() if theirs in noted}
        found |= {name: sum(values) / len(values) for name, values in self._parts.items()}
        self._metrics["train"].clear()
        self._parts.clear()
        if "entropy" in found and "truncated" in found:
            figures = {**found, "distinct": float(self._distinct)}
            if not self.guards.tell_step(self.watch.context, figures, step=self.state.global_step):
                self.control.should_training_stop = True
        super().log(logs | found, start_time)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The tokens that prompts.py made; a prompt is known by its JSON text."""
        return [self._ids[prompt] for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self._ids = {example["prompt"]: list(example["prompt_ids"]) for example in inputs}
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        with asked_alone(self.accelerator.unwrap_model(self.model), GenerationConfig(), training=self.model.training):
            return super()._generate_single_turn(*arguments, **options)

    def _reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        """The weighted sum of all signals, of which each is told by itself."""
        examples = zip(prompts, columns["prompt_ids"], columns["row"], columns["rows"], strict=True)
        asked = [
            Prompt.of({"prompt": prompt, "prompt_ids": ids, "row": row, "rows": rows})
            for prompt, ids, row, rows in examples
        ]
        answers = [
            prompt.answered(text, num_tokens=len(ids))
            for prompt, text, ids in zip(asked, completions, completion_ids, strict=True)
        ]
        found = self.rewards.score(answers, step=self.state.global_step + 1)
        for name, values in found.parts.items():
            self._parts.setdefault(f"reward/{name}", []).append(self._mean(float(values.sum()), len(values)))
        self._distinct = len({tuple(ids) for ids in completion_ids}) > 1
        self.watch.tokens_seen += sum(map(len, completion_ids))
        return list(found.total.tolist())

    def _mean(self, total: float, count: int) -> float:
        """Over all ranks."""
        sums = torch.tensor([total, float(count)], device=self.args.device)
        whole, number = self.accelerator.reduce(sums).tolist()
        return float(whole / number)

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        context, prompts = self.watch.context, [Prompt.of(example) for example in self.eval_dataset]
        model = self.accelerator.unwrap_model(self.model)

        def figures(batch: list[Prompt], first: int) -> dict[str, float]:
            with self.accelerator.autocast():
                drawn = roll_out(
                    model,
                    self.processing_class,
                    self.rewards,
                    batch,
                    self.sampling,
                    missing_eos_penalty=0.0,
                    seed=self.args.seed * 1_000_003 + first,
                    step=self.state.global_step,
                    share=slice(context.rank, None, context.world_size),
                    stop=context.stop,
                )
            return drawn.figures()

        size = self.args.per_device_eval_batch_size * context.world_size
        means = evaluated(context, self.accelerator, prompts, figures, size=size)
        return self.guards.tell_evaluation(context, means, step=self.state.global_step)


def _arguments(context: RunContext, *, has_evaluation: bool) -> Any:
    grpo = context.run.spec.method.grpo
    assert grpo is not None
    return training_arguments(
        GRPOConfig,
        context,
        has_evaluation=has_evaluation,
        num_generations=grpo.num_generations,
        num_iterations=grpo.num_iterations,
        beta=grpo.beta,
        use_bias_correction_kl=True,  # the distance times the ratio: the gradient of the reverse KL, without bias
        epsilon=grpo.epsilon,
        loss_type=grpo.loss,
        max_completion_length=grpo.max_new_tokens,
        temperature=grpo.temperature,
        top_p=grpo.top_p,
        top_k=grpo.top_k,
        min_p=None,
        repetition_penalty=1.0,
        disable_dropout=True,
    )
