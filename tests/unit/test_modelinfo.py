import ast
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import hone.modelinfo
from hone.errors import UserError
from hone.modelinfo import (
    FAMILIES,
    BadConfig,
    BadPattern,
    Role,
    UnknownFamily,
    UnknownModel,
    UnknownModule,
    bias_parameters,
    default_hub_cache,
    dora_parameters,
    load_shape,
    lora_parameters,
    read_adapter_directory,
    read_config,
    saved_module_parameters,
    select,
    shipped_configs,
    token_row_parameters,
    with_scores,
)

MISTRAL = "hf://mistralai/Mistral-7B-v0.3"
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}

# What the model cards and the Hub's safetensors headers say; a head that is stored twice but tied is counted once.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-1.3b": 1_315_758_080,
    "distilbert/distilbert-base-uncased": 66_985_530,
    "google-bert/bert-base-uncased": 109_514_298,
    "tiiuae/falcon-7b": 6_921_720_704,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "google/gemma-3-1b-pt": 999_885_952,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
}


@pytest.fixture(autouse=True)
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine happens to have in its cache decides no test."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return cache


def test_a_model_that_reads_pictures_too_is_refused_by_name() -> None:
    with pytest.raises(UnknownFamily, match="family 'gemma3', which reads pictures too"):
        read_config({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})


def test_the_experts_of_qwen3_are_read_under_the_name_that_transformers_5_writes() -> None:
    published = dict(shipped_configs()["Qwen/Qwen3-30B-A3B"])
    written = {**published, "num_local_experts": published["num_experts"]}
    del written["num_experts"]
    assert read_config(written).parameters == read_config(published).parameters


def write_config(directory: Path, **values: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**TINY, **values}))
    return directory


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert load_shape(f"hf://{name}").parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [
        (["all-linear"], 41_943_040),
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 41_943_040),
        (["attention"], 13_631_488),
        (["q_proj", "k_proj", "v_proj", "o_proj"], 13_631_488),
        ([r"re:.*\.(q|k|v|o)_proj"], 13_631_488),
        (["attention", "q_proj"], 13_631_488),
    ],
)
def test_lora_trains_exactly_what_peft_counts_on_mistral_7b(targets: list[str], trainable: int) -> None:
    shape = load_shape(MISTRAL)
    assert lora_parameters(select(shape.linear_layers, targets), rank=16) == trainable


def test_dora_adds_one_magnitude_for_each_output_on_mistral_7b() -> None:
    layers = select(load_shape(MISTRAL).linear_layers, ["all-linear"])
    assert lora_parameters(layers, rank=16) + dora_parameters(layers) == 43_319_296


def test_the_share_that_lora_trains_of_mistral_7b_is_the_one_that_peft_prints() -> None:
    shape = load_shape(MISTRAL)
    trained = lora_parameters(select(shape.linear_layers, ["all-linear"]), rank=16)
    assert shape.parameters + trained == 7_289_966_592
    assert f"{trained / (shape.parameters + trained):.4%}" == "0.5754%"


def test_the_parts_of_a_model_sum_to_the_whole_in_every_family() -> None:
    for name in shipped_configs():
        shape = load_shape(f"hf://{name}")
        parts: tuple[Role, ...] = ("attention", "mlp", "experts", "router", "norm", "embedding", "head")
        assert sum(shape.parameters_of(part) for part in parts) == shape.parameters, name


def test_every_family_has_a_shipped_model() -> None:
    assert {values["model_type"] for values in shipped_configs().values()} == set(FAMILIES)


def test_shipped_names_are_distinct_without_regard_to_case() -> None:
    path = Path(hone.modelinfo.__file__).with_name("shapes.yaml")
    root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    names = [key.value.lower() for key, _ in root.value]
    assert len(names) == len(set(names)) == len(shipped_configs())


def test_all_linear_leaves_out_head_router_and_fused_experts() -> None:
    layers = select(load_shape("hf://mistralai/Mixtral-8x7B-v0.1").linear_layers, ["all-linear"])
    assert [layer.name for layer in layers] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_attention_means_the_family_s_own_projections() -> None:
    names = {
        family: [layer.name for layer in select(load_shape(f"hf://{name}").linear_layers, ["attention"])]
        for family, name in [("phi3", "microsoft/phi-4"), ("gpt2", "gpt2"), ("gpt_neox", "EleutherAI/pythia-1b")]
    }
    assert names == {
        "phi3": ["qkv_proj", "o_proj"],
        "gpt2": ["c_attn", "c_proj"],
        "gpt_neox": ["query_key_value", "dense"],
    }


