"""The model and its tokenizer: checked before they are opened, loaded from safetensors alone, in a precision that is
set.

Called by the methods. Refuses pickles, code that comes with a model, and architectures that transformers does not know.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hone.job import Launch
from hone.run import TrainerExit
from hone.spec import Model
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import Source
from hone_trainer.sharding import shape
from hone_trainer.vocabulary import add_tokens, grow, num_rows, token_ids

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HEADS = ("score", "classifier", "pre_classifier", "pooler")
"""Modules that a model of scores has on top of its base, by the names of transformers."""


def is_of_head(path: str) -> bool:
    """Whether a module or weight belongs to one of them."""
    return any(part in HEADS for part in path.split("."))


def check_model(source: Source, *, scores: bool = False) -> dict[str, Any]:
    """The config of a model directory that can be trained, with `scores` as a reward model. Raises RunFailed (USER)
    with what is wrong; opens no weights."""
    config = check_config(source, scores=scores)
    path = Path(source.path)
    if not any(path.glob("*.safetensors")):
        raise _no_weights(path, source.asked)
    return config


def check_config(source: Source, *, scores: bool = False) -> dict[str, Any]:
    """The same of a directory that may lack its weights yet."""
    path = Path(source.path)
    config = _read_config(path, source.asked)
    _refuse_code(config, path, source.asked)
    from transformers.models.auto import modeling_auto as known

    model_type = config.get("model_type")
    names = known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if scores else known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type not in names:
        raise RunFailed(
            TrainerExit.USER,
            f"model.source: {source.asked} has model_type {model_type!r}, which transformers does not know as a "
            f"{'classifier' if scores else 'language model'}.",
            fix="Use an architecture that it knows, or a newer trainer.",
        )
    return config


def _read_config(path: Path, asked: str) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "is an adapter" if (path / "adapter_config.json").exists() else "has no config.json"
        raise RunFailed(
            TrainerExit.USER, f"model.source: {asked} {what}, so it is not a model.", fix="Name a model's directory."
        ) from error
    except json.JSONDecodeError as error:
        raise RunFailed(TrainerExit.USER, f"model.source: {file} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise RunFailed(TrainerExit.USER, f"model.source: {file} holds no mapping.")
    return config


def _refuse_code(config: Mapping[str, Any], path: Path, asked: str) -> None:
    if config.get("auto_map"):
        raise RunFailed(
            TrainerExit.USER,
            f"{asked} wants to run code of its own ({path.name}: auto_map), which is refused.",
            fix="Use a model whose architecture is part of transformers.",
        )


def _no_weights(path: Path, asked: str) -> RunFailed:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        return RunFailed(
            TrainerExit.USER,
            f"model.source: {asked} holds pickled weights only ({', '.join(pickles[:3])}), which can run code "
            f"when they "
            "are opened.",
            fix="Convert them to safetensors (save_pretrained does), where you trust them.",
        )
    return RunFailed(TrainerExit.USER, f"model.source: {asked} has no weights: no *.safetensors file is in it.")


def load_tokenizer(source: Source, model: Model) -> Any:
    """The tokenizer, with the request's new tokens, chat template and end-of-turn token. Raises RunFailed (USER)."""
    from transformers import AutoTokenizer

    path = Path(source.path)
    config_file = path / "tokenizer_config.json"
    if not config_file.exists() and not (path / "tokenizer.json").exists():
        raise RunFailed(
            TrainerExit.USER, f"{source.asked} has no tokenizer (tokenizer.json).", fix="Set model.tokenizer."
        )
    if config_file.exists():
        _refuse_code(json.loads(config_file.read_text(encoding="utf-8")), config_file, source.asked)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise RunFailed(
            TrainerExit.USER, f"The tokenizer of {source.asked} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    add_tokens(tokenizer, model.new_tokens)
    if model.chat_template is not None:
        tokenizer.chat_template = model.chat_template
    if model.eos_token is not None:
        if model.eos_token not in tokenizer.get_vocab():
            raise RunFailed(TrainerExit.USER, f"model.eos_token: {model.eos_token!r} is not a token of {source.asked}.")
        tokenizer.eos_token = model.eos_token
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # encoders end every text with it
    if tokenizer.eos_token_id is None:
        raise RunFailed(
            TrainerExit.USER,
            f"The tokenizer of {source.asked} has no end-of-sequence token, so no answer would ever end.",
            fix="Set model.eos_token.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_apart(tokenizer: Any) -> Any:
    """The tokenizer with a padding token that is not the stop token, where it has another that no answer ends with.

    A decoder's score is taken from the last token that is no padding, so one that pads with its stop token would not
    see whether an answer ends.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        others = [tokenizer.unk_token, tokenizer.bos_token]
        apart = [token for token in others if token not in (None, tokenizer.eos_token)]
        tokenizer.pad_token = apart[0] if apart else tokenizer.eos_token
    return tokenizer


def weights_dtype(launch: Launch, *, adapted: bool) -> torch.dtype:
    """What the weights are loaded in: what is trained is fp32, a frozen base has the precision of the computation."""
    return torch.bfloat16 if adapted and launch.precision == "bf16" else torch.float32


def load_model(
    source: Source,
    model: Model,
    *,
    dtype: torch.dtype,
    tokenizer: Any,
    quantization: Any = None,
    device: str = "cpu",
    scores: bool = False,
    rows: int = 0,
) -> Any:
    """The model with weights for every parameter, on the CPU; with `quantization` (transformers' configuration) on
    `device`; with `scores` as a reward model, whose head is random where the files have none. It grows by the request's
    new tokens, and to the `rows` that an adapter of it needs. Raises RunFailed (USER) where the files do not fit it."""
    attention = None if model.attention == "auto" else model.attention  # None: sdpa where the family has it
    try:
        loaded, info = auto_model(scores=scores).from_pretrained(
            source.path,
            **({"num_labels": 1} if scores else {}),
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"quantization_config": quantization, "device_map": {"": device}} if quantization else {}),
        )
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        if "out of memory" in str(error).lower():
            raise
        raise RunFailed(
            TrainerExit.USER,
            f"{source.asked} cannot be loaded with {model.attention} attention: {str(error).splitlines()[0]}",
        ) from error
    if missing := sorted(key for key in info["missing_keys"] if not (scores and is_of_head(key))):
        raise RunFailed(
            TrainerExit.USER,
            f"{source.asked} lacks weights: {', '.join(missing[:3])} ({len(missing)} in all) are not in its files.",
        )
    new = token_ids(tokenizer, model.new_tokens)
    if new or rows:
        grow(loaded, max([rows, *(index + 1 for index in new)]), new=new)
    _match_tokenizer(loaded, tokenizer, source)
    return loaded


def auto_model(*, scores: bool) -> Any:
    """The class of transformers that loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if scores else AutoModelForCausalLM


def _match_tokenizer(model: Any, tokenizer: Any, source: Source) -> None:
    if len(tokenizer) > (rows := num_rows(model)):
        raise RunFailed(
            TrainerExit.USER,
            f"The tokenizer has {len(tokenizer):,} tokens and the model {source.asked} only {rows:,}: they do "
            f"not belong together.",
            fix="Set model.tokenizer to the model's own.",
        )
    text_config = model.config.get_text_config()
    text_config.pad_token_id = tokenizer.pad_token_id
    text_config.eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = stop_tokens(model, tokenizer)


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Where an answer ends: at the tokenizer's token, and at those that the model knew before."""
    known = model.generation_config.eos_token_id
    stops = known if isinstance(known, list) else [] if known is None else [known]
    return list(dict.fromkeys([tokenizer.eos_token_id, *stops]))


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable parameters, and all of them; weights in 4 bits count as what they stand for."""
    sizes = [(_numbers(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def _numbers(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape if state is not None else shape(parameter))


def train_in(model: Any, dtype: torch.dtype) -> None:
    """Hold what is trained in this precision."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
