"""Rows to batches: padded, or packed with every row shut off from its neighbours.

Called by the methods' trainers. `rows` (where the batch came from) and `num_tokens` travel in the batch as plain
numbers and
are taken out again before the model sees it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hone_trainer.tokens import IGNORED


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads rows to the longest of their batch."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of `examples`."""
        batch = padded(examples, pad_token_id=self.pad_token_id)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch | provenance(examples)


@dataclass(frozen=True, kw_only=True)
class PackedCollator:
    """Packed sequences for attention with a mask: positions restart at each row, from which transformers builds a
    block mask.

    TRL's own packing flattens a batch into one sequence, which is what flash attention wants, but costs other kernels
    (batch × length)² instead of batch × length².
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of `examples`; the padding at a sequence's end is a row of its own."""
        batch = padded(examples, pad_token_id=self.pad_token_id)
        width = batch["input_ids"].shape[1]
        batch["position_ids"] = torch.stack([_positions(example["seq_lengths"], width) for example in examples])
        return batch | provenance(examples)


@dataclass(frozen=True, kw_only=True)
class FlatCollator:
    """Packed sequences for flash attention: the whole batch in one line, with the borders its kernels read (as TRL
    does)."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of `examples`."""
        lengths = torch.tensor([length for example in examples for length in example["seq_lengths"]])
        borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        flat = {
            name: torch.cat([torch.tensor(example[name]) for example in examples])[None]
            for name in ("input_ids", "labels")
        }
        positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
        kernels = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
        return {**flat, "position_ids": positions, **kernels} | provenance(examples)


def padded(examples: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> dict[str, Any]:
    """input_ids and labels of equal length."""
    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), width), pad_token_id)
    labels = torch.full((len(examples), width), IGNORED)
    for index, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[index, :length] = torch.tensor(example["input_ids"])
        labels[index, :length] = torch.tensor(example["labels"])
    return {"input_ids": ids, "labels": labels}


def provenance(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which rows of the data set are in the batch, and how many tokens."""
    return {
        "rows": [row for example in examples for row in example["rows"]],
        "num_tokens": sum(len(example["input_ids"]) for example in examples),
    }


def _positions(lengths: Sequence[int], width: int) -> torch.Tensor:
    spans = [*lengths, width - sum(lengths)]
    return torch.cat([torch.arange(span) for span in spans])


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Pairs as TRL's trainers read them: the chosen sides in the upper half of the batch, the rejected ones below."""

    pad_token_id: int
    with_answers: bool
    """Whether the batch says which tokens are answers, in completion_mask."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of `examples`, twice as many rows."""
        sides = [(example, side) for side in ("chosen", "rejected") for example in examples]
        rows = [example[f"{side}_ids"] for example, side in sides]
        lengths = torch.tensor([len(row) for row in rows])
        places = torch.arange(int(lengths.max()))
        ids = torch.full((len(rows), len(places)), self.pad_token_id)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": (places < lengths[:, None]).long()}
        if self.with_answers:
            starts = torch.tensor([example[f"{side}_start"] for example, side in sides])
            batch["completion_mask"] = batch["attention_mask"] * (places >= starts[:, None])
        for name in ("margin", "ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        rows_of = [row for example in examples for row in example["rows"]]
        return batch | {"rows": rows_of, "num_tokens": int(lengths.sum())}
