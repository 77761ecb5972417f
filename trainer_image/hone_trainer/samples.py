"""Answers to a few rows of the evaluation set, by the likeliest token at each step: what training changed, for
people."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hone_trainer.questions import Question


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int
) -> Iterator[tuple[Question, str]]:
    """Each question with its answer. Every sampling parameter is set: unset ones would come from the model's own
    files."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        use_cache=True,
    )
    trained = model.training
    model.eval()
    for question in questions:
        ids = torch.tensor([question.prompt_ids], device=model.device)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        yield question, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    model.train(trained)
