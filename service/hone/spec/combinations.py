"""Which values may stand together, as data: used by validation, by docs/spec.md and by a test that walks every pair.

RULES are refused for good; UNSERVED will work in a later version and answers UNIMPLEMENTED until then.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hone.errors import NotServed, Violation
from hone.spec import JobSpec
from hone.spec.enumerations import OPTIMIZERS, STRATEGIES, word_violations
from hone.spec.methods import METHODS
from hone.spec.outputs import hub_violations
from hone.spec.rewards import reward_violations
from hone.spec.secret import secret_message, secrets
from hone.spec.sources import sources
from hone.spec.splits import split_violations
from hone.spec.vocabulary import vocabulary_violations

AXES: Mapping[str, tuple[str, ...]] = {
    "method": METHODS,
    "weights": ("full", "lora"),
    "quantization": ("none", "nf4"),
    "strategy": STRATEGIES,
    "optimizer": OPTIMIZERS,
    "precision": ("auto", "bf16", "fp32"),
    "packing": ("off", "on"),
    "dropout": ("zero", "positive"),
    "merged": ("off", "on"),
}
"""The choices that can exclude one another, and their values."""


_PROMPTS = ("prompt", "prompt_completion", "messages")
FORMATS: Mapping[str, tuple[str, ...]] = {
    "sft": ("messages", "prompt_completion", "text"),
    "dpo": ("preference",),
    "reward": ("preference",),
    "ppo": _PROMPTS,
    "grpo": _PROMPTS,
    "merge": ("auto",),
}
"""What a row may hold, for each method."""


@dataclass(frozen=True)
class Rule:
    """Values of axes that must not meet."""

    when: Mapping[str, str]
    path: str
    message: str


RULES: tuple[Rule, ...] = (
    Rule({"quantization": "nf4", "weights": "full"}, "quantization",
         "nf4 needs adapter.lora (QLoRA): add an adapter, or remove quantization."),
    Rule({"strategy": "fsdp"}, "compute.strategy",
         "fsdp is refused until it has been verified on GPUs: use ddp, zero2 or zero3."),
    Rule({"weights": "full", "merged": "on"}, "output.merged",
         "full fine-tuning leaves a whole model, there is no adapter to merge: remove merged."),
    *(Rule({"method": method, "dropout": "positive"}, "adapter.lora.dropout",
           f"{method} compares log-probabilities of two forward passes, which dropout makes differ: set it to 0.")
      for method in ("dpo", "ppo", "grpo")),
    Rule({"method": "reward", "dropout": "positive"}, "adapter.lora.dropout",
         "reward compares the scores of two forward passes, which dropout makes differ: set it to 0."),
    Rule({"method": "ppo", "strategy": "zero3"}, "compute.strategy",
         "ppo generates with whole weights, zero3 shards them: use ddp or zero2."),
    Rule({"weights": "lora", "optimizer": "adamw_bf16_sr"}, "training.optimizer",
         "adamw_bf16_sr is for full fine-tuning with bf16 weights: an adapter's weights are fp32, use adamw."),
    Rule({"optimizer": "adamw_bf16_sr", "precision": "fp32"}, "training.optimizer",
         "adamw_bf16_sr rounds bf16 weights: set training.precision to bf16, or use adamw."),
    *(Rule({"strategy": strategy, "optimizer": "adamw_bf16_sr"}, "training.optimizer",
           f"{strategy} keeps an fp32 master copy, so there is nothing to round: use adamw.")
      for strategy in ("zero2", "zero3")),
    *(Rule({"strategy": strategy, "optimizer": optimizer}, "training.optimizer",
           f"{optimizer} is not verified under DeepSpeed: use adamw, or strategy ddp.")
      for strategy in ("zero2", "zero3") for optimizer in ("adamw_8bit", "paged_adamw_8bit")),
    Rule({"method": "merge", "weights": "lora"}, "adapter",
         "merge takes its adapters from method.merge.adapters: remove adapter."),
    Rule({"method": "merge", "quantization": "nf4"}, "quantization",
         "merge reads from the adapter how its base was loaded: remove quantization."),
    Rule({"method": "merge", "merged": "on"}, "output.merged", "merge always leaves the merged model: remove merged."),
    *(Rule({"method": "merge", "strategy": strategy}, "compute.strategy",
           f"merge runs in one process: remove strategy {strategy}.") for strategy in ("ddp", "zero2", "zero3")),
    *(Rule({"method": "merge", "optimizer": optimizer}, "training.optimizer",
           f"merge trains nothing: remove optimizer {optimizer}.") for optimizer in OPTIMIZERS[1:]),
    *(Rule({"method": "merge", "precision": precision}, "training.precision",
           f"merge computes in fp32 and keeps the precision of the base's files: remove precision {precision}.")
      for precision in ("bf16", "fp32")),
    Rule({"method": "reward", "merged": "on"}, "output.merged",
         "a reward model's adapter is served beside its base, with the head that it carries: remove merged."),
)  # fmt: skip

UNSERVED: tuple[Rule, ...] = (
    *(Rule({"method": method, "strategy": strategy}, "compute.strategy",
           f"{method} under strategy {strategy} is not served by this version; ddp is.")
      for method, strategy in (("ppo", "zero2"), ("grpo", "zero2"), ("grpo", "zero3"))),
    Rule({"quantization": "nf4", "strategy": "zero3"}, "compute.strategy",
         "Splitting 4-bit weights (strategy zero3) is not served by this version; zero2 and ddp are."),
)  # fmt: skip


def choices(spec: JobSpec) -> dict[str, str]:
    """The value of each axis that a request stands on."""
    return {
        "method": spec.method.name,
        "weights": "lora" if spec.adapter else "full",
        "quantization": spec.quantization or "none",
        "strategy": spec.compute.strategy,
        "optimizer": spec.training.optimizer,
        "precision": spec.training.precision,
        "packing": "on" if spec.method.sft and spec.method.sft.packing else "off",
        "dropout": "positive" if spec.adapter and spec.adapter.lora.dropout > 0 else "zero",
        "merged": "on" if spec.output.merged else "off",
    }


def violations(spec: JobSpec) -> list[Violation]:
    """Every rule that a well-formed request breaks."""
    chosen = choices(spec)
    broken = [
        Violation(path=rule.path, value=_value(rule, chosen), message=rule.message)
        for rule in RULES
        if all(chosen[axis] == value for axis, value in rule.when.items())
    ]
    return [
        *broken,
        *word_violations(spec),
        *_training_rules(spec),
        *_merge_rules(spec),
        *_preference_rules(spec),
        *reward_violations(spec),
        *vocabulary_violations(spec),
        *_reporting_rules(spec),
        *_data_rules(spec),
        *_compute_rules(spec),
        *_scheduling_rules(spec),
        *hub_violations(spec),
        *_secret_rules(spec),
    ]


def refuse_unserved(spec: JobSpec) -> None:
    """Raise NotServed, with a sentence for each, when the request needs what this version does not run yet."""
    chosen = choices(spec)
    missing = [rule.message for rule in UNSERVED if all(chosen[axis] == value for axis, value in rule.when.items())]
    missing += [sentence for wanted, sentence in _unserved_fields(spec) if wanted]
    if missing:
        raise NotServed(" ".join(missing))


def _unserved_fields(spec: JobSpec) -> Iterator[tuple[bool, str]]:
    if spec.compute.strategy == "zero3" and (dpo := spec.method.dpo):
        yield dpo.precompute_reference, ("method.dpo.precompute_reference under strategy zero3 is not served by this "
                                         "version: remove it.")  # fmt: skip
    if spec.compute.strategy == "zero3":
        yield bool(spec.model.new_tokens), ("New tokens (model.new_tokens) under strategy zero3 are not served by this "
                                            "version; zero2 and ddp are.")  # fmt: skip


def _value(rule: Rule, chosen: Mapping[str, str]) -> str:
    axis = next(iter(rule.when))
    return chosen[axis]


def _training_rules(spec: JobSpec) -> Iterator[Violation]:
    training, evaluation = spec.training, spec.training.eval
    if training.epochs is not None and training.max_steps is not None:
        yield Violation(
            path="training.max_steps", value=training.max_steps, message="stands beside training.epochs: give one."
        )
    if training.warmup_ratio is not None and training.warmup_steps is not None:
        yield Violation(path="training.warmup_steps", value=training.warmup_steps,
                        message="stands beside training.warmup_ratio: give one.")  # fmt: skip
    if training.max_steps and training.warmup_steps and training.warmup_steps >= training.max_steps:
        yield Violation(path="training.warmup_steps", value=training.warmup_steps,
                        message=f"must be below max_steps ({training.max_steps}).")  # fmt: skip
    if evaluation.keep_best and evaluation.steps is None:
        yield Violation(
            path="training.eval.keep_best", value=True, message="needs training.eval.steps: how often to look."
        )
    if evaluation.early_stopping_patience and not (evaluation.steps and evaluation.keep_best):
        yield Violation(path="training.eval.early_stopping_patience", value=evaluation.early_stopping_patience,
                        message="needs training.eval.steps and training.eval.keep_best.")  # fmt: skip
    yield from _eval_set_rules(spec)


SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses of dpo that label_smoothing is a part of."""


