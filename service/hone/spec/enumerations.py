"""Open enumerations: words on the wire, so that YAML and proto say the same. Called by combinations.py."""

import re
from collections.abc import Iterator

from hone.errors import Violation
from hone.spec import JobSpec

SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
)
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adamw_bf16_sr")
STRATEGIES = ("auto", "ddp", "zero2", "zero3", "fsdp")
DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
GRPO_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo")
TRACKERS = ("tensorboard", "mlflow", "wandb")


def word_violations(spec: JobSpec) -> Iterator[Violation]:
    """Words that are not known, and module targets that name nothing."""
    training = spec.training
    words = [
        ("training.scheduler", training.scheduler, SCHEDULERS),
        ("training.optimizer", training.optimizer, OPTIMIZERS),
        *(("reporting.trackers", tracker, TRACKERS) for tracker in spec.reporting.trackers),
        *(("method.dpo.loss", loss, DPO_LOSSES) for loss in (spec.method.dpo.loss if spec.method.dpo else ())),
    ]
    if spec.method.grpo:
        words.append(("method.grpo.loss", spec.method.grpo.loss, GRPO_LOSSES))
    for path, word, known in words:
        if word not in known:
            yield Violation(path=path, value=word, message=f"{word!r} is not one of {', '.join(known)}.")
    if spec.adapter:
        yield from _target_rules(spec.adapter.lora.target_modules)


def _target_rules(targets: tuple[str, ...]) -> Iterator[Violation]:
    path = "adapter.lora.target_modules"
    if not targets:
        yield Violation(path=path, message="is empty: name modules, or all-linear, or remove it.")
    if "lm_head" in targets:
        yield Violation(path=path, value="lm_head", message="lm_head is trained in full, not adapted: put it under "
                        "adapter.lora.modules_to_save.")  # fmt: skip
    if len(targets) > 1 and (
        special := [t for t in targets if t in ("all-linear", "attention") or t.startswith("re:")]
    ):
        yield Violation(path=path, value=special[0], message=f"{special[0]} stands alone: remove the other names.")
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                yield Violation(path=path, value=target, message=f"{target!r} is not a regular expression: {error}.")
