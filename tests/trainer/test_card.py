"""The model card: what it says of runs on the Hub's sources, and what it says nothing of."""

from types import SimpleNamespace
from typing import Any

import yaml

from hone_trainer.card import Facts, card
from hone_trainer.context import RunContext
from hone_trainer.inputs import Inputs, Source
from hone_trainer.report import EventLog
from hone_trainer.tokens import Counts

from .conftest import Attempt, MakeAttempt

BASE = Source(asked="hf://org/base@main", path="/cache/base", revision="0a1b")


def context_of(attempt: Attempt, **inputs: Any) -> RunContext:
    events = EventLog(attempt.directory.events)
    found = Inputs(**{"model": BASE, "tokenizer": BASE, **inputs})
    return RunContext(run=attempt.run, directory=attempt.directory, inputs=found, events=events, rank=0, world_size=1)


def prepared(**counts: Any) -> Any:
    return SimpleNamespace(
        train_counts=Counts(rows=1200, rows_used=1100),
        eval_counts=Counts(**counts) if counts else None,
        fingerprint="f00",
    )


def parts(text: str) -> tuple[Any, str]:
    """The metadata and the words."""
    _, front, words = text.split("---\n", 2)
    return yaml.safe_load(front), words


def test_sources_of_the_hub_stand_in_the_metadata_with_their_revisions_in_the_text(make_attempt: MakeAttempt) -> None:
    attempt = make_attempt(
        {
            "model": {"source": BASE.asked},
            "dataset": {"source": "hf://org/data@v2", "split": "train_sft[:1200]"},
            "quantization": "nf4",
        }
    )
    data = Source(asked="hf://org/data@v2", path="/cache/data", revision="9f8e")
    metrics = {
        "first_loss": 4.9,
        "last_loss": 2.8,
        "eval_before": {"eval_loss": 4.71},
        "eval_after": {"eval_loss": 2.95, "eval_rewards/accuracies": 0.75},
    }
    facts = Facts(data=prepared(rows=100, rows_used=90), steps=1200, metrics=metrics)
    front, words = parts(card(context_of(attempt, dataset=data, eval_dataset=data), facts, kind="adapter"))
    assert front == {
        "library_name": "peft",
        "base_model": "org/base",
        "datasets": ["org/data"],
        "tags": ["hone", "sft"],
    }
    for line in (
        "- base: org/base at 0a1b, in 4 bits (nf4)",
        "- data: org/data at 9f8e, split train_sft[:1200]",
        "- trained on 1,100 of 1,200 rows; SHA-256 of their tokens f00",
        "- evaluated on 90 rows: org/data at 9f8e",
        "- 1,200 steps, training loss 4.9 → 2.8",
        "- evaluation loss 4.71 → 2.95",
        "- held-out pairs in the right order 0.75",
    ):
        assert f"{line}\n" in words, words


def test_local_sources_are_bare_names_and_what_was_not_measured_is_not_mentioned(make_attempt: MakeAttempt) -> None:
    attempt = make_attempt()
    base = Source(asked="file:///home/me/models/tiny", path="/home/me/models/tiny")
    rows = Source(asked="file:///home/me/train.jsonl", path="/home/me/train.jsonl")
    inputs = context_of(attempt, model=base, tokenizer=base, dataset=rows)
    front, words = parts(card(inputs, Facts(data=prepared(), steps=4), kind="merged"))
    assert front == {"library_name": "transformers", "tags": ["hone", "sft"]}
    assert "/home/me" not in words
    assert "- base: tiny\n- data: train.jsonl, split train\n" in words
    assert "- 4 steps, training loss not measured\n" in words
    assert "evaluat" not in words
