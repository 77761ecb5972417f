"""Models that answer: one copy of the base with an adapter for each job on it, and a whole model where a job left one.

Called by answering.py. Refuses an adapter of another base, and one that changed its base where somebody else needs
that as it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hone.run import TrainerExit
from hone.spec import Model
from hone_trainer import quantization
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import Source, has_tokenizer
from hone_trainer.lora import load_adapter, read_saved, rows_needed
from hone_trainer.model import check_model, load_model, load_tokenizer, stop_tokens
from hone_trainer.outputs import stored_dtype
from hone_trainer.trial import Candidate, Wanted

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Voice:
    """Who answers to one name."""

    name: str
    kind: str
    """base, adapter, merged or model."""
    model: Any
    tokenizer: Any
    adapter: str = ""
    """PEFT's name of the adapter; empty where the model speaks as it is."""
    plain: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether prompts go through a chat template."""
        return bool(self.tokenizer.chat_template) and not self.plain

    @contextmanager
    def speaking(self) -> Iterator[Any]:
        """The model as this one's, for the length of the block."""
        if self.adapter:
            self.model.set_adapter(self.adapter)
            yield self.model
        elif hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model


@dataclass(frozen=True, kw_only=True)
class Voices:
    """Everybody, by name, the base first; and what people should know of it."""

    by_name: Mapping[str, Voice]
    notes: Sequence[str] = field(default=())
    device: str = "cpu"


@dataclass(frozen=True)
class Precision:
    """How the base is loaded."""

    dtype: torch.dtype
    quantization: str = ""


def load(wanted: Wanted) -> Voices:
    """Load everybody. Raises RunFailed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapters = [job for job in wanted.jobs if job.kind == "adapter"]
    notes: list[str] = []
    found: dict[str, Voice] = {}
    if wanted.base is not None:
        precision, notes = choose_precision(adapters, wanted.base, has_gpu=device == "cuda")
        _check_biases(adapters, asks_base=wanted.asks_base)
        tokenizer = _base_tokenizer(wanted.base, wanted.jobs)
        rows = rows_needed(job.source for job in adapters)
        model = _with_adapters(_load(wanted.base, tokenizer, device, precision, rows), adapters, wanted.base)
        if wanted.asks_base:
            found[BASE] = Voice(name=BASE, kind=BASE, model=model, tokenizer=tokenizer, plain=wanted.plain_base)
    for job in wanted.jobs:
        tokenizer = _tokenizer(job.source)
        if job.kind == "adapter":
            own, name = model, _peft_name(adapters.index(job))
        else:
            own, name = _load(job.source, tokenizer, device, Precision(stored_dtype(Path(job.path)))), ""
        found[job.name] = Voice(
            name=job.name, kind=job.kind, model=own, tokenizer=tokenizer, adapter=name, plain=job.plain
        )
    return Voices(by_name=found, notes=notes, device=device)


def choose_precision(adapters: Sequence[Candidate], base: Source, *, has_gpu: bool) -> tuple[Precision, list[str]]:
    """As the adapters were trained, where one copy of the base can be that; and what to say where it cannot."""
    identities = {job.name: read_saved(job.source).identity for job in adapters}
    known = {name: identity for name, identity in identities.items() if identity}
    if not known:
        return Precision(stored_dtype(Path(base.path))), []
    dtypes = {str(identity.get("dtype") or "bfloat16") for identity in known.values()}
    dtype = torch.float32 if "float32" in dtypes else torch.bfloat16
    quantized = [name for name, identity in known.items() if identity.get("quantization")]
    if not quantized:
        return Precision(dtype), []
    if has_gpu and len(quantized) == len(identities):
        return Precision(dtype, "nf4"), []
    why = "not every job was" if has_gpu else "there is no GPU"
    trained = f"{', '.join(quantized)} {'was' if len(quantized) == 1 else 'were'} trained on the base in 4 bits"
    return Precision(dtype), [
        f"{trained}; {why}, so here the base is {str(dtype).removeprefix('torch.')}, and answers may differ a little."
    ]


def _check_biases(adapters: Sequence[Candidate], *, asks_base: bool) -> None:
    """Trained biases stand in the base itself: switching the adapter off does not bring the old ones back."""
    biased = [job for job in adapters if read_saved(job.source).config.get("bias", "none") != "none"]
    if biased and (asks_base or len(adapters) > 1):
        raise RunFailed(
            TrainerExit.USER,
            f"{biased[0].name} trained biases of its base (adapter.lora.bias), so nobody else can use the same copy.",
            fix="Try it alone, with --no-base.",
        )


def _with_adapters(model: Any, adapters: Sequence[Candidate], base: Source) -> Any:
    for number, job in enumerate(adapters):
        model = load_adapter(model, job.source, base=base, name=_peft_name(number))
    # PEFT puts new modules where the base's are; modules that are saved whole stay where they were made.
    return model.eval() if getattr(model, "is_quantized", False) else model.to(model.device).eval()


def _peft_name(number: int) -> str:
    """Names become keys of a module, where not every id may stand."""
    return f"job_{number}"


def _load(source: Source, tokenizer: Any, device: str, precision: Precision, rows: int = 0) -> Any:
    from transformers import GenerationConfig

    check_model(source)
    config = None
    if precision.quantization:
        quantization.check_quantizable(source)
        config = quantization.nf4(precision.dtype)
    model = load_model(
        source,
        _as_it_is(source),
        dtype=precision.dtype,
        tokenizer=tokenizer,
        quantization=config,
        device=device,
        rows=rows,
    )
    # What its files say of sampling is put away: whatever a request leaves open would come from there.
    model.generation_config = GenerationConfig(
        eos_token_id=stop_tokens(model, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    return model.eval() if config else model.to(device).eval()


def _base_tokenizer(base: Source, jobs: Sequence[Candidate]) -> Any:
    """Its own, or the one that was trained with where it has none."""
    return _tokenizer(base if has_tokenizer(base) else jobs[0].source)


def _tokenizer(source: Source) -> Any:
    return load_tokenizer(source, _as_it_is(source))


def _as_it_is(source: Source) -> Model:
    """No wishes of a request: outputs hold the template and the stop token that they were trained with."""
    return Model(source=source.asked)
