"""Decoders with LayerNorm and a plain MLP: GPT-2, GPT-NeoX (Pythia), OPT, Falcon, StarCoder2.

Sources: the modeling_*.py of each family in transformers 5; their paths are the ones that PEFT matches.
"""

from dataclasses import replace
from typing import Literal

from hone.modelinfo.block import Block, decoder_head, embedding
from hone.modelinfo.config import Config
from hone.modelinfo.shape import BadConfig, Layer, Linear, ModelShape, Module


def gpt2(config: Config) -> ModelShape:
    """Its linear layers are Conv1D, which store the weight transposed; names and counts are the same."""
    if config.flag("add_cross_attention", False):
        raise BadConfig(f"config.json of {config.source} has add_cross_attention: true.", fix="Use a decoder alone.")
    hidden, heads, positions = config.number("n_embd"), config.number("n_head"), config.number("n_positions")
    vocab, inner = config.number("vocab_size"), config.number("n_inner", 4 * hidden)
    tied = config.flag("tie_word_embeddings", True)
    block = Block(prefix="transformer.h.{}", layers=range(config.number("n_layer")))
    modules = (
        embedding("transformer.wte", vocab, hidden),
        embedding("transformer.wpe", positions, hidden),
        block.layer_norm("ln_1", hidden),
        block.linear("attn.c_attn", "attention", hidden, 3 * hidden, bias=True),
        block.linear("attn.c_proj", "attention", hidden, hidden, bias=True),
        block.layer_norm("ln_2", hidden),
        block.linear("mlp.c_fc", "mlp", hidden, inner, bias=True),
        block.linear("mlp.c_proj", "mlp", inner, hidden, bias=True),
        Module(path="transformer.ln_f", role="norm", weights=hidden, biases=hidden),
        decoder_head(config, hidden_size=hidden, vocab_size=vocab, tied=tied),
    )
    shape = plain_shape(config, block, modules, hidden=hidden, heads=heads, inner=inner, positions=positions, tied=tied)
    return replace(
        shape,
        layer=plain_layer(config, "gelu_new", "activation_function", residual="resid_pdrop", attention="attn_pdrop"),
    )


def gpt_neox(config: Config) -> ModelShape:
    hidden, heads, vocab = plain_sizes(config)
    inner, positions = config.number("intermediate_size"), config.number("max_position_embeddings")
    bias, tied = config.flag("attention_bias", True), config.flag("tie_word_embeddings", False)
    block = Block(prefix="gpt_neox.layers.{}", layers=range(config.number("num_hidden_layers")))
    modules = (
        embedding("gpt_neox.embed_in", vocab, hidden),
        block.layer_norm("input_layernorm", hidden),
        block.layer_norm("post_attention_layernorm", hidden),
        block.linear("attention.query_key_value", "attention", hidden, 3 * hidden, bias=bias),
        block.linear("attention.dense", "attention", hidden, hidden, bias=bias),
        block.linear("mlp.dense_h_to_4h", "mlp", hidden, inner, bias=True),
        block.linear("mlp.dense_4h_to_h", "mlp", inner, hidden, bias=True),
        Module(path="gpt_neox.final_layer_norm", role="norm", weights=hidden, biases=hidden),
        decoder_head(config, hidden_size=hidden, vocab_size=vocab, tied=tied),
    )
    shape = plain_shape(config, block, modules, hidden=hidden, heads=heads, inner=inner, positions=positions, tied=tied)
    return replace(
        shape,
        layer=replace(
            plain_layer(config, "gelu", "hidden_act"),
            parallel=config.flag("use_parallel_residual", True),
            fused_qkv=True,
        ),
    )


def opt(config: Config) -> ModelShape:
    if not config.flag("layer_norm_elementwise_affine", True):
        raise BadConfig(
            f"config.json of {config.source} has layer_norm_elementwise_affine: false.", fix="Use another OPT model."
        )
    hidden, heads, vocab = plain_sizes(config)
    inner, positions = config.number("ffn_dim"), config.number("max_position_embeddings")
    width = config.number("word_embed_proj_dim", hidden)
    bias, tied = config.flag("enable_bias", True), config.flag("tie_word_embeddings", True)
    block = Block(prefix="model.decoder.layers.{}", layers=range(config.number("num_hidden_layers")))
    outer: list[Module] = []
    if width != hidden:  # OPT-350m: narrow embeddings, projected out of and into the width of the layers
        outer.append(Linear(path="model.decoder.project_out", role="mlp", in_features=hidden, out_features=width))
        outer.append(Linear(path="model.decoder.project_in", role="mlp", in_features=width, out_features=hidden))
    if config.flag("do_layer_norm_before", True) and not config.flag("_remove_final_layer_norm", False):
        outer.append(Module(path="model.decoder.final_layer_norm", role="norm", weights=hidden, biases=hidden))
    modules = (
        embedding("model.decoder.embed_tokens", vocab, width),
        embedding("model.decoder.embed_positions", positions + 2, hidden),  # two rows of offset, as in fairseq
        *outer,
        *(block.linear(f"self_attn.{n}_proj", "attention", hidden, hidden, bias=bias) for n in ("k", "v", "q", "out")),
        block.layer_norm("self_attn_layer_norm", hidden),
        block.linear("fc1", "mlp", hidden, inner, bias=bias),
        block.linear("fc2", "mlp", inner, hidden, bias=bias),
        block.layer_norm("final_layer_norm", hidden),
        decoder_head(config, hidden_size=width, vocab_size=vocab, tied=tied),
    )
    shape = plain_shape(config, block, modules, hidden=hidden, heads=heads, inner=inner, positions=positions, tied=tied)
    return replace(shape, layer=plain_layer(config, "relu", "activation_function", residual="dropout"))


