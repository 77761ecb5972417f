"""What others do with our outputs: transformers and PEFT, and nothing of Hone's. Run as a process of its own.

Reads one JSON object a line, {base, adapter, merged}; answers with how far the logits are from each other.
"""

import json
import sys
import warnings
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 60)[None]).logits
    return found.float()


def answer(base: str, adapter: str, merged: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing tensors
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        adapted = logits(PeftModel.from_pretrained(model, adapter))
    whole = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    return {
        "moved": float((adapted - before).abs().max()),
        "merged": float((whole - adapted).abs().max()),
        "tokens": [len(AutoTokenizer.from_pretrained(place)) for place in (base, adapter, merged)],
        "hone": [name for name in sys.modules if name.partition(".")[0] in ("hone", "hone_trainer")],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)  # noqa: T201
