import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.errors import IntegrityError
from hone_trainer.outputs import compare, stored_dtype

from .conftest import MakeAttempt, RunHere, make_model

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 40)[None]).logits.float()
    return found


def test_an_adapter_loads_on_its_base_and_is_what_was_trained(
    make_attempt: MakeAttempt, run_here: RunHere, tiny_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = run_here(make_attempt({"output": {"merged": True}})).directory.scratch / "outputs"
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, directory / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(directory / "merged"))
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.allclose(merged, adapted, atol=2e-5)
    assert AutoTokenizer.from_pretrained(directory / "merged").eos_token == "</s>"


def test_outputs_hold_no_pickle_and_name_no_path_of_this_machine(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path
) -> None:
    attempt = run_here(make_attempt({"output": {"merged": True}}))
    files = [file for file in (attempt.directory.scratch / "outputs").rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in PICKLES]
    leaking = [file.name for file in files if str(tmp_path).encode() in file.read_bytes()]
    assert leaking == []
    config = json.loads((attempt.directory.scratch / "outputs" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert sorted(config["target_modules"])[0] == "down_proj"  # names, not the path of every layer


def test_an_adapter_knows_its_base(make_attempt: MakeAttempt, run_here: RunHere, tiny_model: Path) -> None:
    from hashlib import sha256

    directory = run_here(make_attempt()).directory.scratch / "outputs" / "adapter"
    base = json.loads((directory / "hone_base.json").read_text())
    assert base["source"] == f"file://{tiny_model}"
    assert base["config_sha256"] == sha256((tiny_model / "config.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_saved_in_the_precision_of_their_base(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, dtype: str
) -> None:
    base = make_model(tmp_path / "base", dtype=dtype)
    model = {"model": {"source": f"file://{base}"}}
    full = run_here(make_attempt({**model, "adapter": None}))
    merged = run_here(make_attempt({**model, "output": {"merged": True}}))
    expected = getattr(torch, dtype)
    assert stored_dtype(full.directory.scratch / "outputs" / "model") == expected
    assert stored_dtype(merged.directory.scratch / "outputs" / "merged") == expected
    record = json.loads((merged.directory.scratch / "worker.json").read_text())
    assert 0 <= record["metrics"]["merge"]["kl_nats"] < 1e-4


def test_what_is_trained_in_full_beside_the_adapter_is_saved_and_merged(
    make_attempt: MakeAttempt, run_here: RunHere, tiny_model: Path
) -> None:
    from safetensors.torch import load_file

    changes = {"adapter": {"lora": {"modules_to_save": ["lm_head"], "use_dora": True}}, "output": {"merged": True}}
    outputs = run_here(make_attempt(changes)).directory.scratch / "outputs"
    base = load_file(tiny_model / "model.safetensors")
    merged = load_file(outputs / "merged" / "model.safetensors")
    adapter = load_file(outputs / "adapter" / "adapter_model.safetensors")
    assert not torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
    assert torch.equal(merged["lm_head.weight"], adapter["base_model.model.lm_head.weight"])


def test_the_record_says_what_ran(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    attempt = run_here(make_attempt())
    record = json.loads((attempt.directory.scratch / "worker.json").read_text())
    assert record["seed"] == 42
    assert record["versions"].keys() >= {"hone", "torch", "trl", "peft", "transformers"}
    assert attempt.events("data")[0].fields == {"fingerprint": record["data"]["fingerprint"], "prompts": "text"}
    assert record["data"]["train"]["rows_used"] == 64
    assert record["steps"] == {"done": 4, "max": 4, "best": None}
    assert (record["metrics"]["first_loss"], record["metrics"]["last_loss"]) == (
        attempt.losses()[0],
        attempt.losses()[-1],
    )
    assert record["peak_memory_bytes"]["host"] > 100e6


def test_files_that_differ_from_what_was_trained_are_found(tmp_path: Path) -> None:
    tensor = {"a": torch.ones(2)}
    compare(tensor, {"a": torch.ones(2)}, where=tmp_path)
    with pytest.raises(IntegrityError, match="holds 2 tensors, 1 were trained: b"):
        compare(tensor, {"a": torch.ones(2), "b": torch.ones(1)}, where=tmp_path)
    with pytest.raises(IntegrityError, match=r"a in .* is not what was trained"):
        compare(tensor, {"a": torch.zeros(2)}, where=tmp_path)
    with pytest.raises(IntegrityError, match=r"a in .* is not what was trained"):
        compare(tensor, {"a": torch.ones(3)}, where=tmp_path)
    with pytest.raises(IntegrityError, match="not finite"):
        compare({"a": torch.tensor([math.inf])}, {"a": torch.tensor([math.inf])}, where=tmp_path)
