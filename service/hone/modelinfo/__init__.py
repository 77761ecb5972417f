"""Shapes of models, from config.json alone.

Called by plan.py and the CLI; needs neither torch nor weights. A family that is not listed in FAMILIES is refused,
never guessed. `load_shape(source)` gives the shape, `select` the layers that an adapter targets, and the *_parameters
functions count what is trained.

shape.py says what a shape is, config.py reads a config.json, block.py, gated.py and classic.py build the families that
families.py lists, trained.py selects and counts, pattern.py guards regular expressions, sources.py finds the
configuration, adapters.py reads what a saved adapter says of its base; shapes.yaml is the shipped table.
"""

from hone.modelinfo.adapters import ADAPTER_CONFIG, ADAPTER_IDENTITY, SavedAdapter, read_adapter, read_adapter_directory
from hone.modelinfo.encoders import ENCODERS
from hone.modelinfo.families import FAMILIES, read_config
from hone.modelinfo.pattern import BadPattern
from hone.modelinfo.scores import with_scores
from hone.modelinfo.shape import (
    BadConfig,
    Linear,
    ModelShape,
    Module,
    Role,
    UnknownFamily,
    UnknownModel,
    UnknownModule,
)
from hone.modelinfo.sources import default_hub_cache, load_shape, read_shape, shipped_configs
from hone.modelinfo.trained import (
    bias_parameters,
    dora_parameters,
    lora_parameters,
    saved_module_parameters,
    select,
    token_row_parameters,
)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_IDENTITY",
    "ENCODERS",
    "FAMILIES",
    "BadConfig",
    "BadPattern",
    "Linear",
    "ModelShape",
    "Module",
    "Role",
    "SavedAdapter",
    "UnknownFamily",
    "UnknownModel",
    "UnknownModule",
    "bias_parameters",
    "default_hub_cache",
    "dora_parameters",
    "load_shape",
    "lora_parameters",
    "read_adapter",
    "read_adapter_directory",
    "read_config",
    "read_shape",
    "saved_module_parameters",
    "select",
    "shipped_configs",
    "token_row_parameters",
    "with_scores",
]