def _preference_rules(spec: JobSpec) -> Iterator[Violation]:
    """What dpo and reward would ignore, or could not keep, is refused."""
    columns, samples = spec.dataset.columns if spec.dataset else None, spec.reporting.samples.prompts
    if columns and columns.margin is not None and not spec.method.reward:
        yield Violation(path="dataset.columns.margin", value=columns.margin,
                        message=f"{spec.method.name} knows no margins, reward does: remove it.")  # fmt: skip
    if spec.method.reward and samples:
        yield Violation(path="reporting.samples.prompts", value=samples,
                        message="a reward model answers no prompts: remove it.")  # fmt: skip
    if (dpo := spec.method.dpo) is None:
        return
    if not dpo.loss:
        yield Violation(path="method.dpo.loss", message="is empty: name a loss, or remove it.")
    if len(set(dpo.loss)) < len(dpo.loss):
        yield Violation(path="method.dpo.loss", value=list(dpo.loss), message="names a loss twice: name each once.")
    if dpo.label_smoothing and not set(dpo.loss) & set(SMOOTHED_LOSSES):
        yield Violation(path="method.dpo.label_smoothing", value=dpo.label_smoothing,
                        message=f"changes only {', '.join(SMOOTHED_LOSSES)}: use one of them under loss (robust is "
                        "sigmoid with flipped labels), or remove it.")  # fmt: skip
    if "exo_pair" in dpo.loss and not dpo.label_smoothing:
        yield Violation(path="method.dpo.label_smoothing", value=0.0,
                        message="exo_pair needs it above 0: its paper uses 0.001.")  # fmt: skip
    if spec.adapter and spec.adapter.lora.bias != "none" and not dpo.precompute_reference:
        yield Violation(path="adapter.lora.bias", value=spec.adapter.lora.bias,
                        message="trains biases of the base, so that switching the adapter off gives no reference: set "
                        "it to none, or method.dpo.precompute_reference to true.")  # fmt: skip


