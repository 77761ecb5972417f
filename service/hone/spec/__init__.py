"""The request: everything that a caller may ask of Hone, in one place.

YAML files, gRPC messages and the trainer's run file carry this one shape. Defaults, units and field texts are written
here only; `hone spec`, the JSON Schema and docs/spec.md are generated from it (document.py), the proto is held against
it by a test. Unknown fields are refused. parse.py reads a request and tells every violation; combinations.py says which
values may stand together.
"""

from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from hone.spec.methods import Method
from hone.spec.part import Float, Int, Label, LabelName, Name, Part, Seconds, Source, Words, setting

SCHEMA_VERSION = 1
"""Raised when a field changes its meaning; a trainer refuses run files of a newer schema."""


class Model(Part):
    """The model that training starts from."""

    source: Source
    """`hf://org/name[@revision]`, `file:///directory`, `s3://bucket/prefix`, or an earlier job's output:
    `job://<job>[/adapter|/merged|/model]`."""
    tokenizer: Source | None = setting(None, origin="the model's own")
    """Another tokenizer than the model's own."""
    chat_template: str | None = setting(None, origin="the tokenizer's own")
    """A Jinja chat template; assistant turns stand between `{% generation %}` and `{% endgeneration %}`."""
    system_prompt: str | None = setting(None, origin="none")
    """A system message that is put before every conversation that has none."""
    eos_token: str | None = setting(None, origin="the tokenizer's own")
    """The token that ends a turn, where it is not the tokenizer's own end-of-sequence token."""
    new_tokens: Words = setting((), origin="none")
    """Tokens to add to the vocabulary. Beside an adapter only their rows of embedding and head are trained, and saved
    in it."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting("auto", origin="transformers")
    """The attention kernel; auto is sdpa, and eager for the families that have no other (gemma2)."""


class Columns(Part):
    """Names of the data set's columns, where they differ from ours."""

    messages: str = setting("messages", origin="TRL")
    """Column with the list of chat messages, each with `role` and `content`."""
    prompt: str = setting("prompt", origin="TRL")
    """Column with the prompt."""
    completion: str = setting("completion", origin="TRL")
    """Column with the completion that follows the prompt."""
    text: str = setting("text", origin="TRL")
    """Column with plain text."""
    chosen: str = setting("chosen", origin="TRL")
    """Column with the preferred answer."""
    rejected: str = setting("rejected", origin="TRL")
    """Column with the other answer."""
    margin: str | None = setting(None, origin="margin, where rows have one")
    """Column with the margin between the two answers (reward modelling)."""


class MixedDataset(Part):
    """Rows that are mixed with those of `dataset.source`; they have the same columns."""

    source: Source
    """As `dataset.source`."""
    split: str = setting("train", origin="datasets")
    """As `dataset.split`."""
    config: str | None = setting(None, origin="the data set's own")
    """Configuration (subset) of a Hub data set."""
    weight: Float = setting(1.0, origin="Hone: every row once", unit="times in one pass", gt=0, le=1000)
    """How often each row is seen in one pass over the data: 2 is twice, 0.1 is a tenth of the rows, chosen by the
    seed."""


class Dataset(Part):
    """The rows to learn from."""

    source: Source
    """`hf://org/name[@revision]`, `file:///file-or-directory` (jsonl, json, csv, parquet, arrow, txt; the last name may
    be a pattern such as `part-*.jsonl`), `s3://bucket/key`."""
    split: str = setting("train", origin="datasets")
    """Split to train on, with slices and sums: `train_sft[:5000]`, `train[:10%]+validation`."""
    config: str | None = setting(None, origin="the data set's own")
    """Configuration (subset) of a Hub data set."""
    weight: Float = setting(1.0, origin="Hone: every row once", unit="times in one pass", gt=0, le=1000)
    """How often each row of `source` is seen in one pass over the data, beside those of `mix`."""
    mix: tuple[MixedDataset, ...] = setting((), origin="none")
    """More sources, mixed with this one."""
    eval_source: Source | None = setting(None, origin="none")
    """Another source for evaluation; without it, `eval_split` or `eval_fraction` of this one."""
    eval_split: str | None = setting(None, origin="none")
    """Split to evaluate on."""
    eval_fraction: Float | None = setting(None, origin="none", unit="share of rows", gt=0, lt=1)
    """Share of the training rows held out for evaluation, chosen by the seed."""
    format: Literal["auto", "messages", "prompt_completion", "text", "preference", "prompt"] = setting(
        "auto", origin="Hone"
    )
    """What a row holds; auto decides by the columns that are there."""
    columns: Columns = setting(Columns(), origin="TRL")
    """Names of the columns."""


