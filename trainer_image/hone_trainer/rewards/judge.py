"""A signal from a reward model: a score for prompt and answer, through its own tokenizer and chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from hone.job import EventType
from hone.run import TrainerExit
from hone.spec import Columns, Model
from hone.spec.methods import RewardModelPart
from hone_trainer.context import RunContext
from hone_trainer.encoding import Encoder, TemplateRefused, training_template
from hone_trainer.failure import RunFailed
from hone_trainer.lora import load_adapter, rows_needed
from hone_trainer.model import check_model, load_model, load_tokenizer, pad_apart, weights_dtype
from hone_trainer.rewards.answers import Answer, SignalFailed

BATCH = 16
"""Answers in one forward pass."""


def open_judge(context: RunContext, part: RewardModelPart, *, number: int, field: str, device: Any) -> "Judge":
    """The reward model of part `number`. Raises RunFailed (USER) where it is none."""
    source = context.inputs.reward_models[str(number)]
    settings = Model(source=part.source)
    tokenizer = pad_apart(load_tokenizer(source.tokenizer, settings))
    check_model(source.model, scores=True)
    if source.adapter is None and not _has_head(Path(source.model.path)):
        raise RunFailed(
            TrainerExit.USER,
            f"{field}.source: {part.source} is a language model, which gives no scores.",
            fix="Train a reward model (method: reward) and name its job.",
        )
    dtype = weights_dtype(context.run.launch, adapted=True)
    rows = rows_needed([source.adapter] if source.adapter else [])
    model = load_model(source.model, settings, dtype=dtype, tokenizer=tokenizer, scores=True, rows=rows)
    if source.adapter is not None:
        model = load_adapter(model, source.adapter, base=source.model, task="SEQ_CLS")
    return Judge(context, model.to(device).eval().requires_grad_(False), tokenizer, part, field)


class Judge:
    """Scores answers as the reward model was trained: the same tokens, the stop token included."""

    def __init__(self, context: RunContext, model: Any, tokenizer: Any, part: RewardModelPart, field: str) -> None:
        self._context, self._model, self._tokenizer, self._part, self._field = context, model, tokenizer, part, field
        self._has_cut = False
        self._encoder = Encoder(
            tokenizer=tokenizer,
            format="prompt_completion",
            columns=Columns(prompt="prompt", completion="completion"),
            respond_only=True,
        )

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Scores, in fp32."""
        batches = [answers[start : start + BATCH] for start in range(0, len(answers), BATCH)]
        return [score for batch in batches for score in self._scores(batch)]

    def _scores(self, answers: Sequence[Answer]) -> list[float]:
        rows = [self._cut_to_fit(self._tokens(answer)) for answer in answers]
        whole = [torch.tensor(row) for row in rows]
        ids = pad_sequence(whole, batch_first=True, padding_value=self._tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(one) for one in whole], batch_first=True)
        device = self._model.device
        scores: list[float] = self._model(ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float().tolist()
        return scores

    def _tokens(self, answer: Answer) -> list[int]:
        if isinstance(answer.prompt, str):
            row: dict[str, Any] = {"prompt": answer.prompt, "completion": answer.text}
        else:
            training_template(self._tokenizer, marked=False)
            row = {"prompt": answer.prompt, "completion": [{"role": "assistant", "content": answer.text}]}
        try:
            return self._encoder.encode([row])[0].ids
        except TemplateRefused as error:
            message = f"cannot read an answer, because its chat template does not take it: {error.why}"
            raise SignalFailed(message, kind="template") from error

    def _cut_to_fit(self, ids: list[int]) -> list[int]:
        """The end of what is too long: the score is that of the last token."""
        if len(ids) <= self._part.max_length:
            return ids
        if not self._has_cut:
            self._has_cut = True
            self._context.event(
                EventType.WARNING,
                f"{self._field}: an answer with its prompt has {len(ids):,} tokens, so the reward model sees the last "
                f"{self._part.max_length:,} of them; raise max_length if it can read more.",
            )
        return ids[-self._part.max_length :]


def _has_head(path: Path) -> bool:
    """Whether a model's files say that it classifies."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return any("ForSequenceClassification" in name for name in config.get("architectures") or [])
