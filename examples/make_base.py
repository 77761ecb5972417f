"""A small Llama that has read the documentation of Python's standard library: what fine-tuning starts from.

Called by `make demo` after make_dataset.py, whose documentation.jsonl it reads. Trains a byte-level BPE tokenizer and
a Llama of 4.2 M parameters in plain PyTorch, three minutes on two cores, with a fixed number of steps and one seed. It
never sees the questions, nor a module of the eval split. A second run that finds the model of this data does nothing.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
END, PAD = "<|end|>", "<|pad|>"
# A turn is `role:`, its text and <|end|>; {% generation %} marks what the loss of a chat counts, <|end|> included.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY, SMALL_VOCABULARY = 4096, 512
BLOCK_TOKENS, CONTEXT_TOKENS = 128, 1024
HELD_OUT_EVERY = 50  # every so many-th document measures and does not teach
MUON_PEAK = 0.02
PROGRESS_S = 4.0


def main() -> None:
    arguments = parse_arguments()
    settings = settings_of(arguments)
    if is_complete(arguments.output, settings):
        print(f"  base      found in {shown(arguments.output)}, nothing to do (--force makes it again)")
        return
    print(f"  base      reading {shown(arguments.data)} …", flush=True)
    documents = [json.loads(line)["text"] for line in arguments.data.open(encoding="utf-8")]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed at the end: neither Ctrl-C nor SIGTERM leaves anything behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent, prefix=f".{arguments.output.name}-") as temporary:
        made = Path(temporary, "made")
        try:
            facts = make(documents, arguments, made)
        except KeyboardInterrupt:
            print("\n  base      interrupted, nothing was kept", file=sys.stderr)
            raise SystemExit(130) from None
        (made / "stamp.json").write_text(json.dumps({"settings": settings, **facts}, indent=2) + "\n")
        if arguments.output.exists():
            shutil.rmtree(arguments.output)
        made.rename(arguments.output)
    print(
        f"  base      loss on unseen documentation {facts['loss_before']:.2f} → {facts['loss_after']:.2f} "
        f"in {facts['seconds']:.0f} s → {shown(arguments.output)}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE / "data" / "stdlib" / "documentation.jsonl",
        help="what it learns from (default: examples/data/stdlib/documentation.jsonl)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "base" / "stdlib-4m",
        help="folder to write (default: examples/base/stdlib-4m)",
    )
    parser.add_argument("--steps", type=int, default=350, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="blocks of 128 tokens in a step (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="peak of AdamW, after warm-up (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a much smaller model, for tests")
    parser.add_argument("--force", action="store_true", help="make it again, even if it is complete")
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"--data {arguments.data}: no such file; `python examples/make_dataset.py` makes it")
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")
    if arguments.force:
        shutil.rmtree(arguments.output, ignore_errors=True)
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the result, and so whether an existing one still holds."""
    return {
        **{name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in ("make_base.py", "muon.py")},
        "data": hashlib.sha256(arguments.data.read_bytes()).hexdigest(),
        **{name: getattr(arguments, name) for name in ("steps", "batch_size", "learning_rate", "seed", "small")},
    }


def make(documents: list[str], arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Tokenizer and model, trained and saved; returns what was measured."""
    import torch  # here, because a second run needs none of this and should answer at once
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the tokenizer warns of documents that are longer than the model's context
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # saving imports DeepSpeed where it is installed, which warns of no GPU
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(documents, SMALL_VOCABULARY if arguments.small else VOCABULARY)
    unseen, seen = documents[::HELD_OUT_EVERY], [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
    rows = tokenizer(seen)["input_ids"]
    held_out = next(blocks(tokenizer(unseen)["input_ids"], 96, tokenizer.eos_token_id, random.Random(0)))
    model = new_model(tokenizer, SMALL_SHAPE if arguments.small else SHAPE)
    print(
        f"  base      {sum(map(len, rows)):,} tokens, vocabulary {len(tokenizer):,}, Llama of "
        f"{model.num_parameters() / 1e6:.1f} M parameters, {arguments.steps} steps of "
        f"{arguments.batch_size * BLOCK_TOKENS:,} tokens",
        flush=True,
    )
    started = time.monotonic()
    loss_before = evaluate(model, held_out)
    train(model, blocks(rows, arguments.batch_size, tokenizer.eos_token_id, random.Random(arguments.seed)), arguments)
    loss_after = evaluate(model, held_out)
    seconds = time.monotonic() - started
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {"loss_before": loss_before, "loss_after": loss_after, "seconds": seconds}


def train_tokenizer(documents: list[str], size: int) -> Any:
    """Byte-level BPE: every text has tokens, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = CONTEXT_TOKENS
    return fast


def new_model(tokenizer: Any, shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,  # a third of the parameters would otherwise be a second table of words
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    return LlamaForCausalLM(config)


def blocks(rows: list[list[int]], batch_size: int, end: int, order: random.Random) -> Iterator[Any]:
    """Batches of full blocks, for ever: documents in a new order each epoch, one after another, <|end|> between."""
    import torch

    tokens: list[int] = []
    need = batch_size * BLOCK_TOKENS
    while True:
        for row in order.sample(rows, len(rows)):
            tokens += [*row, end]
            while len(tokens) >= need:
                yield torch.tensor(tokens[:need]).view(batch_size, BLOCK_TOKENS)
                del tokens[:need]


def train(model: Any, batches: Iterator[Any], arguments: argparse.Namespace) -> None:
    """Warm-up over the first tenth, then a cosine to a tenth of the peak."""
    import torch

    chosen = optimizers(model, arguments.learning_rate)
    started = shown_at = time.monotonic()
    mean: float | None = None
    model.train()
    for step in range(1, arguments.steps + 1):
        for optimizer, peak in chosen:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.steps, peak)
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in chosen:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        now = time.monotonic()
        if step == 1 or step == arguments.steps or now - shown_at >= PROGRESS_S:
            shown_at = now
            left_s = (now - started) / step * (arguments.steps - step)
            print(
                f"  base      step {step}/{arguments.steps} · loss {mean:.2f} · "
                f"{step * batch.numel() / (now - started):,.0f} tokens/s · {clock(left_s)} left",
                flush=True,
            )


def optimizers(model: Any, peak: float) -> list[tuple[Any, float]]:
    """Each optimizer with its peak learning rate: Muon for the matrices of the layers, AdamW for embeddings and norms.

    Muon reaches in 200,000 tokens a loss of 5.16 where AdamW alone reaches 5.58.
    """
    import torch
    from muon import Muon

    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        (Muon(matrices, lr=MUON_PEAK), MUON_PEAK),
        (torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True), peak),
    ]


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    warmup = max(1, num_steps // 10)
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def evaluate(model: Any, batch: Any) -> float:
    """Mean loss a token, in nats."""
    import torch

    model.eval()
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)


def is_complete(output: Path, settings: dict[str, Any]) -> bool:
    try:
        stamp = json.loads((output / "stamp.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(stamp.get("settings") == settings) and (output / "model.safetensors").is_file()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def shown(path: Path) -> str:
    """As a person would type it from where they stand."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    main()
