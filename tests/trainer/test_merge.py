"""The method merge in this process: one adapter or several, what it measures, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hone.run import TrainerExit
from hone_trainer.failure import RunFailed

from .conftest import Attempt, MakeAttempt, RunHere, make_model

Adapter = dict[str, Any]
LORAS: dict[str, Adapter] = {
    "first": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
    "second": {"rank": 4, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "third": {"rank": 2, "alpha": 5.0, "target_modules": ["q_proj"]},
    "dora": {"rank": 2, "use_dora": True, "target_modules": ["q_proj"]},
    "head": {"rank": 2, "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def adapters() -> dict[str, Path]:
    return {}


@pytest.fixture
def adapter(adapters: dict[str, Path], make_attempt: MakeAttempt, run_here: RunHere) -> Any:
    """Trains an adapter for two steps, once for all tests."""

    def train(name: str) -> Path:
        if name not in adapters:
            attempt = run_here(make_attempt({"adapter": {"lora": LORAS[name]}, "training": {"max_steps": 2}}))
            adapters[name] = attempt.directory.scratch / "outputs" / "adapter"
        return adapters[name]

    return train


@pytest.fixture
def merge(make_attempt: MakeAttempt, run_here: RunHere) -> Any:
    """Runs a merge of adapters with weights."""

    def run(*parts: tuple[Path, float], **options: Any) -> Attempt:
        sources = [{"source": f"file://{path}", "weight": weight} for path, weight in parts]
        model = {"model": {"source": f"file://{options.pop('base')}"}} if "base" in options else {}
        nothing = {"dataset": None, "adapter": None, "training": None}
        method = {"sft": None, "merge": {"adapters": sources, **options}}
        return run_here(make_attempt({**model, **nothing, "method": method}))

    return run


def merged(attempt: Attempt) -> dict[str, torch.Tensor]:
    return load_file(attempt.directory.scratch / "outputs" / "merged" / "model.safetensors")


def update(adapter: Path, key: str) -> torch.Tensor:
    """What an adapter adds to one weight, by the formula of the paper: scale × B A."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    root = f"base_model.model.{key.removesuffix('.weight')}"
    if f"{root}.lora_A.weight" not in tensors:
        return torch.zeros(())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return scale * tensors[f"{root}.lora_B.weight"] @ tensors[f"{root}.lora_A.weight"]


KEYS = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]


def test_one_adapter_is_added_to_its_base(adapter: Any, merge: Any, tiny_model: Path) -> None:
    found, base = merged(merge((adapter("first"), 1.0))), load_file(tiny_model / "model.safetensors")
    assert found.keys() == base.keys()
    for key in base:
        assert torch.allclose(found[key], base[key] + update(adapter("first"), key), atol=1e-6), key
    assert not torch.equal(found[KEYS[0]], base[KEYS[0]])


def test_cat_is_the_exact_weighted_sum_whatever_the_ranks_and_scales(
    adapter: Any, merge: Any, tiny_model: Path
) -> None:
    parts = [(adapter("second"), 0.5), (adapter("third"), -1.5), (adapter("first"), 1.0)]
    found, base = merged(merge(*parts)), load_file(tiny_model / "model.safetensors")
    for key in base:
        wanted = base[key] + sum(weight * update(path, key) for path, weight in parts)
        assert torch.allclose(found[key], wanted, atol=1e-6), key


def test_a_weight_scales_a_single_adapter(adapter: Any, merge: Any, tiny_model: Path) -> None:
    found, base = merged(merge((adapter("second"), 0.25))), load_file(tiny_model / "model.safetensors")
    for key in KEYS:
        assert torch.allclose(found[key], base[key] + 0.25 * update(adapter("second"), key), atol=1e-6), key


def test_linear_has_cross_terms_and_says_how_far_from_the_sum_it_is(adapter: Any, merge: Any, tiny_model: Path) -> None:
    attempt = merge((adapter("first"), 1.0), (adapter("second"), 1.0), combination="linear")
    found, base = merged(attempt), load_file(tiny_model / "model.safetensors")
    exact = base[KEYS[0]] + update(adapter("first"), KEYS[0]) + update(adapter("second"), KEYS[0])
    assert not torch.allclose(found[KEYS[0]], exact, atol=1e-4)
    assert "cross terms" in attempt.events("warning")[0].message


