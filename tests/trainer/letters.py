"""One small task for every method: reverse four letters out of sixteen.

The base has seen prompts answered in four ways and mixes them. SFT sees reversals only; a pair prefers the reversal to
another answer. Held out are the prompts whose crc32 is a multiple of ten.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

ALPHABET = "abcdefghijklmnop"
WAYS: Mapping[str, Callable[[str, random.Random], str]] = {
    "reverse": lambda word, _: word[::-1],
    "copy": lambda word, _: word,
    "sort": lambda word, _: "".join(sorted(word)),
    "shuffle": lambda word, chance: "".join(chance.sample(word, 4)),
}
SHARES = (0.25, 0.3, 0.25, 0.2)
"""How often the base saw each."""


def prompts(chance: random.Random, *, held_out: bool) -> Iterator[str]:
    """Prompts of one split, without an end."""
    while True:
        prompt = "".join(chance.sample(ALPHABET, 4)) + ">"
        if (crc32(prompt.encode()) % 10 == 0) == held_out:
            yield prompt


def answered(count: int, *, seed: int, held_out: bool = False) -> list[dict[str, str]]:
    """Prompts with their reversal."""
    source = prompts(random.Random(f"{seed} {held_out}"), held_out=held_out)
    return [{"prompt": prompt, "completion": prompt[3::-1]} for _, prompt in zip(range(count), source, strict=False)]


def preferred(count: int, *, seed: int, held_out: bool = False, shuffled: bool = False) -> list[dict[str, str]]:
    """Prompts with their reversal preferred to another answer; `shuffled` labels are thrown by a coin."""
    chance, rows = random.Random(f"{seed} {held_out} {shuffled}"), []
    for row in answered(count, seed=seed, held_out=held_out):
        word, right = row["prompt"][:4], row["completion"]
        wrong = right
        while wrong == right:
            wrong = chance.choice([way(word, chance) for way in list(WAYS.values())[1:]])
        sides = [right, wrong]
        if shuffled:
            chance.shuffle(sides)
        rows.append({"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1]})
    return rows


def make_tokenizer() -> Any:
    """One token for each letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<s>", "</s>", "<pad>", *ALPHABET, ">"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # no spaces between letters
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_base(path: Path, *, seed: int, steps: int = 400, batch: int = 128) -> Path:
    """A Llama of about 430,000 parameters that answers in the four ways, trained here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer, chance = make_tokenizer(), random.Random(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    source = prompts(chance, held_out=False)
    for _ in range(steps):
        asked = [next(source) for _ in range(batch)]
        ways = chance.choices(list(WAYS.values()), SHARES, k=batch)
        texts = [prompt + way(prompt[:4], chance) for prompt, way in zip(asked, ways, strict=True)]
        ids = torch.tensor([[*row, 1] for row in tokenizer(texts)["input_ids"]])
        labels = ids.clone()
        labels[:, :6] = -100  # the prompt
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def exact(model: Any, *, count: int, seed: int) -> float:
    """Share of held-out prompts whose sampled answer is the reversal, and ends."""
    import torch

    tokenizer, rows = make_tokenizer(), answered(count, seed=seed, held_out=True)
    torch.manual_seed(seed)
    ids = torch.tensor(tokenizer([row["prompt"] for row in rows])["input_ids"])
    model.eval()
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1].softmax(-1).multinomial(1)], dim=1)
    wanted = [[*tokenizer(row["completion"])["input_ids"][1:], 1] for row in rows]
    right: float = (ids[:, 6:] == torch.tensor(wanted)).all(1).float().mean().item()
    return right
