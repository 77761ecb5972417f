"""What a run leaves: adapter, merged model or model as safetensors, each reloaded and compared before it counts.

Called by course.py in every rank. Files name the base by its source, never by a path of this machine.
"""

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hone import __version__, quantities
from hone.errors import IntegrityError
from hone.job import EventType
from hone.modelinfo import ADAPTER_IDENTITY
from hone_trainer import merging, sharding
from hone_trainer.base_identity import base_identity, public_name
from hone_trainer.card import Facts, card
from hone_trainer.context import RunContext
from hone_trainer.data import Prepared
from hone_trainer.inputs import Source
from hone_trainer.lora import WEIGHTS, saved_tensors
from hone_trainer.merging import Part
from hone_trainer.model import auto_model, stop_tokens, weights_dtype

MAX_MERGE_KL = 1e-2
"""For output.merged, nats a token; method.merge.max_kl has the same default. An fp32 merge is below 1e-6, rounding it
to bf16 costs about 1e-5."""
_PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors", "tokenizers",
)  # fmt: skip
_MEMORY = {"host": "of the machine's", "gpu": "allocated on the GPU", "gpu_reserved": "reserved there"}
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


def save(context: RunContext, model: Any, tokenizer: Any, facts: Facts) -> dict[str, float] | None:
    """Write and check every promised output. What is answered is how exact the merge is, where there is one.

    The first rank does it; the others hand over what they hold of the weights. `facts` are for the card.
    """
    if context.run.spec.adapter is None:
        if sharding.splits_weights(context.run.launch):
            model = sharding.consolidated(model, kept=context.is_main)
        sharding.load_whole()
        if context.is_main:
            _save_model(context, model, tokenizer, facts)
        return None
    with sharding.whole(parameter for parameter in model.parameters() if parameter.requires_grad):
        if context.is_main:
            _save_adapter(context, model, tokenizer, facts)
    sharding.load_whole()
    if not (context.run.spec.output.merged and context.is_main):
        return None
    trained = Source(asked="The adapter that was just trained", path=str(context.output("adapter")))
    fix = (
        "Leave output.merged out and serve the adapter beside its base, or merge it with a larger method.merge.max_kl."
    )
    parts = [Part(adapter=trained)]
    return save_merged(context, tokenizer, parts, facts, combination="cat", limit=MAX_MERGE_KL, fix=fix)


def _save_adapter(context: RunContext, model: Any, tokenizer: Any, facts: Facts) -> None:
    directory, base, spec = context.output("adapter"), context.inputs.model, context.run.spec
    # Only what was trained, and no frozen copy beside it. Whether embeddings were resized would be asked of the Hub.
    model.save_pretrained(directory, selected_adapters=["default"], save_embedding_layers=False)
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": public_name(base), "revision": base.revision or None}
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    dtype = str(weights_dtype(context.run.launch, adapted=True)).removeprefix("torch.")
    identity = base_identity(base) | {"dtype": dtype, "quantization": spec.quantization or ""}  # as it was loaded
    (directory / ADAPTER_IDENTITY).write_text(json.dumps(identity, indent=2), encoding="utf-8")
    tokenizer.save_pretrained(directory)
    _write_card(context, directory, facts, kind="adapter")
    compare(saved_tensors(model), load_file(directory / WEIGHTS), where=directory)


def _save_model(context: RunContext, model: Any, tokenizer: Any, facts: Facts) -> None:
    """Full fine-tuning: the whole model, in the precision of the files it came from."""
    directory = context.output("model")
    model.to(stored_dtype(Path(context.inputs.model.path)))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_card(context, directory, facts, kind="model")
    compare(dict(model.named_parameters()), dict(_reload(context, directory).named_parameters()), where=directory)


def save_merged(
    context: RunContext,
    tokenizer: Any,
    parts: Sequence[Part],
    facts: Facts,
    *,
    combination: str,
    limit: float,
    fix: str,
) -> dict[str, float]:
    """Merge in fp32, save in the base's precision, reload, and measure what merging and rounding cost.

    Raises RunFailed (USER) where that is more than `limit`; `fix` says what to do then.
    """
    directory, base = context.output("merged"), context.inputs.model
    merging.give_back()
    model, references = merging.merge(base, parts, combination=combination, model=context.run.spec.model)
    model.to(stored_dtype(Path(base.path)))
    merging.give_back()
    text_config = model.config.get_text_config()
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    reloaded = _reload(context, directory)
    compare(dict(model.named_parameters()), dict(reloaded.named_parameters()), where=directory)
    del model  # one copy in fp32 at a time
    merging.give_back()
    quality = references.quality(merging.logits(reloaded.float()))
    context.event(EventType.NOTE, merging.sentence(quality, limit=limit), metrics=quality)
    merging.check(quality, limit=limit, fix=fix)
    _write_card(context, directory, replace(facts, metrics={**facts.metrics, "merge": quality}), kind="merged")
    return quality


def _write_card(context: RunContext, directory: Path, facts: Facts, *, kind: str) -> None:
    (directory / "README.md").write_text(card(context, facts, kind=kind), encoding="utf-8")


def _reload(context: RunContext, directory: Path) -> Any:
    auto = auto_model(scores=context.run.spec.method.reward is not None)
    with _quiet_loading():
        return auto.from_pretrained(directory, dtype="auto", local_files_only=True).eval()


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
    data: Prepared | None = None,
    clock: Clock,
    parameters: Mapping[str, int],
    metrics: Mapping[str, Any],
    steps: Mapping[str, int | None],
) -> None:
    """Leave what result.json says of the run as worker.json in scratch, and tell the peaks of its memory.

    The supervisor adds outputs, identity and total time.
    """
    launch, versions = context.run.launch, {"hone": __version__, **{name: version(name) for name in _PACKAGES}}
    peaks = _peaks(is_gpu=launch.device == "cuda")
    found = {
        "method": context.run.spec.method.name,
        "versions": versions,
        "seed": context.run.spec.training.seed,
        "launch": asdict(launch),
        "base": base_identity(context.inputs.model),
        **({"data": _described(data)} if data else {}),
        "parameters": dict(parameters),
        "steps": dict(steps),
        "metrics": dict(metrics),
        "durations_s": clock.seconds,
        "peak_memory_bytes": peaks,
    }
    (context.scratch / "worker.json").write_text(json.dumps(found), encoding="utf-8")
    told = {f"peak_{name}_bytes": float(size) for name, size in peaks.items() if size is not None}
    words = ", ".join(f"{quantities.size(size)} {_MEMORY[name]}" for name, size in peaks.items() if size is not None)
    context.event(EventType.NOTE, f"Peak memory: {words}.", metrics=told, fields={"versions": json.dumps(versions)})


def _peaks(*, is_gpu: bool) -> dict[str, int | None]:
    """Of this process, by the names of result.json."""
    return {
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu": torch.cuda.max_memory_allocated() if is_gpu else None,
        "gpu_reserved": torch.cuda.max_memory_reserved() if is_gpu else None,
    }


def _described(data: Prepared) -> dict[str, Any]:
    train = {**data.train_counts.metrics(), "lengths": data.train_counts.lengths}
    found = {"fingerprint": data.fingerprint, "train": train}
    return found | ({"eval": data.eval_counts.metrics()} if data.eval_counts else {})
