"""The adapter: target modules by name, checked against the model, and PEFT's configuration of them."""

import re
from typing import Any

from torch import nn

from hone.run import TrainerExit
from hone.spec import Lora
from hone_trainer.failure import RunFailed

_ROUTERS = ("router", "gate", "shared_expert_gate")
"""Names of the layers that choose experts: adapting them upsets the balance that was trained."""


def add_lora(model: Any, lora: Lora) -> Any:
    """The model with a fresh adapter. Raises RunFailed (USER) when a module name matches nothing."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # PEFT says int and takes any number
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=target_modules(model, lora),
        modules_to_save=_modules_to_save(model, lora),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RunFailed(
            TrainerExit.USER, f"adapter.lora.target_modules cannot be adapted: {str(error).splitlines()[0]}"
        ) from error


def target_modules(model: Any, lora: Lora) -> list[str] | str:
    """What PEFT gets: names, never `all-linear`, which it would save as the full path of every layer."""
    linear = linear_layers(model)
    [first, *_] = lora.target_modules
    if first == "all-linear":
        return _names(linear)
    if first == "attention":
        inside = {path for path in linear if re.search(r"attn|attention", path.rpartition(".")[0])}
        return _distinct_names(inside, outside=set(linear) - inside)
    if first.startswith("re:"):
        return _expression(model, first.removeprefix("re:"), lora)
    paths = [path for path, _ in model.named_modules()]
    for name in lora.target_modules:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise _no_match(name, linear)
    return list(lora.target_modules)


def linear_layers(model: Any) -> list[str]:
    """Paths of all linear layers but the head and routers."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and path.rpartition(".")[2] not in _ROUTERS
    ]


def _names(paths: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _distinct_names(inside: set[str], *, outside: set[str]) -> list[str]:
    """Names that match these layers and no others: `q_proj`, or `attn.c_proj` where `mlp.c_proj` is there too."""
    taken = set(_names(list(outside)))
    names = {path.rpartition(".")[2] for path in inside}
    longer = {".".join(path.split(".")[-2:]) for path in inside if path.rpartition(".")[2] in taken}
    return sorted((names - taken) | longer)


def _expression(model: Any, pattern: str, lora: Lora) -> str:
    matched = [path for path, _ in model.named_modules() if re.fullmatch(pattern, path)]
    if not matched:
        raise _no_match(f"re:{pattern}", linear_layers(model))
    head = model.get_output_embeddings()
    if any(module is head for path, module in model.named_modules() if path in matched):
        raise RunFailed(
            TrainerExit.USER,
            f"adapter.lora.target_modules: {lora.target_modules[0]!r} matches the head, which is not adapted.",
            fix="Narrow the expression; train the head under adapter.lora.modules_to_save.",
        )
    return pattern


def _modules_to_save(model: Any, lora: Lora) -> list[str] | None:
    paths = [path for path, _ in model.named_modules()]
    for name in lora.modules_to_save:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise RunFailed(
                TrainerExit.USER,
                f"adapter.lora.modules_to_save: {name!r} matches no module of the model.",
                fix=f"Its top modules are {', '.join(path for path in paths if path and path.count('.') < 2)}.",
            )
    return list(lora.modules_to_save) or None


def _no_match(name: str, linear: list[str]) -> RunFailed:
    return RunFailed(
        TrainerExit.USER,
        f"adapter.lora.target_modules: {name!r} matches no module of the model.",
        fix=f"Its linear layers are {', '.join(_names(linear))}.",
    )
