"""Building stones that the families share: the modules of a repeated block, and the output heads of decoders."""

from collections.abc import Sequence
from dataclasses import dataclass

from hone.modelinfo.config import Config
from hone.modelinfo.shape import Linear, Module, Role


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block that stands in every layer under one prefix, such as `model.layers.{}`."""

    prefix: str
    layers: Sequence[int]

    def linear(self, name: str, role: Role, size_in: int, size_out: int, *, bias: bool = False) -> Linear:
        return Linear(
            path=f"{self.prefix}.{name}",
            role=role,
            layers=self.layers,
            in_features=size_in,
            out_features=size_out,
            bias=bias,
        )

    def tensor(self, name: str, role: Role, weights: int) -> Module:
        """A bare parameter, which PEFT does not adapt."""
        return Module(path=f"{self.prefix}.{name}", role=role, layers=self.layers, weights=weights)

    def rms_norm(self, name: str, size: int) -> Module:
        return self.tensor(name, "norm", size)

    def layer_norm(self, name: str, size: int) -> Module:
        return Module(path=f"{self.prefix}.{name}", role="norm", layers=self.layers, weights=size, biases=size)


def embedding(path: str, rows: int, size: int) -> Module:
    return Module(path=path, role="embedding", weights=rows * size)


def decoder_head(config: Config, *, hidden_size: int, vocab_size: int, tied: bool) -> Linear:
    """`lm_head`, or `score` where a classifier is asked for."""
    if config.num_labels is not None:
        return Linear(path="score", role="head", in_features=hidden_size, out_features=config.num_labels)
    return Linear(path="lm_head", role="head", in_features=hidden_size, out_features=vocab_size, tied=tied)