def test_a_target_can_name_single_layers() -> None:
    layers = read_config(TINY).linear_layers
    chosen = select(layers, ["layers.1.self_attn.q_proj", r"re:model\.layers\.0\.mlp\..*"])
    assert [path for layer in chosen for path in layer.paths()] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]


def test_modules_to_save_are_not_adapted_too() -> None:
    shape = read_config(TINY)
    layers = select(shape.linear_layers, ["all-linear"], exclude=["mlp", "layers.0.self_attn"])
    assert {path for layer in layers for path in layer.paths()} == {
        f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"
    }


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_porj", "target module 'q_porj' matches no linear layer of this model. Did you mean q_proj? It has q_proj,"),
        ("proj", "'proj' matches no linear layer"),
        ("embed_tokens", "Other modules are trained in full by modules_to_save."),
        ("layers.2.self_attn.q_proj", "'layers.2.self_attn.q_proj' matches no linear layer"),
        ("re:q_proj", "'re:q_proj' matches no linear layer"),
        ("ALL-LINEAR", "'ALL-LINEAR' matches no linear layer"),
    ],
)
def test_a_target_that_matches_nothing_is_named_with_what_exists(target: str, message: str) -> None:
    with pytest.raises(UnknownModule) as error:
        select(read_config(TINY).linear_layers, ["v_proj", target])
    assert message in str(error.value)
    assert "down_proj" in str(error.value)


@pytest.mark.parametrize("pattern", ["(", "[", "*a", r".*(?P<x>q)(?P<x>r)"])
def test_a_broken_expression_is_refused(pattern: str) -> None:
    with pytest.raises(BadPattern, match="is no regular expression"):
        select(read_config(TINY).linear_layers, [f"re:{pattern}"])


@pytest.mark.parametrize(
    "pattern",
    [
        "(.+)+x",
        "((.+))+x",
        "(.*|a)*x",
        "(.{1,30}){1,30}x",
        ".*.*.*.*.*x",
        "(?:a|.+?)*x",
        "a" * 2000,
        r"(\(.+)+x",
        "[]+]*(.+)+",
        ".?" * 28 + "#",
        "(?:.|a)" * 28 + "#",
        "(?i)(?:a|A)" * 1 + "(?:b|B.)" * 28,
        "(?:a|(?:b|(?:.|m)+))+#",
    ],
)
def test_an_expression_that_could_run_for_hours_is_refused(pattern: str) -> None:
    with pytest.raises(BadPattern, match="could take hours"):
        select(read_config(TINY).linear_layers, [f"re:{pattern}"])


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(0|1)\..*(q|v)_proj",
        r"model\.layers\.([0-9]+)\.self_attn\.(q|k)_proj",
        r"(.*)\.(up_proj|gate_proj)",
        r".*[*+({]?_proj",
        r".*(?<!lm_head)",
        r".*layers.*self_attn.*(q|v)_proj.*",
        rf".*\.layers\.({'|'.join(str(n) for n in range(80))})\..*(q|k|v|o|gate|up|down)_proj",
        r"(model)\.layers\.\d{1,2}\.(?P<part>mlp|self_attn)\.(gate|up|down|[qkvo])_proj",
    ],
)
def test_the_expressions_that_people_write_are_taken(pattern: str) -> None:
    assert select(read_config(TINY).linear_layers, [f"re:{pattern}"])


@pytest.mark.parametrize("pattern", [".*.*.*.*#", "(.*)(.*)(.*)(.*)#", "(.+?)(.+)(.+)(.+)[#%]", ".?" * 13 + ".*#"])
def test_the_slowest_expressions_that_are_taken_end_soon(pattern: str) -> None:
    layers = load_shape(MISTRAL).linear_layers[:1]
    began = time.process_time()
    with pytest.raises(UnknownModule):
        select(layers, [f"re:{pattern}"])
    assert time.process_time() - began < 5


def test_a_saved_tied_head_counts_in_full() -> None:
    shape = load_shape("hf://meta-llama/Llama-3.2-1B")
    assert shape.tied_embeddings
    assert shape.parameters_of("head") == 0
    assert saved_module_parameters(shape, ["lm_head"]) == 128_256 * 2048
    assert saved_module_parameters(shape, ["lm_head", "embed_tokens"]) == 2 * 128_256 * 2048


def test_new_tokens_train_a_row_of_the_embedding_and_one_of_a_head_of_its_own() -> None:
    tied, own = load_shape("hf://meta-llama/Llama-3.2-1B"), load_shape("hf://mistralai/Mistral-7B-v0.3")
    assert token_row_parameters(tied, 3, with_head=True) == 3 * 2048
    assert token_row_parameters(own, 3, with_head=True) == 3 * 2 * 4096
    assert token_row_parameters(own, 3, with_head=False) == 3 * 4096