def test_a_merge_writes_down_both_divergences(adapter: Any, merge: Any) -> None:
    attempt = merge((adapter("first"), 1.0))
    record = json.loads((attempt.directory.scratch / "worker.json").read_text())
    quality = record["metrics"]["merge"]
    assert 0 <= quality["kl_nats"] < 1e-9 < quality["kl_nats_bf16_base"] < 1e-2
    [note] = [event for event in attempt.events("note") if event.message.startswith("Merged")]
    assert note.metrics == quality
    assert record["metrics"]["adapters"] == [{"source": f"file://{adapter('first')}", "weight": 1.0}]


def test_a_merge_that_moves_too_far_is_refused(
    make_attempt: MakeAttempt, run_here: RunHere, merge: Any, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", dtype="bfloat16")
    trained = run_here(make_attempt({"model": {"source": f"file://{base}"}, "training": {"max_steps": 2}}))
    adapter = trained.directory.scratch / "outputs" / "adapter"
    with pytest.raises(RunFailed, match=r"is not the adapted one: KL .* at most 1e-12 is allowed\. Raise") as caught:
        merge((adapter, 1.0), base=base, max_kl=1e-12)
    assert caught.value.code == TrainerExit.USER


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["first", "third"], {"combination": "linear"}, "linear cannot combine these adapters: All adapters must have"),
        (["first", "dora"], {}, "has DoRA, which cannot be weighed or added to others"),
        (["head", "first"], {}, "has modules_to_save, which cannot be weighed"),
    ],
)
def test_adapters_that_cannot_be_combined_are_refused(
    adapter: Any, merge: Any, names: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunFailed, match=message):
        merge(*((adapter(name), 1.0) for name in names), **options)


@pytest.mark.parametrize("name", ["dora", "head"])
def test_what_cannot_be_combined_is_merged_by_itself(adapter: Any, merge: Any, name: str) -> None:
    record = merge((adapter(name), 1.0)).directory.scratch / "worker.json"
    assert json.loads(record.read_text())["metrics"]["merge"]["kl_nats"] < 1e-9


def test_an_adapter_as_the_model_is_refused(adapter: Any, merge: Any) -> None:
    with pytest.raises(RunFailed, match=r"is an adapter, and merge wants its base there\. Name the base"):
        merge((adapter("first"), 1.0), base=adapter("first"))


def test_a_head_that_was_trained_beside_a_tied_embedding_is_its_own_after_the_merge(
    make_attempt: MakeAttempt, run_here: RunHere, merge: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    changes = {"model": {"source": f"file://{base}"}, "adapter": {"lora": {"modules_to_save": ["lm_head"]}}}
    adapter = run_here(make_attempt(changes)).directory.scratch / "outputs" / "adapter"
    attempt = merge((adapter, 1.0), base=base)
    model = AutoModelForCausalLM.from_pretrained(attempt.directory.scratch / "outputs" / "merged")
    trained = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(model.get_output_embeddings().weight, trained)
    assert torch.equal(model.get_input_embeddings().weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)


def test_a_merge_is_an_attempt_like_any_other(make_attempt: MakeAttempt, adapter: Any) -> None:
    """Through the supervisor: fetched, merged in a worker without network, stored under its manifest, recorded."""
    from hone_trainer.supervisor import supervise

    parts = [{"source": f"file://{adapter('first')}"}]
    changes = {
        "dataset": None,
        "adapter": None,
        "training": None,
        "method": {"sft": None, "merge": {"adapters": parts}},
    }
    attempt = make_attempt(changes)
    assert supervise(attempt.directory.path) == TrainerExit.SUCCEEDED
    result = attempt.result()
    assert list(result["outputs"]) == ["merged"]
    assert result["metrics"]["merge"]["kl_nats"] < 1e-9
    assert (attempt.store / "merged" / "MANIFEST.json").exists()
