import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.job import Launch
from hone.run import TrainerExit
from hone.spec import Lora, Model
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import Source
from hone_trainer.lora import add_lora, target_modules
from hone_trainer.model import (
    check_model,
    count_parameters,
    load_model,
    load_tokenizer,
    train_in,
    weights_dtype,
)


def source(path: Path) -> Source:
    return Source(asked=f"file://{path}", path=str(path))


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """A model directory that a test may spoil."""
    import shutil

    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def only_pickles(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def an_adapter(path: Path) -> None:
    (path / "config.json").rename(path / "adapter_config.json")


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights": (only_pickles, r"pickled weights only \(pytorch_model\.bin\).*Convert them to safetensors"),
    "no weights": (no_weights, "has no weights"),
    "no config": (no_config, "has no config.json"),
    "an adapter": (an_adapter, "is an adapter, so it is not a model"),
    "remote code": (edit_config(auto_map={"AutoModel": "x.Y"}), "run code of its own.*is refused"),
    "unknown model type": (edit_config(model_type="mamma"), "has model_type 'mamma', which transformers does not know"),
    "no language model": (edit_config(model_type="vit"), "has model_type 'vit'"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_model_that_cannot_be_trained_is_refused_before_it_is_opened(copied: Path, name: str) -> None:
    spoil, expected = SPOILED[name]
    spoil(copied)
    with pytest.raises(RunFailed, match=expected) as caught:
        check_model(source(copied))
    assert caught.value.code == TrainerExit.USER


def test_weights_that_are_missing_are_named(copied: Path, tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed, match=r"lacks weights: model\.layers\.0\.mlp\.up_proj\.weight \(1 in all\)"):
        load_model(source(copied), Model(source="file:///x"), dtype=torch.float32, tokenizer=tokenizer)


def test_a_tokenizer_of_another_model_is_refused(copied: Path, tokenizer: Any) -> None:
    import copy

    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"word{number}" for number in range(20)])
    with pytest.raises(RunFailed, match=r"The tokenizer has 279 tokens and the model .* only 264"):
        load_model(source(copied), Model(source="file:///x"), dtype=torch.float32, tokenizer=larger)


def test_a_tokenizer_with_code_of_its_own_is_refused(copied: Path) -> None:
    file = copied / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(RunFailed, match="run code of its own"):
        load_tokenizer(source(copied), Model(source="file:///x"))


def test_an_end_of_turn_token_that_is_none_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RunFailed, match=r"model\.eos_token: '<end>' is not a token"):
        load_tokenizer(source(tiny_model), Model(source="file:///x", eos_token="<end>"))


def test_an_attention_kernel_that_is_not_here_is_refused(tiny_model: Path, tokenizer: Any) -> None:
    model = Model(source="file:///x", attention="flash_attention_2")
    with pytest.raises(RunFailed, match="cannot be loaded with flash_attention_2 attention") as caught:
        load_model(source(tiny_model), model, dtype=torch.float32, tokenizer=tokenizer)
    assert caught.value.code == TrainerExit.USER


def load(path: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    tokenizer = load_tokenizer(source(path), Model(source="file:///x"))
    return load_model(source(path), Model(source="file:///x"), dtype=dtype, tokenizer=tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_precision_that_was_set_whatever_the_files_have(tiny_model: Path, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in load(tiny_model, dtype=dtype).parameters()} == {dtype}


@pytest.mark.parametrize(
    ("precision", "adapted", "expected"),
    [("bf16", True, torch.bfloat16), ("bf16", False, torch.float32), ("fp32", True, torch.float32)],
)
def test_a_frozen_base_may_be_bf16_and_what_is_trained_is_fp32(
    precision: str, adapted: bool, expected: torch.dtype
) -> None:
    launch = Launch(
        launcher="direct", strategy="none", device="cuda", nodes=1, processes_per_node=1, gpus_per_node=1,
        precision=precision, micro_batch_size=1, gradient_accumulation_steps=1, activation_checkpointing=False,
    )  # fmt: skip
    assert weights_dtype(launch, adapted=adapted) == expected


def test_what_an_adapter_trains_on_a_bf16_base_is_fp32(tiny_model: Path) -> None:
    model = add_lora(load(tiny_model, dtype=torch.bfloat16), Lora(modules_to_save=("lm_head",)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    train_in(model, torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("all-linear",), ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (("attention",), ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (("q_proj", "mlp.up_proj"), ["q_proj", "mlp.up_proj"]),
        (("re:.*layers\\.0\\..*q_proj",), ".*layers\\.0\\..*q_proj"),
    ],
)
def test_targets_become_names(tiny_model: Path, targets: tuple[str, ...], expected: list[str] | str) -> None:
    assert target_modules(load(tiny_model), Lora(target_modules=targets)) == expected


@pytest.mark.parametrize("targets", [("query",), ("q_proj", "k_prj"), ("re:.*nothing",)])
def test_a_target_that_matches_nothing_is_named_beside_what_is_there(
    tiny_model: Path, targets: tuple[str, ...]
) -> None:
    with pytest.raises(
        RunFailed, match=r"matches no module of the model\. Its linear layers are down_proj, gate_proj"
    ) as e:
        add_lora(load(tiny_model), Lora(target_modules=targets))
    assert e.value.code == TrainerExit.USER


def test_an_expression_that_matches_the_head_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RunFailed, match=r"matches the head.*modules_to_save"):
        add_lora(load(tiny_model), Lora(target_modules=("re:.*(q_proj|lm_head)",)))


def test_a_module_that_cannot_be_adapted_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RunFailed, match="cannot be adapted"):
        add_lora(load(tiny_model), Lora(target_modules=("input_layernorm",)))


def test_a_module_to_save_that_is_not_there_is_named(tiny_model: Path) -> None:
    with pytest.raises(RunFailed, match=r"modules_to_save: 'head' matches no module.*lm_head"):
        add_lora(load(tiny_model), Lora(modules_to_save=("head",)))


def test_routers_are_not_adapted() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    assert "gate" not in target_modules(AutoModelForCausalLM.from_config(config), Lora())


def test_attention_alone_is_told_from_a_mlp_of_the_same_names() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    names = target_modules(AutoModelForCausalLM.from_config(config), Lora(target_modules=("attention",)))
    assert names == ["attn.c_proj", "c_attn"]


def test_every_option_of_lora_reaches_peft(tiny_model: Path) -> None:
    lora = Lora(rank=3, alpha=7.5, dropout=0.1, bias="lora_only", use_rslora=True, use_dora=True)
    [config] = add_lora(load(tiny_model), lora).peft_config.values()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 7.5, 0.1, "lora_only")
    assert (config.use_rslora, config.use_dora) == (True, True)


def test_parameters_are_counted(tiny_model: Path) -> None:
    # Per layer rank x (q 64+64, k 64+32, v 64+32, o 64+64, gate and up 64+128 each, down 128+64), two layers.
    trainable, total = count_parameters(add_lora(load(tiny_model), Lora(rank=4)))
    assert trainable == 4 * 2 * (128 + 96 + 96 + 128 + 3 * 192)
    assert total == trainable + sum(p.numel() for p in load(tiny_model).parameters())
