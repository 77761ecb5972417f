"""The shape of one model: its modules with sizes, and what each way of fine-tuning trains of them.

Called by plan.py and the CLI; the trainer checks itself against it. Counts are what transformers and PEFT count,
tested on the meta device in tests/trainer/test_model_counts.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from hone.errors import UserError

Role = Literal["attention", "mlp", "experts", "router", "norm", "embedding", "head"]


class UnknownFamily(UserError):
    """The model's family is not in FAMILIES."""

    reason = "UNKNOWN_FAMILY"


class UnknownModel(UserError):
    """Nothing here tells the model's shape."""

    reason = "UNKNOWN_MODEL"


class BadConfig(UserError):
    """A config.json that cannot be read, or that lacks what its family needs."""

    reason = "BAD_MODEL_CONFIG"


class UnknownModule(UserError):
    """A module name that the model does not have."""

    reason = "UNKNOWN_MODULE"


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module with weights of its own; one entry stands for the same module of every layer."""

    path: str
    """As in `named_modules()`, `{}` where the number of the layer stands: `model.layers.{}.mlp.up_proj`."""
    role: Role
    layers: Sequence[int] = range(1)
    """Numbers of the layers that have it; `range(1)` for a module outside the layers."""
    weights: int
    """Numbers in one such module, without biases."""
    biases: int = 0
    """Numbers in its bias, 0 where it has none."""
    tied: bool = False
    """Its weight is the input embedding's, which counts it; a bias stays its own."""

    @property
    def name(self) -> str:
        """The last part of the path, the name that people target: `up_proj`."""
        return self.path.rpartition(".")[2]

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """Weights and biases of all its layers together; a tied weight is counted where it lives."""
        return self.count * (self.biases if self.tied else self.weights + self.biases)

    def paths(self) -> Iterable[str]:
        """The full name in each layer."""
        return (self.path.format(layer) for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Linear(Module):
    """One linear layer (or Conv1D), by the name that PEFT would target."""

    in_features: int
    out_features: int
    bias: bool = False
    weights: int = field(init=False)
    biases: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", self.in_features * self.out_features)
        object.__setattr__(self, "biases", self.out_features if self.bias else 0)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """How a layer computes, as far as that decides what it keeps for its backward pass."""

    norm: Literal["rms", "layer"] = "rms"
    scales_in_fp32: bool = False
    """Whether an RMSNorm multiplies by its weight in fp32, before it goes back to the precision of its input."""
    norms_after: bool = False
    """Norms stand behind attention and MLP, whose linear layers read the residual stream itself."""
    parallel: bool = False
    """Attention and MLP read the same input, and so do their norms."""
    norms_first: bool = False
    """Both are computed before anything reads them."""
    mlp: Literal["gated", "gelu", "gelu_new", "relu"] = "gated"
    """`gelu_new` is computed in Python, step by step."""
    fused_qkv: bool = False
    """Values stay a view of what one projection made for queries, keys and values, and the output is copied."""
    always_masked: bool = False
    """Its attention takes a mask where none is needed, too."""
    residual_dropout: bool = False
    attention_dropout: bool = False
    """The model's own, of supervised fine-tuning: methods that compare two passes turn it off."""
    alternates: bool = False
    """Layers see all tokens or their neighbours, by turns, each kind with a mask and a rotation of its own."""
    softcap: bool = False
    """The attention's scores pass a tanh."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What config.json tells of one model."""

    source: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the MLP; of one expert in a mixture of experts."""
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    """The output head is the input embedding: one weight, counted once."""
    num_experts: int = 0
    num_experts_per_token: int = 0
    """Experts whose activations one token holds: those that it is sent to, and a shared one by its width."""
    modules: tuple[Module, ...]
    layer: Layer = Layer()
    weight_bytes_on_disk: int | None = None
    """Size of the safetensors files; None where the source is not a local directory."""

    def __hash__(self) -> int:
        """Quickly: shapes are keys of caches, and have hundreds of modules."""
        return hash((self.source, self.model_type, len(self.modules)))

    @cached_property
    def parameters(self) -> int:
        """All parameters, a tied head counted once: what transformers' `num_parameters()` says."""
        return sum(module.parameters for module in self.modules)

    @cached_property
    def linear_layers(self) -> tuple[Linear, ...]:
        """Every linear layer in order of depth, the head included. Routers and fused experts are none."""
        return tuple(module for module in self.modules if isinstance(module, Linear))

    @cached_property
    def quantizable_weights(self) -> int:
        """Weights that bitsandbytes stores in 4 bits: those of the linear layers without the head."""
        return sum(layer.count * layer.weights for layer in self.linear_layers if layer.role != "head")

    def parameters_of(self, *roles: Role) -> int:
        """Parameters of the modules with one of these roles; a tied head's weight is part of the embedding."""
        return sum(module.parameters for module in self.modules if module.role in roles)
