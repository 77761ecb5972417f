"""Encoders, which reward models are made of: DistilBERT, BERT, ModernBERT.

As published they have a head for masked words, and as classifiers one of scores. Sources: the modeling_*.py of each
family in transformers 5.
"""

from dataclasses import replace

from hone.modelinfo.block import Block, embedding
from hone.modelinfo.classic import plain_layer, plain_shape, plain_sizes
from hone.modelinfo.config import Config
from hone.modelinfo.shape import Layer, Linear, ModelShape, Module, Role

ENCODERS = frozenset({"bert", "distilbert", "modernbert"})


def distilbert(config: Config) -> ModelShape:
    hidden, heads, vocab = config.number("dim"), config.number("n_heads"), config.number("vocab_size")
    inner, positions = config.number("hidden_dim"), config.number("max_position_embeddings")
    tied = config.flag("tie_word_embeddings", True)
    block = Block(prefix="distilbert.transformer.layer.{}", layers=range(config.number("n_layers")))
    words = (
        _linear("vocab_transform", hidden, hidden),
        _layer_norm("vocab_layer_norm", hidden),
        _linear("vocab_projector", hidden, vocab, is_head=True, tied=tied),
    )
    modules = (
        embedding("distilbert.embeddings.word_embeddings", vocab, hidden),
        embedding("distilbert.embeddings.position_embeddings", positions, hidden),
        _layer_norm("distilbert.embeddings.LayerNorm", hidden),
        *(block.linear(f"attention.{n}_lin", "attention", hidden, hidden, bias=True) for n in ("q", "k", "v", "out")),
        block.layer_norm("sa_layer_norm", hidden),
        block.linear("ffn.lin1", "mlp", hidden, inner, bias=True),
        block.linear("ffn.lin2", "mlp", inner, hidden, bias=True),
        block.layer_norm("output_layer_norm", hidden),
        *(words if config.num_labels is None else score_heads("distilbert", hidden, config.num_labels)),
    )
    shape = plain_shape(config, block, modules, hidden=hidden, heads=heads, inner=inner, positions=positions, tied=tied)
    return replace(shape, layer=replace(plain_layer(config, "gelu", "activation"), norms_after=True))


def bert(config: Config) -> ModelShape:
    hidden, heads, vocab = plain_sizes(config)
    inner, positions = config.number("intermediate_size"), config.number("max_position_embeddings")
    tied = config.flag("tie_word_embeddings", True)
    block = Block(prefix="bert.encoder.layer.{}", layers=range(config.number("num_hidden_layers")))
    words = (
        _linear("cls.predictions.transform.dense", hidden, hidden),
        _layer_norm("cls.predictions.transform.LayerNorm", hidden),
        # A bias of its own, which is the decoder's where the head is tied.
        Module(path="cls.predictions", role="mlp", weights=vocab * tied, biases=vocab * (not tied), tied=tied),
        _linear("cls.predictions.decoder", hidden, vocab, is_head=True, tied=tied),
    )
    attention = ("self.query", "self.key", "self.value", "output.dense")
    modules = (
        embedding("bert.embeddings.word_embeddings", vocab, hidden),
        embedding("bert.embeddings.position_embeddings", positions, hidden),
        embedding("bert.embeddings.token_type_embeddings", config.number("type_vocab_size", 2), hidden),
        _layer_norm("bert.embeddings.LayerNorm", hidden),
        *(block.linear(f"attention.{name}", "attention", hidden, hidden, bias=True) for name in attention),
        block.layer_norm("attention.output.LayerNorm", hidden),
        block.linear("intermediate.dense", "mlp", hidden, inner, bias=True),
        block.linear("output.dense", "mlp", inner, hidden, bias=True),
        block.layer_norm("output.LayerNorm", hidden),
        *(words if config.num_labels is None else score_heads("bert", hidden, config.num_labels)),
    )
    shape = plain_shape(config, block, modules, hidden=hidden, heads=heads, inner=inner, positions=positions, tied=tied)
    return replace(shape, layer=replace(plain_layer(config, "gelu", "hidden_act"), norms_after=True))


def modernbert(config: Config) -> ModelShape:
    """Its first layer has no norm before the attention; `head` lies between the layers and either head."""
    hidden, heads, vocab = plain_sizes(config)
    inner, positions = config.number("intermediate_size"), config.number("max_position_embeddings", 8192)
    tied, biased = config.flag("tie_word_embeddings", True), config.flag("norm_bias", False)
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    block = Block(prefix="model.layers.{}", layers=range(config.number("num_hidden_layers")))
    norm = block.layer_norm if biased else block.rms_norm
    words = _linear("decoder", hidden, vocab, is_head=True, tied=tied, bias=config.flag("decoder_bias", True))
    modules = (
        embedding("model.embeddings.tok_embeddings", vocab, hidden),
        _layer_norm("model.embeddings.norm", hidden, bias=biased),
        replace(norm("attn_norm", hidden), layers=range(1, len(block.layers))),
        block.linear("attn.Wqkv", "attention", hidden, 3 * hidden, bias=bias),
        block.linear("attn.Wo", "attention", hidden, hidden, bias=bias),
        norm("mlp_norm", hidden),
        block.linear("mlp.Wi", "mlp", hidden, 2 * inner, bias=mlp_bias),
        block.linear("mlp.Wo", "mlp", inner, hidden, bias=mlp_bias),
        _layer_norm("model.final_norm", hidden, bias=biased),
        _linear("head.dense", hidden, hidden, bias=config.flag("classifier_bias", False)),
        _layer_norm("head.norm", hidden, bias=biased),
        *((words,) if config.num_labels is None else score_heads("modernbert", hidden, config.num_labels)),
    )
    shape = plain_shape(config, block, modules, hidden=hidden, heads=heads, inner=inner, positions=positions, tied=tied)
    return replace(shape, layer=Layer(norm="layer", fused_qkv=True, alternates=True))


def score_heads(family: str, width: int, labels: int) -> tuple[Linear, ...]:
    """What stands in the place of the head for words, and starts from nothing."""
    classifier = _linear("classifier", width, labels, is_head=True)
    before = {"distilbert": "pre_classifier", "bert": "bert.pooler.dense"}.get(family)
    return (_linear(before, width, width, is_head=True), classifier) if before else (classifier,)


def _linear(
    path: str, size_in: int, size_out: int, *, is_head: bool = False, tied: bool = False, bias: bool = True
) -> Linear:
    role: Role = "head" if is_head else "mlp"
    return Linear(path=path, role=role, in_features=size_in, out_features=size_out, bias=bias, tied=tied)


def _layer_norm(path: str, size: int, *, bias: bool = True) -> Module:
    return Module(path=path, role="norm", weights=size, biases=size if bias else 0)