def test_a_saved_module_that_is_not_there_is_named() -> None:
    with pytest.raises(UnknownModule, match=r"'lm_haed'.*Did you mean lm_head\?"):
        saved_module_parameters(read_config(TINY), ["lm_haed"])


def test_biases_are_those_of_the_mode() -> None:
    shape = read_config({**TINY, "model_type": "qwen2"})
    layers = select(shape.linear_layers, ["q_proj", "o_proj"])
    counts = [bias_parameters(shape, layers, mode=mode) for mode in ("none", "all", "lora_only")]
    assert counts == [0, 2 * (64 + 32 + 32), 2 * 64]


def test_a_classifier_has_its_own_head() -> None:
    language, reward = load_shape(MISTRAL), load_shape(MISTRAL, num_labels=1)
    assert reward.parameters == language.parameters - 32_768 * 4096 + 4096
    assert reward.linear_layers[-1].path == "score"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_reward_models_shape_is_the_one_that_its_config_gives_with_one_label(name: str) -> None:
    found, wanted = with_scores(load_shape(f"hf://{name}")), load_shape(f"hf://{name}", num_labels=1)
    assert found.parameters == wanted.parameters
    assert {layer.path for layer in found.linear_layers} == {layer.path for layer in wanted.linear_layers}


def test_all_linear_of_an_encoder_leaves_its_classifier_out() -> None:
    shape = with_scores(load_shape("hf://distilbert/distilbert-base-uncased"))
    names = [layer.name for layer in select(shape.linear_layers, ["all-linear"])]
    assert names == ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]


def test_quantized_are_the_linear_layers_without_head_embedding_and_experts() -> None:
    assert load_shape(MISTRAL).quantizable_weights == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    mixtral = load_shape("hf://mistralai/Mixtral-8x7B-v0.1")
    assert mixtral.quantizable_weights == mixtral.parameters_of("attention")


@pytest.mark.parametrize(
    "source",
    [
        MISTRAL,
        "hf://MISTRALAI/mistral-7b-V0.3",
        f"{MISTRAL}@caa1feb0e54d415e2df31207e5f4e273e33509b1",
        f"{MISTRAL}@main",
    ],
)
def test_a_hub_name_is_found_in_any_case_and_revision_and_keeps_its_spelling(source: str) -> None:
    shape = load_shape(source)
    assert shape.parameters == 7_248_023_552
    assert shape.source == source
    assert shape.weight_bytes_on_disk is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://mistralai/Mistral-7B-v0.9", "Did you mean hf://mistralai/Mistral-7B-v0.3?"),
        ("hf://unsloth/Llama-3.2-1B", "Did you mean hf://meta-llama/Llama-3.2-1B?"),
        ("hf://nobody/nothing", "Download it (hf download nobody/nothing)"),
        ("hf://../../etc", "is not known here"),
        ("s3://bucket/model", "Shapes are read from hf:// and file:// sources."),
        ("job://sft", "cannot be read from here"),
        ("gpt2", "cannot be read from here"),
    ],
)
def test_an_unknown_model_is_answered_with_what_to_do(source: str, message: str) -> None:
    with pytest.raises(UnknownModel) as error:
        load_shape(source)
    assert message in str(error.value)
    assert source in str(error.value)
    assert isinstance(error.value, UserError)


def test_a_local_directory_gives_shape_and_bytes_on_disk(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "model")
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    (directory / "model-00002-of-00002.safetensors").write_bytes(b"x" * 50)
    (directory / "consolidated.safetensors").write_bytes(b"x" * 150)  # Mistral's own copy of the same weights
    shape = load_shape(f"file://{directory}")
    assert (shape.hidden_size, shape.num_key_value_heads, shape.head_dim) == (64, 2, 16)
    assert shape.weight_bytes_on_disk == 150
    assert shape.source == f"file://{directory}"


def test_a_changed_config_is_read_again(tmp_path: Path) -> None:
    source = f"file://{write_config(tmp_path)}"
    before = load_shape(source).parameters
    write_config(tmp_path, vocab_size=100_256)
    assert load_shape(source).parameters == before + 2 * 100_000 * 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[1]", "holds a list"),
        ("[" * 100_000, "is not JSON"),
        ("\xff", "is not JSON"),
        (" " * (4 * 2**20 + 1), "bytes; a config.json has a few thousand"),
        ("{}", "lacks 'model_type'"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BadConfig) as error:
        load_shape(f"file://{tmp_path}")
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_directory_without_config_is_told_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="save_pretrained"):
        load_shape(f"file://{tmp_path}")


