"""What tests of the core share: requests that this machine can plan, and a trainer that takes no seconds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hone.spec import JobSpec
from hone.spec.parse import parse

QUICK_TRAINER = Path(__file__).parent / "integration" / "quick_trainer.py"
_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A directory with `model` (a shape, and weights that nobody reads) and `rows.jsonl`."""
    place = tmp_path / "inputs"
    (place / "model").mkdir(parents=True)
    (place / "model" / "config.json").write_text(json.dumps(_TINY_LLAMA))
    (place / "model" / "model.safetensors").write_bytes(b"weights")
    (place / "rows.jsonl").write_text('{"text": "one row"}\n')
    return place


@pytest.fixture
def make_spec(inputs: Path) -> Callable[..., JobSpec]:
    """A request on those inputs; keywords replace its fields."""

    def make(**changes: Any) -> JobSpec:
        data = {
            "name": "demo",
            "model": {"source": f"file://{inputs / 'model'}"},
            "dataset": {"source": f"file://{inputs / 'rows.jsonl'}"},
            "method": {"sft": {}},
            "adapter": {"lora": {}},
            "compute": {"gpus_per_node": 0},
            **changes,
        }
        return parse(data)

    return make


@pytest.fixture
def quick_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HONE_TRAINER_PYTHON that runs the real trainer with a method that trains nothing."""
    script = tmp_path / "quick-python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{QUICK_TRAINER}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("HONE_TEST_STARTS", str(tmp_path / "starts"))
    return script