def falcon(config: Config) -> ModelShape:
    hidden, heads, vocab = plain_sizes(config)
    head_dim, inner = hidden // heads, config.number("ffn_hidden_size", 4 * hidden)
    is_new, in_parallel = config.flag("new_decoder_architecture", False), config.flag("parallel_attn", True)
    kv_heads = heads
    if is_new:
        kv_heads = config.number("num_kv_heads", heads)
    elif config.flag("multi_query", True):
        kv_heads = 1
    norms = ["input_layernorm"] if in_parallel else ["input_layernorm", "post_attention_layernorm"]
    if in_parallel and config.number("num_ln_in_parallel_attn", 2 if is_new else 1) == 2:
        norms = ["ln_attn", "ln_mlp"]
    bias, tied = config.flag("bias", False), config.flag("tie_word_embeddings", True)
    block = Block(prefix="transformer.h.{}", layers=range(config.number("num_hidden_layers")))
    queries_and_more = (heads + 2 * kv_heads) * head_dim
    modules = (
        embedding("transformer.word_embeddings", vocab, hidden),
        block.linear("self_attention.query_key_value", "attention", hidden, queries_and_more, bias=bias),
        block.linear("self_attention.dense", "attention", hidden, hidden, bias=bias),
        block.linear("mlp.dense_h_to_4h", "mlp", hidden, inner, bias=bias),
        block.linear("mlp.dense_4h_to_h", "mlp", inner, hidden, bias=bias),
        *(block.layer_norm(name, hidden) for name in norms),
        Module(path="transformer.ln_f", role="norm", weights=hidden, biases=hidden),
        decoder_head(config, hidden_size=hidden, vocab_size=vocab, tied=tied),
    )
    positions = config.number("max_position_embeddings", 2048)
    shape = plain_shape(config, block, modules, hidden=hidden, heads=heads, inner=inner, positions=positions, tied=tied)
    return replace(
        shape,
        num_key_value_heads=kv_heads,
        layer=replace(
            plain_layer(config, "gelu", "activation"), parallel=in_parallel, norms_first=True, always_masked=True
        ),
    )


def starcoder2(config: Config) -> ModelShape:
    hidden, heads, vocab = plain_sizes(config)
    kv_heads = config.number("num_key_value_heads", heads)
    inner, positions = config.number("intermediate_size"), config.number("max_position_embeddings")
    bias, tied = config.flag("use_bias", True), config.flag("tie_word_embeddings", True)
    keys = kv_heads * (hidden // heads)
    block = Block(prefix="model.layers.{}", layers=range(config.number("num_hidden_layers")))
    modules = (
        embedding("model.embed_tokens", vocab, hidden),
        block.linear("self_attn.q_proj", "attention", hidden, hidden, bias=bias),
        *(block.linear(f"self_attn.{name}_proj", "attention", hidden, keys, bias=bias) for name in ("k", "v")),
        block.linear("self_attn.o_proj", "attention", hidden, hidden, bias=bias),
        block.linear("mlp.c_fc", "mlp", hidden, inner, bias=bias),
        block.linear("mlp.c_proj", "mlp", inner, hidden, bias=bias),
        block.layer_norm("input_layernorm", hidden),
        block.layer_norm("post_attention_layernorm", hidden),
        Module(path="model.norm", role="norm", weights=hidden, biases=hidden),
        decoder_head(config, hidden_size=hidden, vocab_size=vocab, tied=tied),
    )
    shape = plain_shape(config, block, modules, hidden=hidden, heads=heads, inner=inner, positions=positions, tied=tied)
    return replace(shape, num_key_value_heads=kv_heads, layer=plain_layer(config, "gelu_pytorch_tanh", "hidden_act"))


def plain_layer(config: Config, activation: str, key: str, *, residual: str = "", attention: str = "") -> Layer:
    """A plain layer: by its activation's name, and by the keys of its own dropouts, which default to 0.1."""
    asked = config.values.get(key) or activation
    kinds: dict[str, Literal["gelu_new", "relu"]] = {"gelu_new": "gelu_new", "gelu_fast": "gelu_new", "relu": "relu"}
    return Layer(
        norm="layer",
        mlp=kinds.get(asked, "gelu"),
        residual_dropout=bool(residual and config.values.get(residual, 0.1)),
        attention_dropout=bool(attention and config.values.get(attention, 0.1)),
    )


def plain_sizes(config: Config) -> tuple[int, int, int]:
    """Width, attention heads and vocabulary by the names that most families have for them."""
    return config.number("hidden_size"), config.number("num_attention_heads"), config.number("vocab_size")


def plain_shape(
    config: Config,
    block: Block,
    modules: tuple[Module, ...],
    *,
    hidden: int,
    heads: int,
    inner: int,
    positions: int,
    tied: bool,
) -> ModelShape:
    """The shape of a model without grouped keys and values."""
    return ModelShape(
        source=config.source,
        model_type=config.values["model_type"],
        hidden_size=hidden,
        num_layers=len(block.layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        vocab_size=config.number("vocab_size"),
        max_position_embeddings=positions,
        tied_embeddings=tied,
        modules=modules,
    )
