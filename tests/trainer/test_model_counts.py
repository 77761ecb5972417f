"""Shapes against transformers and PEFT themselves, on the meta device: nothing is allocated."""

from collections.abc import Mapping
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from hone.modelinfo import (  # noqa: E402
    ENCODERS,
    ModelShape,
    UnknownModule,
    bias_parameters,
    dora_parameters,
    lora_parameters,
    read_config,
    saved_module_parameters,
    select,
    shipped_configs,
)
from hone.plan import EAGER_ONLY  # noqa: E402

# peft 0.21 still reads the property that transformers 5.23 renamed; nothing of ours touches it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DISTINCT = {tuple(sorted(values.items())): name for name, values in reversed(list(shipped_configs().items()))}
ONE_PER_FAMILY = {str(shipped_configs()[name]["model_type"]): name for name in DISTINCT.values()}
BIAS_MODES: tuple[Literal["all", "lora_only"], ...] = ("all", "lora_only")
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 80, "vocab_size": 96, "max_position_embeddings": 64}
SMALL_OPT = {"model_type": "opt", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 80}
SMALL_OPT |= {"vocab_size": 96, "max_position_embeddings": 64}
SMALL_GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
SMALL_FALCON = {"model_type": "falcon", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_FALCON |= {"vocab_size": 96, "max_position_embeddings": 64}
MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VARIANTS: list[dict[str, Any]] = [
    *({**SMALL, "model_type": family} for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")),
    {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 20},
    {**SMALL, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    {**SMALL, "model_type": "llama", "head_dim": 20, "tie_word_embeddings": True},
    {**SMALL, "model_type": "llama", "num_key_value_heads": None, "head_dim": None},
    {**SMALL, "model_type": "mistral", "head_dim": 20},
    {**SMALL, "model_type": "qwen2", "tie_word_embeddings": True},
    {**SMALL, "model_type": "qwen3", "attention_bias": True, "head_dim": 16},
    {**SMALL, "model_type": "gemma", "attention_bias": True},
    {**SMALL, "model_type": "gemma2", "tie_word_embeddings": False, "head_dim": 16},
    {**SMALL, "model_type": "phi3", "tie_word_embeddings": True},
    {**SMALL, "model_type": "gpt_neox"},
    {**SMALL, "model_type": "gpt_neox", "attention_bias": False, "tie_word_embeddings": True},
    SMALL_GPT2,
    {**SMALL_GPT2, "n_inner": 100, "tie_word_embeddings": False},
    SMALL_OPT,
    {**SMALL_OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    {**SMALL_OPT, "enable_bias": False, "_remove_final_layer_norm": True, "tie_word_embeddings": False},
    *({**SMALL, "model_type": family} for family in ("olmo2", "smollm3", "gemma3_text", "starcoder2")),
    {**SMALL, "model_type": "olmo2", "attention_bias": True, "tie_word_embeddings": True},
    {**SMALL, "model_type": "gemma3_text", "head_dim": 16, "tie_word_embeddings": False},
    {**SMALL, "model_type": "starcoder2", "use_bias": False, "tie_word_embeddings": False},
    {**SMALL, **MANY, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 40},
    {**SMALL, **MANY, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 30, "qkv_bias": False},
    {**SMALL, **MANY, "model_type": "qwen3_moe", "head_dim": 20},
    {**SMALL, **MANY, "model_type": "qwen3_moe", "attention_bias": True, "tie_word_embeddings": True},
    SMALL_FALCON,
    {**SMALL_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    {**SMALL_FALCON, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    {**SMALL_FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True, "ffn_hidden_size": 100},
    *({**SMALL, "model_type": family} for family in ("bert", "modernbert")),
    {**SMALL, "model_type": "bert", "type_vocab_size": 1, "tie_word_embeddings": False},
    {**SMALL, "model_type": "modernbert", "norm_bias": True, "attention_bias": True, "mlp_bias": True},
    {**SMALL, "model_type": "modernbert", "classifier_bias": True, "decoder_bias": False, "tie_word_embeddings": False},
    {"model_type": "distilbert", "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80, "vocab_size": 96},
]
for variant in VARIANTS:
    variant.setdefault("max_position_embeddings", 64)
    variant["pad_token_id"] = 0
    variant["bos_token_id"] = variant["eos_token_id"] = 1


def identity(config: Mapping[str, Any]) -> str:
    special = {key: value for key, value in config.items() if key not in SMALL and not key.endswith("token_id")}
    return "-".join(f"{key}={value}" for key, value in special.items() if key != "model_type") or "plain"


every_variant = pytest.mark.parametrize("config", VARIANTS, ids=[f"{v['model_type']}-{identity(v)}" for v in VARIANTS])


def build(values: Mapping[str, Any], *, num_labels: int | None = None) -> Any:
    """The model that transformers builds, without memory for its weights."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    kind = {key: value for key, value in values.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(values["model_type"], **{**ids, **kind})
    auto = transformers.AutoModelForMaskedLM if values["model_type"] in ENCODERS else transformers.AutoModelForCausalLM
    if num_labels is not None:
        config.num_labels = num_labels
        auto = transformers.AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(config)


def trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapted(model: Any, **options: Any) -> Any:
    transposed = model.config.model_type == "gpt2"  # Conv1D
    with torch.device("meta"):
        return peft.get_peft_model(model, peft.LoraConfig(r=16, fan_in_fan_out=transposed, **options))


def every_linear_for_peft(shape: ModelShape) -> list[str] | str:
    """PEFT's own `all-linear`; with experts the paths, as its word then means router and experts too."""
    layers = select(shape.linear_layers, ["all-linear"])
    return [path for layer in layers for path in layer.paths()] if shape.num_experts else "all-linear"


@pytest.mark.parametrize("name", DISTINCT.values())
def test_every_shipped_shape_has_the_parameters_that_transformers_counts(name: str) -> None:
    values = shipped_configs()[name]
    assert read_config(values).parameters == build(values).num_parameters()


@pytest.mark.parametrize("name", ONE_PER_FAMILY.values())
def test_lora_trains_what_peft_counts_in_every_family(name: str) -> None:
    values = shipped_configs()[name]
    shape = read_config(values)
    layers = select(shape.linear_layers, ["all-linear"])
    model = adapted(build(values), target_modules=every_linear_for_peft(shape))
    assert lora_parameters(layers, rank=16) == trainable(model)


@every_variant
def test_every_variant_of_a_family_is_exact(config: dict[str, Any]) -> None:
    assert read_config(config).parameters == build(config).num_parameters()


@every_variant
def test_the_families_without_sdpa_are_known(config: dict[str, Any]) -> None:
    assert build(config)._supports_sdpa is (config["model_type"] not in EAGER_ONLY)


@every_variant
def test_modules_and_their_sizes_are_those_of_transformers(config: dict[str, Any]) -> None:
    ours = {path: module.weights + module.biases for module in read_config(config).modules for path in module.paths()}
    theirs = {}
    for name, module in build(config).named_modules():
        if own := [parameter.numel() for parameter in module.parameters(recurse=False)]:
            theirs[name] = sum(own)
    assert ours == theirs


@every_variant
def test_lora_dora_and_biases_are_exact_for_every_variant(config: dict[str, Any]) -> None:
    shape = read_config(config)
    layers = select(shape.linear_layers, ["all-linear"])
    targets = every_linear_for_peft(shape)
    ours = lora_parameters(layers, rank=16) + dora_parameters(layers)
    assert ours == trainable(adapted(build(config), target_modules=targets, use_dora=True))
    for mode in BIAS_MODES:
        ours = lora_parameters(layers, rank=16) + bias_parameters(shape, layers, mode=mode)
        assert ours == trainable(adapted(build(config), target_modules=targets, bias=mode)), mode


@every_variant
def test_classification_heads_are_exact(config: dict[str, Any]) -> None:
    assert read_config(config, num_labels=3).parameters == build(config, num_labels=3).num_parameters()


@pytest.mark.parametrize(
    "names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"], ["mlp"], ["layers.1.mlp"]]
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # what PEFT says of saving a tied module
def test_modules_to_save_train_what_peft_counts(names: list[str], tied: bool) -> None:
    config = {**SMALL, "model_type": "qwen3", "tie_word_embeddings": tied}
    shape = read_config(config)
    layers = select(shape.linear_layers, ["all-linear"], exclude=names)
    ours = lora_parameters(layers, rank=16) + saved_module_parameters(shape, names)
    targets = [path for layer in layers for path in layer.paths()]
    assert ours == trainable(adapted(build(config), target_modules=targets, modules_to_save=names))


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["self_attn.q_proj"]),
        ("llama", ["layers.1.mlp.up_proj", "o_proj"]),
        ("llama", ["lm_head"]),
        ("llama", r"re:.*\.layers\.[02]\..*(q|down)_proj"),
        ("gpt2", ["c_proj"]),
        ("gpt_neox", ["dense"]),
    ],
)
def test_targets_match_as_in_peft(family: str, target: list[str] | str) -> None:
    config = SMALL_GPT2 if family == "gpt2" else {**SMALL, "model_type": family}
    layers = read_config(config).linear_layers
    targets = [target] if isinstance(target, str) else target
    for_peft = target.removeprefix("re:") if isinstance(target, str) else target
    theirs = trainable(adapted(build(config), target_modules=for_peft))
    assert lora_parameters(select(layers, targets), rank=16) == theirs


def test_a_name_that_is_only_the_end_of_a_word_matches_nothing_here_and_in_peft() -> None:
    config = {**SMALL, "model_type": "llama"}
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted(build(config), target_modules=["proj"])
    with pytest.raises(UnknownModule, match="'proj' matches no linear layer"):
        select(read_config(config).linear_layers, ["proj"])