def write_adapter(directory: Path, config: Mapping[str, Any] = {}, identity: Mapping[str, Any] = {}) -> str:
    directory.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    if identity:
        (directory / "hone_base.json").write_text(json.dumps(identity))
    return f"file://{directory}"


@pytest.mark.parametrize(
    ("config", "identity"),
    [
        ({"base_model_name_or_path": "mistralai/Mistral-7B-v0.3"}, {}),
        ({"base_model_name_or_path": "some-name"}, {"source": MISTRAL, "revision": "abc"}),
    ],
)
def test_the_shape_of_an_adapter_is_that_of_its_base(
    tmp_path: Path, config: dict[str, Any], identity: dict[str, Any]
) -> None:
    assert load_shape(write_adapter(tmp_path / "a", config, identity)).parameters == load_shape(MISTRAL).parameters


def test_an_adapter_of_an_adapter_is_refused(tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a", {"base_model_name_or_path": "org/name"})
    with pytest.raises(UnknownModel, match="is an adapter itself"):
        load_shape(write_adapter(tmp_path / "b", identity={"source": first}))


def test_a_saved_adapter_tells_its_base_at_its_revision(tmp_path: Path) -> None:
    write_adapter(tmp_path, identity={"source": "hf://org/name@main", "revision": "abc"})
    adapter = read_adapter_directory(tmp_path, "file:///x")
    assert adapter is not None
    assert adapter.base == "hf://org/name@abc"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of the kind 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "started by pissa_niter_4, which changes the base"),
        ({"base_model_name_or_path": "base"}, "does not say where the adapter's base is"),
    ],
)
def test_an_adapter_whose_base_cannot_be_known_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_adapter(tmp_path, config)
    with pytest.raises(BadConfig, match=re.escape(message)):
        adapter = read_adapter_directory(tmp_path, "file:///x")
        assert adapter is not None
        assert adapter.base


def test_a_directory_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no such directory on the machine that plans"):
        load_shape(f"file://{tmp_path}/none")


def test_a_cached_snapshot_of_the_asked_revision_wins_over_the_table(no_hub_cache: Path) -> None:
    repository = no_hub_cache / "models--mistralai--Mistral-7B-v0.3"
    write_config(repository / "snapshots" / "abc123", vocab_size=512)
    for ref in ("main", "refs/pr/1"):
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text("abc123")
    for revision in ("", "@main", "@abc123", "@refs/pr/1"):
        assert load_shape(f"{MISTRAL}{revision}").vocab_size == 512, revision
    assert load_shape(f"{MISTRAL}@other").vocab_size == 32_768


def test_a_cached_model_that_is_not_in_the_table_is_known(no_hub_cache: Path) -> None:
    repository = no_hub_cache / "models--me--mine"
    write_config(repository / "snapshots" / "abc123")
    assert load_shape("hf://me/mine@abc123").hidden_size == 64


@pytest.mark.parametrize("source", ["hf://me/mine@../../outside", "hf://me/mine@..", "hf://me/../mine", "hf://a/b/c"])
def test_no_name_or_revision_leads_out_of_the_cache(no_hub_cache: Path, source: str) -> None:
    for place in ("models--me--mine/snapshots/x", "models--me--mine/outside", "outside", "models--me--mine"):
        write_config(no_hub_cache / place)
    with pytest.raises(UnknownModel):
        load_shape(source)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_keeps_it(
    environment: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_hub_cache() == Path(place)


def test_an_unknown_family_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownFamily) as error:
        read_config({**TINY, "model_type": "lama"}, source="file:///models/x")
    assert "'lama' of file:///models/x" in str(error.value)
    assert "Close: llama." in str(error.value)
    assert all(family in str(error.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", -1),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", 10**400),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", None),
        ("vocab_size", []),
        ("attention_bias", 1),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_a_missing_or_impossible_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(BadConfig, match=key):
        read_config({**TINY, key: value})


def test_a_head_count_above_the_width_is_no_division_of_nothing() -> None:
    with pytest.raises(BadConfig, match="head_dim"):
        read_config({**TINY, "num_attention_heads": 128})


def test_modelinfo_imports_only_errors_yaml_and_the_standard_library() -> None:
    imported = set()
    for path in Path(hone.modelinfo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
    ours = {name for name in imported if name.startswith("hone") and not name.startswith("hone.modelinfo")}
    assert ours == {"hone.errors"}
    assert not {name.partition(".")[0] for name in imported} & {"torch", "transformers", "peft", "huggingface_hub"}