class Lora(Part):
    """Low-rank adaptation (Hu et al. 2021)."""

    rank: Int = setting(16, origin="Hone (usual: 8 to 64)", ge=1, le=4096)
    """Rank of the update."""
    alpha: Float = setting(32.0, origin="2 × the default rank", gt=0)
    """Scale of the update: alpha / rank, or alpha / √rank with use_rslora."""
    dropout: Float = setting(0.0, origin="Hone: dropout keeps a second copy of every input", ge=0, lt=1)
    """Dropout on the adapter's input."""
    bias: Literal["none", "all", "lora_only"] = setting("none", origin="PEFT LoraConfig")
    """Which biases are trained."""
    target_modules: Words = setting(("all-linear",), origin="Dettmers et al. 2023")
    """`all-linear` (without head and routers), `attention`, module names, or one regular expression after `re:`."""
    modules_to_save: Words = setting((), origin="none")
    """Modules that are trained in full beside the adapter, such as `lm_head`."""
    use_rslora: bool = setting(False, origin="PEFT LoraConfig")
    """Rank-stabilised scale (Kalajdzievski 2023)."""
    use_dora: bool = setting(False, origin="PEFT LoraConfig")
    """Weight-decomposed adaptation (Liu et al. 2024)."""


class Adapter(Part):
    """How the model is adapted; absent means full fine-tuning."""

    lora: Lora = setting(Lora(), origin="Hone")
    """Low-rank adaptation."""


class Eval(Part):
    """Evaluation during training; needs an evaluation set."""

    steps: Int | None = setting(None, origin="once at the end", unit="optimizer steps", ge=1)
    """Evaluate every so many steps; absent: at the end."""
    at_start: bool = setting(False, origin="transformers")
    """Evaluate before the first step too, so that the gain can be told."""
    max_rows: Int | None = setting(None, origin="all", unit="rows", ge=1)
    """Evaluate on the first so many rows only."""
    batch_size: Int | None = setting(None, origin="micro_batch_size", unit="rows", ge=1)
    """Rows in one forward pass on one device."""
    keep_best: bool = setting(False, origin="transformers")
    """End with the weights of the lowest evaluation loss; needs eval.steps."""
    early_stopping_patience: Int | None = setting(None, origin="never", unit="evaluations", ge=1)
    """Stop after so many evaluations without a lower loss; needs eval.steps and keep_best."""


class Checkpoint(Part):
    """Checkpoints during training."""

    steps: Int | None = setting(None, origin="none in between", unit="optimizer steps", ge=1)
    """Write one every so many steps."""
    keep: Int = setting(2, origin="Hone", unit="checkpoints", ge=1)
    """How many are kept."""


