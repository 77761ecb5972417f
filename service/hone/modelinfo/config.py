"""A config.json, read with care: every size that a family needs is there and possible, or it is an error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hone.modelinfo.shape import BadConfig

MAX_LAYERS = 10_000
MAX_NUMBER = 2**31


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a family function reads from. A key that is null is absent; a value of another type is an error."""

    values: Mapping[str, Any]
    source: str
    num_labels: int | None
    """Outputs of a classification head in place of the language model's; None keeps the latter."""

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1. Without a default the key must be there: no size is guessed."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise BadConfig(
                f"config.json of {self.source} lacks {key!r}.", fix="Save the model again with save_pretrained()."
            )
        limit = MAX_LAYERS if key in ("num_hidden_layers", "n_layer", "n_layers") else MAX_NUMBER
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise BadConfig(
                f"config.json of {self.source} has {key}: {value!r}.", fix=f"Give a whole number from 1 to {limit}."
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise BadConfig(f"config.json of {self.source} has {key}: {value!r}.", fix="Give true or false.")
        return value
