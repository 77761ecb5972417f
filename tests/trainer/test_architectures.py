"""One small model of each family through all-linear LoRA, training, saving, merging, and a new process without Hone."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import MakeAttempt, RunHere, make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GATED = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
FUSED = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": ({}, GATED),
    "qwen3": ({"head_dim": 8}, GATED),
    "gemma": ({"head_dim": 8}, GATED),
    "phi3": ({}, ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, ["c_attn", "c_fc", "c_proj"]),
    "mixtral": ({"num_local_experts": 4}, ["k_proj", "o_proj", "q_proj", "v_proj"]),
}
MORE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "mistral": ({}, GATED),
    "qwen2": ({}, GATED),
    "gemma2": ({"head_dim": 8}, GATED),
    "gemma3_text": ({"head_dim": 8}, GATED),
    "olmo2": ({}, GATED),
    "smollm3": ({}, GATED),
    "starcoder2": ({}, ["c_fc", "c_proj", "k_proj", "o_proj", "q_proj", "v_proj"]),
    "gpt_neox": ({}, FUSED),
    "opt": ({"ffn_dim": 48}, ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, FUSED),
    "qwen2_moe": ({"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}, GATED),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ["k_proj", "o_proj", "q_proj", "v_proj"],
    ),
}
"""Changes of the sizes, and the names that all-linear stands for."""


def make_family(path: Path, family: str, *, dtype: torch.dtype = torch.float32) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    changes, _ = (FAMILIES | MORE)[family]
    sizes = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} if family == "gpt2" else SIZES
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **changes))
    model.to(dtype).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


Read = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    """Asks one process that knows nothing of Hone."""
    command = [sys.executable, str(Path(__file__).parent / "plain_reader.py")]
    log = tmp_path_factory.mktemp("plain") / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):

        def read(**places: Path) -> dict[str, Any]:
            assert child.stdin and child.stdout
            child.stdin.write(json.dumps({name: str(path) for name, path in places.items()}) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
            assert line, log.read_text()
            found: dict[str, Any] = json.loads(line)
            return found

        yield read
        assert child.stdin
        child.stdin.close()
        child.wait(timeout=30)


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_adapter_and_merged_model_answer_alike_in_plain_peft_and_transformers(
    make_attempt: MakeAttempt, run_here: RunHere, read_elsewhere: Read, tmp_path: Path, family: str
) -> None:
    base = make_family(tmp_path / family, family)
    changes = {"model": {"source": f"file://{base}"}, "training": {"max_steps": 2}, "output": {"merged": True}}
    attempt = run_here(make_attempt(changes))
    outputs = attempt.directory.scratch / "outputs"
    config = json.loads((outputs / "adapter" / "adapter_config.json").read_text())
    assert sorted({path.rpartition(".")[2] for path in config["target_modules"]}) == (FAMILIES | MORE)[family][1]
    found = read_elsewhere(base=base, adapter=outputs / "adapter", merged=outputs / "merged")
    assert found["moved"] > 1e-4
    assert found["merged"] < 2e-5
    assert found["hone"] == []
    assert len(set(found["tokens"])) == 1
