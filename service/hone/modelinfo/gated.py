"""Llama and its descendants: RMSNorm, rotary positions, grouped-query attention, a gated MLP.

Sources: the modeling_*.py of each family in transformers 5; their paths are the ones that PEFT matches.
"""

from dataclasses import dataclass, replace

from hone.modelinfo.block import Block, decoder_head, embedding
from hone.modelinfo.config import Config
from hone.modelinfo.shape import BadConfig, Layer, ModelShape, Module

TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
LLAMA = Layer()
GEMMA = Layer(scales_in_fp32=True)
AFTER = Layer(scales_in_fp32=True, norms_after=True)
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def llama(config: Config) -> ModelShape:
    bias = config.flag("attention_bias", False)
    return decoder(config, Variant(qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias", False)))


def mistral(config: Config) -> ModelShape:
    return decoder(config, Variant())


def mixtral(config: Config) -> ModelShape:
    experts = Experts(count=config.number("num_local_experts"), width=config.number("intermediate_size"))
    return decoder(config, Variant(experts=experts))


def qwen2(config: Config) -> ModelShape:
    return decoder(config, Variant(qkv_bias=True))


def qwen3(config: Config) -> ModelShape:
    bias = config.flag("attention_bias", False)
    return decoder(config, Variant(qkv_bias=bias, o_bias=bias, head_norms=True, default_head_dim=128))


def qwen2_moe(config: Config) -> ModelShape:
    shared = config.number("shared_expert_intermediate_size")
    return decoder(config, Variant(qkv_bias=config.flag("qkv_bias", True), experts=_qwen_experts(config, shared)))


def qwen3_moe(config: Config) -> ModelShape:
    bias = config.flag("attention_bias", False)
    return decoder(config, Variant(qkv_bias=bias, o_bias=bias, head_norms=True, experts=_qwen_experts(config, 0)))


def _qwen_experts(config: Config, shared: int) -> "Experts":
    if config.values.get("mlp_only_layers") or config.number("decoder_sparse_step", 1) != 1:
        raise BadConfig(
            f"config.json of {config.source} has layers without experts (mlp_only_layers, decoder_sparse_step).",
            fix="Use a model that has them in every layer, as the published ones.",
        )
    # transformers 5 writes the number of Qwen3's experts by the name that Mixtral has for it
    name = "num_local_experts" if "num_local_experts" in config.values else "num_experts"
    return Experts(count=config.number(name), width=config.number("moe_intermediate_size"), shared=shared)


def olmo2(config: Config) -> ModelShape:
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    bias = config.flag("attention_bias", False)
    return decoder(config, Variant(qkv_bias=bias, o_bias=bias, whole_norms=True, norms=norms, layer=AFTER))


def smollm3(config: Config) -> ModelShape:
    bias = config.flag("attention_bias", False)
    variant = Variant(qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias", False), tied_by_default=True)
    return decoder(config, variant)


def gemma(config: Config) -> ModelShape:
    bias = config.flag("attention_bias", False)
    variant = Variant(qkv_bias=bias, o_bias=bias, tied_by_default=True, default_head_dim=256, layer=GEMMA)
    return decoder(config, variant)


def gemma2(config: Config) -> ModelShape:
    bias = config.flag("attention_bias", False)
    layer = replace(GEMMA, softcap=config.values.get("attn_logit_softcapping", 50.0) is not None)
    variant = Variant(
        qkv_bias=bias, o_bias=bias, tied_by_default=True, default_head_dim=256, norms=FOUR_NORMS, layer=layer
    )
    return decoder(config, variant)


def gemma3_text(config: Config) -> ModelShape:
    """Gemma 3 without its eyes, as the 1B model; the larger ones are another family, with a picture encoder."""
    bias = config.flag("attention_bias", False)
    variant = Variant(
        qkv_bias=bias, o_bias=bias, head_norms=True, tied_by_default=True, default_head_dim=256, norms=FOUR_NORMS,
        layer=GEMMA,
    )  # fmt: skip
    return decoder(config, variant)


def phi3(config: Config) -> ModelShape:
    return decoder(config, Variant(fused=True, layer=Layer(fused_qkv=True)))


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture in the place of the MLP of every layer."""

    count: int
    width: int
    """Of one expert's MLP."""
    shared: int = 0
    """Width of the MLP that every token passes beside its experts; 0: there is none."""

    @property
    def shared_as_experts(self) -> int:
        """Experts that hold as many activations as the shared one."""
        return -(-self.shared // self.width)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """In what a family differs from Llama."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    """An RMSNorm over each head of the queries and of the keys."""
    whole_norms: bool = False
    """One over all heads of the queries, and one of the keys."""
    fused: bool = False
    """One qkv_proj and one gate_up_proj."""
    experts: Experts | None = None
    norms: tuple[str, ...] = TWO_NORMS
    tied_by_default: bool = False
    """What the family's class says where config.json does not say `tie_word_embeddings`."""
    layer: Layer = LLAMA
    default_head_dim: int | None = None
    """Its class's own head_dim; None is hidden_size / num_attention_heads."""


def decoder(config: Config, variant: Variant) -> ModelShape:
    """The shape without its modules first, then the modules that follow from it."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    experts = variant.experts
    shape = ModelShape(
        source=config.source,
        model_type=config.values["model_type"],
        hidden_size=hidden,
        num_layers=config.number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=config.number("num_key_value_heads", heads),
        head_dim=config.number("head_dim", variant.default_head_dim or hidden // heads),
        intermediate_size=experts.width if experts else config.number("intermediate_size"),
        vocab_size=config.number("vocab_size"),
        max_position_embeddings=config.number("max_position_embeddings"),
        tied_embeddings=config.flag("tie_word_embeddings", variant.tied_by_default),
        num_experts=experts.count if experts else 0,
        num_experts_per_token=config.number("num_experts_per_tok") + experts.shared_as_experts if experts else 0,
        modules=(),
        layer=variant.layer,
    )
    block = Block(prefix="model.layers.{}", layers=range(shape.num_layers))
    modules = (
        embedding("model.embed_tokens", shape.vocab_size, hidden),
        *_attention(shape, variant, block),
        *(_experts(shape, experts, block) if experts else _mlp(shape, variant, block)),
        *(block.rms_norm(name, hidden) for name in variant.norms),
        Module(path="model.norm", role="norm", weights=hidden),
        decoder_head(config, hidden_size=hidden, vocab_size=shape.vocab_size, tied=shape.tied_embeddings),
    )
    return replace(shape, modules=modules)


def _attention(shape: ModelShape, variant: Variant, block: Block) -> list[Module]:
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    sizes = {"qkv_proj": queries + 2 * keys} if variant.fused else {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    modules: list[Module] = [
        block.linear(f"self_attn.{name}", "attention", shape.hidden_size, size, bias=variant.qkv_bias)
        for name, size in sizes.items()
    ]
    modules.append(block.linear("self_attn.o_proj", "attention", queries, shape.hidden_size, bias=variant.o_bias))
    if variant.head_norms:
        modules += [block.rms_norm(f"self_attn.{name}", shape.head_dim) for name in ("q_norm", "k_norm")]
    if variant.whole_norms:
        modules += [block.rms_norm("self_attn.q_norm", queries), block.rms_norm("self_attn.k_norm", keys)]
    return modules


def _mlp(shape: ModelShape, variant: Variant, block: Block) -> list[Module]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    sizes = {"gate_up_proj": 2 * inner} if variant.fused else {"gate_proj": inner, "up_proj": inner}
    inputs = [block.linear(f"mlp.{name}", "mlp", hidden, size, bias=variant.mlp_bias) for name, size in sizes.items()]
    return [*inputs, block.linear("mlp.down_proj", "mlp", inner, hidden, bias=variant.mlp_bias)]


def _experts(shape: ModelShape, experts: Experts, block: Block) -> list[Module]:
    """Transformers 5 keeps all experts in two fused tensors and the router in a bare one: no linear layer for PEFT.

    The shared expert is an MLP of linear layers; its gate is a router, although it is a linear layer of one output.
    """
    hidden, shared = shape.hidden_size, experts.shared
    modules = [
        block.tensor("mlp.gate", "router", experts.count * hidden),
        block.tensor("mlp.experts", "experts", 3 * experts.count * experts.width * hidden),
    ]
    if not shared:
        return modules
    return [
        *modules,
        *(block.linear(f"mlp.shared_expert.{name}_proj", "mlp", hidden, shared) for name in ("gate", "up")),
        block.linear("mlp.shared_expert.down_proj", "mlp", shared, hidden),
        block.tensor("mlp.shared_expert_gate", "router", hidden),
    ]
