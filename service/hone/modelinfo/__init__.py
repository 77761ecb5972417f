"""Shapes of models, from config.json alone.

Called by plan.py and the CLI; needs neither torch nor weights. A family that is not listed in FAMILIES is refused,
never guessed. `load_shape(source)` gives the shape, `select` the layers that an adapter targets, and the *_parameters
functions count what is trained.

shape.py says what a shape is, config.py reads a config.json, block.py, gated.py and classic.py build the families that
families.py lists, trained.py selects and counts, pattern.py guards regular expressions, sources.py finds the
configuration; shapes.yaml is the shipped table.
"""

from hone.modelinfo.families import FAMILIES, read_config
from hone.modelinfo.pattern import BadPattern
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
from hone.modelinfo.sources import default_hub_cache, load_shape, shipped_configs
from hone.modelinfo.trained import (
    bias_parameters,
    dora_parameters,
    lora_parameters,
    saved_module_parameters,
    select,
)

__all__ = [
    "FAMILIES",
    "BadConfig",
    "BadPattern",
    "Linear",
    "ModelShape",
    "Module",
    "Role",
    "UnknownFamily",
    "UnknownModel",
    "UnknownModule",
    "bias_parameters",
    "default_hub_cache",
    "dora_parameters",
    "load_shape",
    "lora_parameters",
    "read_config",
    "saved_module_parameters",
    "select",
    "shipped_configs",
]