def _merge_rules(spec: JobSpec) -> Iterator[Violation]:
    """A merge trains nothing and runs on one machine's CPU; what it would ignore is refused."""
    if spec.method.merge is None:
        return
    ruled = {"optimizer", "precision"}
    for name, value in spec.training.model_dump(mode="json", exclude_defaults=True).items():
        if name not in ruled:
            yield Violation(path=f"training.{name}", value=value, message="merge trains nothing: remove it.")
    compute = spec.compute
    asked = {
        "compute.nodes": compute.nodes > 1,
        "compute.gpus_per_node": bool(compute.gpus_per_node),
        "compute.gpu": compute.gpu is not None,
        "compute.processes_per_node": (compute.processes_per_node or 1) > 1,
    }
    for path in (path for path, wanted in asked.items() if wanted):
        value = getattr(compute, path.partition(".")[2])
        yield Violation(path=path, value=value, message="merge runs in one process, on the CPU: remove it.")


def _eval_set_rules(spec: JobSpec) -> Iterator[Violation]:
    dataset, evaluation = spec.dataset, spec.training.eval
    if dataset is None or dataset.eval_source or dataset.eval_split or dataset.eval_fraction:
        return
    asked = {
        "training.eval.steps": evaluation.steps,
        "training.eval.at_start": evaluation.at_start,
        "training.eval.max_rows": evaluation.max_rows,
        "reporting.samples.prompts": spec.reporting.samples.prompts,
    }
    for path, value in asked.items():
        if value:
            yield Violation(path=path, value=value, message="needs an evaluation set: add dataset.eval_source, "
                            "dataset.eval_split or dataset.eval_fraction.")  # fmt: skip


