"""A request that goes on from a saved adapter: its settings are the adapter's, and what contradicts them is refused.
And one that merges adapters, whose base is loaded as it was when they were trained.

Called by machine.py and jobs.py before such a request is planned, and by the trainer, which compares. Pure.
"""

from collections.abc import Callable
from dataclasses import replace

from pydantic import ValidationError

from hone.errors import InvalidRequest, Violation
from hone.modelinfo import BadConfig, SavedAdapter
from hone.plan import Planned
from hone.spec import Adapter, JobSpec, Lora
from hone.spec.combinations import violations

_BEYOND_LORA = ("rank_pattern", "alpha_pattern", "target_parameters", "layers_to_transform")


def continued(spec: JobSpec, own: Lora) -> JobSpec:
    """The request with the adapter's own settings; only dropout, which is of the training, is the request's.

    Raises InvalidRequest.
    """
    if spec.method.name == "merge":
        message = "is an adapter, and merge wants its base here: name the adapter under method.merge.adapters."
        raise InvalidRequest([Violation(path="model.source", value=spec.model.source, message=message)])
    if spec.model.new_tokens:
        message = "cannot be added to the adapter that training goes on from: remove it, or merge the adapter first."
        raise InvalidRequest([Violation(path="model.new_tokens", value=list(spec.model.new_tokens), message=message)])
    asked = spec.adapter.lora if spec.adapter else Lora()
    if differing := contradictions(asked, own):
        raise InvalidRequest(differing)
    found = spec.model_copy(update={"adapter": Adapter(lora=own.model_copy(update={"dropout": asked.dropout}))})
    if broken := violations(found):
        raise InvalidRequest(broken)
    return found


def plan_on_4_bits(planner: Callable[[JobSpec], Planned], spec: JobSpec) -> Planned:
    """The plan of a merge of adapters that were trained on a base in 4 bits, which is loaded so once more. The request
    itself cannot say it: the adapters do."""
    planned = planner(spec.model_copy(update={"quantization": "nf4"}))
    return replace(planned, spec=planned.spec.model_copy(update={"quantization": None}))


def contradictions(asked: Lora, own: Lora) -> list[Violation]:
    """What a request says of an adapter that is another; defaults say nothing."""
    default = Lora()
    return [
        Violation(
            path=f"adapter.lora.{name}",
            value=getattr(asked, name),
            message=f"is {getattr(own, name)} in the adapter that training goes on from: remove it.",
        )
        for name in Lora.model_fields
        if name != "dropout" and getattr(asked, name) not in (getattr(default, name), getattr(own, name))
    ]


def lora_of(adapter: SavedAdapter) -> Lora:
    """An adapter's settings, as a request would give them. Raises BadConfig for what a request cannot say."""
    values = adapter.config
    if beyond := [name for name in _BEYOND_LORA if values.get(name)]:
        raise BadConfig(
            f"{adapter.source} was made with {', '.join(beyond)}, which Hone does not train on.",
            fix="Merge it into its base (method.merge), and start from the merged model.",
        )
    targets = values.get("target_modules") or ()
    try:
        return Lora(
            rank=values.get("r", 8),
            alpha=values.get("lora_alpha", 8),
            dropout=values.get("lora_dropout") or 0.0,
            bias=values.get("bias") or "none",
            target_modules=(f"re:{targets}",) if isinstance(targets, str) else tuple(sorted(targets)),
            modules_to_save=tuple(values.get("modules_to_save") or ()),
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise BadConfig(f"{adapter.source}/adapter_config.json: {name}: {first['msg']}.") from error