class Training(Part):
    """The optimisation."""

    epochs: Float | None = setting(None, origin="1, unless max_steps is set", unit="passes", gt=0, le=10_000)
    """Passes over the training rows; not together with max_steps."""
    max_steps: Int | None = setting(None, origin="from epochs", unit="optimizer steps", ge=1)
    """Optimizer steps in all; not together with epochs."""
    learning_rate: Float | None = setting(
        None, origin="2e-4 with an adapter (Dettmers et al. 2023), 2e-5 full, 5e-5 dpo, 1e-5 ppo, 1e-6 grpo", gt=0, le=1
    )
    """Peak learning rate."""
    scheduler: str = setting("cosine", origin="Hone")
    """transformers' names: cosine, linear, constant, constant_with_warmup, polynomial, inverse_sqrt, …"""
    warmup_ratio: Float | None = setting(
        None, origin="0.03, unless warmup_steps is set", unit="share of steps", ge=0, lt=1
    )
    """Share of the steps in which the learning rate rises; not together with warmup_steps."""
    warmup_steps: Int | None = setting(None, origin="from warmup_ratio", unit="optimizer steps", ge=0)
    """Steps in which the learning rate rises; not together with warmup_ratio."""
    optimizer: str = setting("adamw", origin="Loshchilov & Hutter 2019")
    """adamw, adamw_8bit, paged_adamw_8bit, adamw_bf16_sr (bf16 weights with stochastic rounding)."""
    weight_decay: Float = setting(0.0, origin="transformers", ge=0, le=1)
    """Decoupled weight decay."""
    adam_beta1: Float = setting(0.9, origin="Kingma & Ba 2015", ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: Float = setting(0.999, origin="Kingma & Ba 2015", ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: Float = setting(1e-8, origin="Kingma & Ba 2015", gt=0)
    """Added to the denominator."""
    max_grad_norm: Float = setting(1.0, origin="transformers", ge=0)
    """Gradients are clipped to this norm; 0 is off."""
    micro_batch_size: Int | None = setting(None, origin="planned", unit="rows", ge=1)
    """Rows in one forward pass on one device."""
    gradient_accumulation_steps: Int | None = setting(None, origin="planned", ge=1)
    """Forward passes before one optimizer step."""
    global_batch_size: Int | None = setting(None, origin="16", unit="rows", ge=1)
    """Rows in one optimizer step over all devices = micro_batch_size × gradient_accumulation_steps × processes."""
    activation_checkpointing: bool | None = setting(None, origin="planned: on where memory asks for it")
    """Recompute activations in the backward pass: less memory, about a third more time."""
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", origin="bf16 where the hardware has it, else fp32")
    """Precision of the computation; what is trained stays fp32."""
    seed: Int = setting(42, origin="transformers", ge=0, le=2**31 - 1)
    """Seed of initialisation, order and sampling."""
    eval: Eval = setting(Eval(), origin="Hone")
    """Evaluation."""
    checkpoint: Checkpoint = setting(Checkpoint(), origin="Hone")
    """Checkpoints."""


class Compute(Part):
    """The hardware."""

    nodes: Int = setting(1, origin="Hone", ge=1, le=1024)
    """Machines."""
    gpus_per_node: Int | None = setting(None, origin="planned", ge=0, le=16)
    """GPUs of each machine; 0 trains on its CPU."""
    processes_per_node: Int | None = setting(None, origin="one for each GPU; 1 without", ge=1, le=256)
    """Training processes of each machine."""
    gpu: str | None = setting(None, origin="planned")
    """Name of a GPU profile of the platform, such as `H100-80GB`."""
    strategy: Literal["auto", "ddp", "zero2", "zero3", "fsdp"] = setting("auto", origin="planned")
    """How the work is spread over processes."""


class Scheduling(Part):
    """When and how often it may run."""

    queue: LabelName | None = setting(None, origin="none")
    """Queue of the cluster (Kueue LocalQueue)."""
    priority: LabelName | None = setting(None, origin="none")
    """Priority class of the queue."""
    deadline: Seconds | None = setting(None, origin="none", unit="seconds", ge=60)
    """Longest run time of one attempt; `90m`, `4h` and `2d` are understood."""
    max_attempts: Int = setting(3, origin="Hone", ge=1, le=20)
    """Attempts that may fail for the machine's reasons; pre-emption does not count."""


class Samples(Part):
    """Answers of the model to rows of the evaluation set, before and after training, and in between where asked."""

    prompts: Int = setting(0, origin="none", unit="rows", ge=0, le=64)
    """How many rows are answered, counted from the first."""
    max_new_tokens: Int = setting(64, origin="Hone", unit="tokens", ge=1, le=4096)
    """Longest answer; the likeliest token is taken at each step."""
    steps: Int | None = setting(None, origin="before and after training only", unit="optimizer steps", ge=1)
    """Also answer them every so many steps; `hone watch --samples` shows them as they come."""


class Reporting(Part):
    """What is told while it runs."""

    logging_steps: Int = setting(1, origin="Hone", unit="optimizer steps", ge=1)
    """Report loss, learning rate, gradient norm and speed every so many steps."""
    samples: Samples = setting(Samples(), origin="Hone")
    """Sample answers."""
    trackers: Words = setting((), origin="none")
    """tensorboard, mlflow, wandb: hand all figures on, to the server that MLFLOW_TRACKING_URI or WANDB_API_KEY name,
    else to files beside the outputs."""


class Hub(Part):
    """A push to the Hugging Face Hub, after the outputs are safe in the store; one that fails does not fail the job."""

    repo: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    """`organisation/name`."""
    private: bool = setting(True, origin="Hone: publishing is a choice")
    """Whether only the organisation sees it."""
    what: Literal["adapter", "merged", "model"] | None = setting(None, origin="merged, else what the run leaves")
    """Which output is pushed."""
    branch: str | None = setting(None, origin="main")
    """Branch to push to; it is made from main where it is not there."""


class Output(Part):
    """What is left behind. An adapter (or, without one, the model) always is."""

    merged: bool = setting(False, origin="Hone")
    """Also leave the adapter merged into its base."""
    hub: Hub | None = setting(None, origin="none")
    """Push to the Hub."""


class JobSpec(Part):
    """One training request."""

    name: Name
    """What people call it: lower-case letters, digits and hyphens. The job's id is this and five characters more."""
    labels: dict[LabelName, Label] = setting({}, origin="none")
    """Labels for filtering and cost accounts."""
    model: Model
    """The model that training starts from."""
    dataset: Dataset | None = setting(None, origin="required by every method but merge")
    """The rows to learn from."""
    method: Method
    """What to do."""
    adapter: Adapter | None = setting(None, origin="full fine-tuning")
    """How the model is adapted."""
    quantization: Literal["nf4"] | None = setting(None, origin="none")
    """Load the base in 4 bits (NF4, double quantisation); with an adapter this is QLoRA."""
    training: Training = setting(Training(), origin="Hone")
    """The optimisation."""
    compute: Compute = setting(Compute(), origin="Hone")
    """The hardware."""
    scheduling: Scheduling = setting(Scheduling(), origin="Hone")
    """When and how often it may run."""
    reporting: Reporting = setting(Reporting(), origin="Hone")
    """What is told while it runs."""
    output: Output = setting(Output(), origin="Hone")
    """What is left behind."""

    def to_mapping(self) -> dict[str, Any]:
        """The request as people would write it: absent fields and defaults left out, tuples as lists."""
        return self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
