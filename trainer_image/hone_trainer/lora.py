"""The adapter: a new one by module names that are checked against the model, or a saved one that is checked against
its base.

Called by trained.py and merging.py. Refuses names that match nothing, an adapter of another base, and one whose tensors
are not exactly those that the model would have: PEFT loads the first without a word and warns of the second at most.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from hone.modelinfo import SavedAdapter, read_adapter_directory
from hone.run import TrainerExit
from hone.spec import Lora
from hone_trainer import vocabulary
from hone_trainer.base_identity import check_base
from hone_trainer.failure import RunFailed, first_line
from hone_trainer.inputs import Source
from hone_trainer.model import HEADS, is_of_head

WEIGHTS = "adapter_model.safetensors"
_ROUTERS = ("router", "gate", "shared_expert_gate")
"""Names of the layers that choose experts: adapting them upsets the balance that was trained."""


def add_lora(model: Any, lora: Lora, *, task: str = "CAUSAL_LM", new_tokens: Sequence[int] = ()) -> Any:
    """The model with a fresh adapter, the rows of `new_tokens` in it. Raises RunFailed (USER) when a module name
    matches nothing."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,  # PEFT says int and takes any number
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=target_modules(model, lora),
        modules_to_save=_modules_to_save(model, lora),
        trainable_token_indices=vocabulary.trained_rows(model, new_tokens),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        fan_in_fan_out=_has_conv1d(model),
    )
    try:
        with _untying():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise RunFailed(
            TrainerExit.USER, f"adapter.lora.target_modules cannot be adapted: {first_line(error)}"
        ) from error
    vocabulary.complete_head(adapted)
    return adapted


def load_adapter(
    model: Any,
    adapter: Source,
    *,
    base: Source,
    name: str = "default",
    trains: bool = False,
    dropout: float = 0.0,
    task: str = "CAUSAL_LM",
) -> Any:
    """The model with a saved adapter, beside those that it has already. Raises RunFailed (USER) where it does not
    belong to the base, or is not whole."""
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    saved = read_saved(adapter)
    check_base(saved, base)
    vocabulary.grow(model, vocabulary.rows_of(saved))
    config = LoraConfig.from_pretrained(adapter.path)
    if (found := str(getattr(config.task_type, "value", config.task_type) or task)) != task:
        raise RunFailed(TrainerExit.USER, f"{adapter.asked} is an adapter for {found}, and {task} is wanted here.")
    # What the file says of these is about the machine and the training that wrote it.
    config.inference_mode, config.lora_dropout, config.fan_in_fan_out = not trains, dropout, _has_conv1d(model)
    config.base_model_name_or_path = model.name_or_path
    try:
        with _untying():
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
    except ValueError as error:
        raise RunFailed(TrainerExit.USER, f"{adapter.asked} does not fit {base.asked}: {first_line(error)}") from error
    vocabulary.complete_head(model)
    tensors = load_file(Path(adapter.path) / WEIGHTS)
    _check_tensors(adapter.asked, tensors, saved_tensors(model, name=name))
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    return model


def read_saved(adapter: Source) -> SavedAdapter:
    """What a saved adapter says of itself. Raises RunFailed (USER), or BadConfig."""
    found = read_adapter_directory(Path(adapter.path), adapter.asked)
    if found is None:
        raise RunFailed(TrainerExit.USER, f"{adapter.asked} holds no adapter (adapter_config.json).")
    if not (Path(adapter.path) / WEIGHTS).is_file():
        raise RunFailed(
            TrainerExit.USER,
            f"{adapter.asked} has no {WEIGHTS}.",
            fix="Pickled adapters are not read: save it again as safetensors, where you trust it.",
        )
    return found


def rows_needed(adapters: Iterable[Source]) -> int:
    """Places that a base needs to carry these adapters; 0 where none of them adds tokens."""
    return max((vocabulary.rows_of(read_saved(adapter)) for adapter in adapters), default=0)


def saved_tensors(model: Any, *, name: str = "default") -> Mapping[str, Any]:
    """What is saved of an adapter, by the names of its file."""
    from peft import get_peft_model_state_dict

    # Whether embeddings were resized would be asked of the Hub; what is trained of them stands in modules_to_save.
    found: Mapping[str, Any] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return found


def _check_tensors(asked: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for what, names in (("lacks", expected.keys() - found.keys()), ("has besides", found.keys() - expected.keys())):
        if names:
            raise RunFailed(
                TrainerExit.USER,
                f"{asked} is not an adapter for this model: it {what} {', '.join(sorted(names)[:3])} "
                f"({len(names)} tensors in all).",
            )
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            raise RunFailed(
                TrainerExit.USER,
                f"{asked} is not an adapter for this model: {key} is {tuple(found[key].shape)}, and "
                f"{tuple(tensor.shape)} is wanted.",
            )


@contextmanager
def _untying() -> Iterator[None]:
    """A head that is trained beside a tied embedding becomes its own: it is saved whole, and merging unties it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part")
        yield


def _has_conv1d(model: Any) -> bool:
    """GPT-2's layers keep their weights the other way round."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


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
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and path.rpartition(".")[2] not in _ROUTERS
        and not is_of_head(path)
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
    """What is trained in full: the modules that were asked for, and a head of scores, which starts from nothing."""
    paths = [path for path, _ in model.named_modules()]
    for name in lora.modules_to_save:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise RunFailed(
                TrainerExit.USER,
                f"adapter.lora.modules_to_save: {name!r} matches no module of the model.",
                fix=f"Its top modules are {', '.join(path for path in paths if path and path.count('.') < 2)}.",
            )
    heads = [name for path in paths if (name := path.rpartition(".")[2]) in HEADS]
    return list(dict.fromkeys([*heads, *lora.modules_to_save])) or None


def _no_match(name: str, linear: list[str]) -> RunFailed:
    return RunFailed(
        TrainerExit.USER,
        f"adapter.lora.target_modules: {name!r} matches no module of the model.",
        fix=f"Its linear layers are {', '.join(_names(linear))}.",
    )
