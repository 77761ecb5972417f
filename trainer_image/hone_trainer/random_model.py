"""A model of random weights and rows that fill its sequences, to measure a machine with: `python -m hone_trainer
random-model FILE DIRECTORY`, where FILE is a config.json. Called by `hone calibrate`; needs no network.
"""

import json
import sys
from pathlib import Path
from typing import Any

from hone.run import TrainerExit

ROWS = 64
LONGEST_ROW = 8192
"""Characters, each of which is a token."""


def make(config: Path, directory: Path) -> TrainerExit:
    """Leave `model/` (weights in bf16) and `rows.jsonl` there, and say where as JSON."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(config.read_text(encoding="utf-8"))
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = AutoConfig.for_model(values.pop("model_type"), **values, **ids)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(directory / "model")
    _tokenizer().save_pretrained(directory / "model")
    text = "the quick brown fox jumps over a lazy dog while rain falls " * (LONGEST_ROW // 32)
    rows = ({"prompt": text[n : n + 8], "completion": text[n + 8 : n + LONGEST_ROW]} for n in range(ROWS))
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sys.stdout.write(json.dumps({"directory": str(directory)}) + "\n")
    return TrainerExit.SUCCEEDED


def _tokenizer() -> Any:
    """One token for each byte, which fits any vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