def _reporting_rules(spec: JobSpec) -> Iterator[Violation]:
    samples = spec.reporting.samples
    if samples.steps and not samples.prompts:
        yield Violation(path="reporting.samples.steps", value=samples.steps,
                        message="answers nothing: say how many rows (reporting.samples.prompts).")  # fmt: skip


def _data_rules(spec: JobSpec) -> Iterator[Violation]:
    dataset, method = spec.dataset, spec.method.name
    if dataset is None and method != "merge":
        yield Violation(path="dataset", message=f"is required by {method}: the rows to learn from.")
    if dataset is not None and method == "merge":
        yield Violation(path="dataset", message="merge reads no data set: remove it.")
    for path, source in sources(spec):
        yield from _source_rules(path, source)
    if dataset is None:
        return
    yield from split_violations(dataset)
    if dataset.eval_fraction and (dataset.eval_split or dataset.eval_source):
        yield Violation(path="dataset.eval_fraction", value=dataset.eval_fraction,
                        message="stands beside eval_split or eval_source: give one.")  # fmt: skip
    if dataset.format != "auto" and dataset.format not in FORMATS[method]:
        fix = f"use {' or '.join(FORMATS[method])}."
        yield Violation(
            path="dataset.format", value=dataset.format, message=f"{dataset.format} does not fit {method}: {fix}"
        )


def _source_rules(path: str, source: str) -> Iterator[Violation]:
    scheme, _, rest = source.partition("://")
    if scheme == "file" and not rest.startswith("/"):
        yield Violation(path=path, value=source, message=f"{source!r} is not absolute: write file:///directory/….")
    if scheme == "job" and path.startswith("dataset"):
        yield Violation(path=path, value=source, message="a job leaves models and adapters, no data set: name a file.")
    elif scheme == "job" and not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(/(adapter|merged|model))?", rest):
        yield Violation(path=path, value=source, message=f"{source!r} is no output of a job: write job://<job>, or "
                        "job://<job>/ and adapter, merged or model.")  # fmt: skip
    if scheme == "hf" and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", rest):
        yield Violation(
            path=path, value=source, message=f"{source!r} is not a repository: write hf://organisation/name@revision."
        )


def _compute_rules(spec: JobSpec) -> Iterator[Violation]:
    compute, training = spec.compute, spec.training
    gpus, processes = compute.gpus_per_node, compute.processes_per_node
    if gpus and processes and gpus != processes:
        yield Violation(path="compute.processes_per_node", value=processes,
                        message=f"{processes} processes do not fit {gpus} GPUs: one process for each GPU.")  # fmt: skip
    if gpus == 0 and compute.gpu:
        yield Violation(
            path="compute.gpu", value=compute.gpu, message="stands beside gpus_per_node: 0; remove one of them."
        )
    if gpus == 0 and training.precision == "bf16":
        yield Violation(path="training.precision", value="bf16", message="bf16 is not used on CPUs: set auto or fp32.")
    micro, accumulation, whole = (
        training.micro_batch_size,
        training.gradient_accumulation_steps,
        training.global_batch_size,
    )
    world = compute.nodes * (gpus or processes or 1) if (gpus is not None or processes) else None
    if not whole:
        return
    parts = (micro or 1) * (accumulation or 1) * (world or 1)
    if micro and accumulation and world and parts != whole:
        yield Violation(path="training.global_batch_size", value=whole,
                        message=f"contradicts {micro} rows × {accumulation} accumulated × {world} processes = {parts}: "
                        "give two of the three.")  # fmt: skip
    elif whole % parts:
        yield Violation(path="training.global_batch_size", value=whole,
                        message=f"{whole} is no multiple of {parts} (micro_batch_size × gradient_accumulation_steps × "
                        "processes, as far as they are given).")  # fmt: skip


def _scheduling_rules(spec: JobSpec) -> Iterator[Violation]:
    scheduling = spec.scheduling
    if scheduling.priority and not scheduling.queue:
        message = "is a priority of a queue: name the queue (scheduling.queue), or remove it."
        yield Violation(path="scheduling.priority", value=scheduling.priority, message=message)


def _secret_rules(spec: JobSpec) -> Iterator[Violation]:
    """A request is stored, shown and put into annotations; the value is not repeated here either."""
    for path, kind in secrets(spec.to_mapping()):
        yield Violation(path=path, message=secret_message(kind))
