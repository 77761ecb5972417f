"""What a run leaves: adapter, merged model or model as safetensors, each reloaded and compared before it counts.

Called by the methods in the first rank. Files name the base by its source, never by a path of this machine.
"""

import json
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hone import __version__
from hone.errors import IntegrityError
from hone_trainer.card import card
from hone_trainer.context import RunContext
from hone_trainer.data import Prepared
from hone_trainer.model import base_identity, public_name

MAX_MERGE_KL = 1e-2
"""Nats a token; an fp32 merge is below 1e-6, rounding it to bf16 costs about 1e-5."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tokenizers")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Clock:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """The phase `name` ends here."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def save(context: RunContext, model: Any, tokenizer: Any) -> dict[str, float] | None:
    """Write and check every promised output. What is answered is how exact the merge is, where there is one."""
    if context.run.spec.adapter is None:
        _save_model(context, model, tokenizer)
        return None
    _save_adapter(context, model, tokenizer)
    return _save_merged(context, tokenizer) if context.run.spec.output.merged else None


def _save_adapter(context: RunContext, model: Any, tokenizer: Any) -> None:
    from peft import get_peft_model_state_dict

    directory, base = context.output("adapter"), context.inputs.model
    # Whether embeddings were resized would be asked of the Hub; what is trained of them stands in modules_to_save.
    model.save_pretrained(directory, save_embedding_layers=False)
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": public_name(base), "revision": base.revision or None}
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (directory / "hone_base.json").write_text(json.dumps(base_identity(base), indent=2), encoding="utf-8")
    _finish(context, directory, tokenizer, kind="adapter")
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    compare(expected, load_file(directory / "adapter_model.safetensors"), where=directory)


def _save_model(context: RunContext, model: Any, tokenizer: Any) -> None:
    """Full fine-tuning: the whole model, in the precision of the files it came from."""
    directory = context.output("model")
    model.to(stored_dtype(Path(context.inputs.model.path)))
    model.save_pretrained(directory)
    _finish(context, directory, tokenizer, kind="model")
    compare(dict(model.named_parameters()), dict(_reload(directory).named_parameters()), where=directory)


def _save_merged(context: RunContext, tokenizer: Any) -> dict[str, float]:
    """Merge in fp32, save in the base's precision, reload, and measure what merging and rounding cost."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory, base = context.output("merged"), Path(context.inputs.model.path)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    adapted = PeftModel.from_pretrained(fresh, context.output("adapter")).eval()
    stops = [tokenizer.eos_token_id]
    probe = _probe(fresh.config.get_text_config().vocab_size)
    with torch.no_grad():
        wanted = adapted(**probe).logits
    merged = adapted.merge_and_unload().to(stored_dtype(base))
    merged.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    merged.generation_config.eos_token_id = stops
    merged.save_pretrained(directory)
    _finish(context, directory, tokenizer, kind="merged")
    reloaded = _reload(directory)
    compare(dict(merged.named_parameters()), dict(reloaded.named_parameters()), where=directory)
    with torch.no_grad():
        found = reloaded(**probe).logits.float()
    return _merge_quality(wanted, found, directory)


def _merge_quality(wanted: torch.Tensor, found: torch.Tensor, directory: Path) -> dict[str, float]:
    before, after = wanted.log_softmax(-1), found.log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    if not divergence <= MAX_MERGE_KL:
        raise IntegrityError(
            f"The merged model in {directory.name}/ is not the adapted one: KL {divergence:.3g} nats a token, at most "
            f"{MAX_MERGE_KL:g} is allowed."
        )
    return {"kl_nats": max(divergence, 0.0), "max_logit_difference": float((wanted - found).abs().max())}


def _probe(vocabulary: int) -> dict[str, torch.Tensor]:
    """Tokens to hold two models against each other; the same in every run."""
    ids = torch.randint(0, vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _finish(context: RunContext, directory: Path, tokenizer: Any, *, kind: str) -> None:
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card(context, kind=kind), encoding="utf-8")


def _reload(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with _quiet_loading():
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True).eval()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield


def compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Raise IntegrityError unless the files hold exactly these tensors, and every number is finite."""
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())
        raise IntegrityError(
            f"{where.name}/ holds {len(found)} tensors, {len(expected)} were trained: {', '.join(odd[:3])}."
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape or not torch.equal(tensor.detach().cpu(), found[name].to(tensor.dtype)):
            raise IntegrityError(f"{name} in {where.name}/ is not what was trained.")
        if not torch.isfinite(found[name]).all():
            raise IntegrityError(f"{name} in {where.name}/ holds a number that is not finite.")


def stored_dtype(model: Path) -> torch.dtype:
    """The precision of a model's files."""
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                if (dtype := _DTYPES.get(tensors.get_slice(name).get_dtype())) is not None:
                    return dtype
    return torch.float32


def record(
    context: RunContext,
    *,
    data: Prepared,
    clock: Clock,
    parameters: Mapping[str, int],
    metrics: Mapping[str, Any],
    steps: Mapping[str, int | None],
) -> dict[str, Any]:
    """What result.json says of the run; the supervisor adds outputs, identity and total time."""
    launch = context.run.launch
    gpu_bytes = torch.cuda.max_memory_allocated() if launch.device == "cuda" else None
    dataset = {"fingerprint": data.fingerprint, "train": data.train_counts.metrics()}
    if data.eval_counts:
        dataset["eval"] = data.eval_counts.metrics()
    return {
        "method": context.run.spec.method.name,
        "versions": {"hone": __version__, **{name: version(name) for name in _PACKAGES}},
        "seed": context.run.spec.training.seed,
        "launch": asdict(launch),
        "base": base_identity(context.inputs.model),
        "data": dataset,
        "parameters": dict(parameters),
        "steps": dict(steps),
        "metrics": dict(metrics),
        "durations_s": clock.seconds,
        "peak_memory_bytes": {
            "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "gpu": gpu_bytes,
        },
    }
