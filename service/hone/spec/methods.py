"""The six methods of training, and the signals that PPO and GRPO learn from."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from hone.spec.part import Float, Int, Part, Seconds, Source, Words, exactly_one, setting

METHODS = ("sft", "dpo", "reward", "ppo", "grpo", "merge")


class Sft(Part):
    """Supervised fine-tuning."""

    max_length: Int = setting(1024, origin="TRL SFTConfig", unit="tokens", ge=8, le=1_048_576)
    """Longest sequence; longer rows are cut at the end, and counted."""
    packing: bool = setting(False, origin="TRL SFTConfig")
    """Put several rows into one sequence of max_length, without one attending to another."""
    packing_strategy: Literal["bfd", "bfd_split"] = setting("bfd", origin="TRL SFTConfig")
    """`bfd`: best-fit decreasing, rows stay whole; `bfd_split`: longer rows are split instead of cut."""
    loss_on: Literal["auto", "response", "all"] = setting("auto", origin="Hone")
    """Tokens that are learned: auto is the response for chat and prompt/completion rows, all tokens for plain text."""


class Dpo(Part):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: Float = setting(0.1, origin="Rafailov et al. 2023", gt=0)
    """Strength of the pull to the reference model."""
    loss: Words = setting(("sigmoid",), origin="TRL DPOConfig")
    """TRL's loss names: sigmoid, ipo, hinge, robust, exo_pair, nca_pair, …"""
    label_smoothing: Float = setting(0.0, origin="TRL DPOConfig", ge=0, lt=0.5)
    """Probability that a preference is flipped."""
    max_length: Int = setting(1024, origin="TRL DPOConfig", unit="tokens", ge=8, le=1_048_576)
    """Longest prompt and answer together."""
    precompute_reference: bool = setting(False, origin="TRL DPOConfig")
    """Compute the reference's log-probabilities once, before training."""


class Reward(Part):
    """Reward modelling: sequence classification with one label (Bradley-Terry)."""

    max_length: Int = setting(1024, origin="TRL RewardConfig", unit="tokens", ge=8, le=1_048_576)
    """Longest prompt and answer together; longer pairs are left out, and counted."""
    center_rewards_coefficient: Float | None = setting(None, origin="Eisenstein et al. 2023", gt=0)
    """Coefficient that pulls the mean reward to zero."""


class RewardModelPart(Part):
    """A trained reward model."""

    source: Source
    """`job://<job>`, `s3://…`, `file://…` or `hf://…`."""
    max_length: Int = setting(1024, origin="TRL RewardConfig", unit="tokens", ge=8)
    """Longest prompt and answer together."""


class AnswerPart(Part):
    """1 where the answer equals a column's, else 0."""

    column: str
    """Column with the right answer."""
    numeric: bool = setting(False, origin="Hone")
    """Compare the last number of the answer instead of its text."""
    tolerance: Float = setting(0.0, origin="Hone", ge=0)
    """Largest difference that still counts as equal (numeric)."""


class RegexPart(Part):
    """1 where the answer matches, else 0."""

    pattern: str
    """Regular expression, searched in the answer."""


class JsonSchemaPart(Part):
    """1 where the answer is JSON that the schema accepts, else 0."""

    schema_text: str
    """The JSON Schema, as text."""


class LengthPart(Part):
    """0 up to a length, falling to −1 at twice that length."""

    max_tokens: Int = setting(128, origin="Hone", unit="tokens", ge=1)
    """Length up to which nothing is taken off."""


class HttpPart(Part):
    """Scores from an HTTP service: prompts, answers and columns in, one number an answer out."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^@\s]+$")]
    """Address of the scorer; no user-info in it."""
    timeout: Seconds = setting(60, origin="Hone", unit="seconds", ge=1)
    """Longest wait for one batch."""
    max_batch: Int = setting(64, origin="Hone", unit="answers", ge=1)
    """Most answers in one call."""


class PythonPart(Part):
    """A function of the user's own, where the platform allows it."""

    file: Source
    """`file:///….py` or `s3://….py` that holds the function; one file, which may import what the trainer has."""
    function: str = setting("reward", origin="Hone")
    """Its name. It takes lists by name: prompts, completions and any column; it returns one number an answer."""


class RewardPart(Part):
    """One signal: exactly one of its kinds, with a weight."""

    model: RewardModelPart | None = None
    """Score of a reward model."""
    answer: AnswerPart | None = None
    """Exact or numeric answer."""
    regex: RegexPart | None = None
    """Regular expression."""
    json_schema: JsonSchemaPart | None = None
    """JSON Schema."""
    length: LengthPart | None = None
    """Length penalty."""
    http: HttpPart | None = None
    """HTTP scorer."""
    python: PythonPart | None = None
    """User's function."""
    weight: Float = setting(1.0, origin="Hone")
    """Factor of this signal in the sum; 0: it is measured and told, and nothing is learned from it."""
    on_error: Literal["fail", "zero"] = setting("fail", origin="Hone")
    """When a signal has no score for some answers: `fail` ends the run, `zero` counts 0 for them and goes on."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        return exactly_one(self, ("model", "answer", "regex", "json_schema", "length", "http", "python"))


Rewards = Annotated[tuple[RewardPart, ...], Field(min_length=1)]


class Ppo(Part):
    """Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019).

    A step of training.max_steps, eval.steps, checkpoint.steps and logging_steps is one batch of answers.
    """

    rewards: Rewards
    """The signals; their weighted sum is the reward."""
    ppo_epochs: Int = setting(4, origin="Ziegler et al. 2019", ge=1)
    """Passes over each batch of answers."""
    batch_size: Int = setting(16, origin="TRL tutorial", unit="answers", ge=1)
    """Answers collected before each update, over all ranks."""
    mini_batch_size: Int = setting(4, origin="TRL tutorial", unit="answers", ge=1)
    """Answers in one optimizer step, over all ranks: micro_batch_size × gradient_accumulation_steps × ranks."""
    init_kl_coef: Float = setting(0.2, origin="Ziegler et al. 2019", ge=0)
    """Coefficient of the KL penalty at the start."""
    kl_target: Float | None = setting(None, origin="fixed coefficient", unit="nats", gt=0)
    """KL that an adaptive controller steers to; absent: the coefficient stays."""
    max_kl: Float | None = setting(None, origin="no bound", unit="nats", gt=0)
    """Training stops when the answers of a step are further than this from the reference."""
    gamma: Float = setting(1.0, origin="Ziegler et al. 2019", gt=0, le=1)
    """Discount."""
    gae_lambda: Float = setting(0.95, origin="Schulman et al. 2016", ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    cliprange: Float = setting(0.2, origin="Schulman et al. 2017", gt=0, lt=1)
    """Clip range of the policy ratio."""
    cliprange_value: Float = setting(0.2, origin="Ziegler et al. 2019", gt=0)
    """Clip range of the value function."""
    vf_coef: Float = setting(0.1, origin="Ziegler et al. 2019", ge=0)
    """Weight of the value loss."""
    missing_eos_penalty: Float = setting(1.0, origin="TRL PPOConfig", ge=0)
    """Taken off the score of an answer that does not end by itself."""
    max_prompt_length: Int = setting(512, origin="TRL", unit="tokens", ge=1)
    """Longest prompt; longer rows are left out, and counted."""
    max_new_tokens: Int = setting(128, origin="TRL tutorial", unit="tokens", ge=1)
    """Longest answer."""
    temperature: Float = setting(1.0, origin="Ziegler et al. 2019", gt=0)
    """Sampling temperature."""


class Grpo(Part):
    """Group relative policy optimisation (Shao et al. 2024); training.global_batch_size counts answers."""

    rewards: Rewards
    """The signals; their weighted sum is the reward."""
    num_generations: Int = setting(8, origin="TRL GRPOConfig", unit="answers", ge=2)
    """Answers to each prompt."""
    num_iterations: Int = setting(1, origin="TRL GRPOConfig", ge=1)
    """Passes over each batch of answers."""
    beta: Float = setting(0.0, origin="TRL GRPOConfig", ge=0)
    """Coefficient of the KL penalty."""
    epsilon: Float = setting(0.2, origin="TRL GRPOConfig", gt=0, lt=1)
    """Clip range of the policy ratio."""
    loss: str = setting("dapo", origin="TRL GRPOConfig")
    """TRL's loss names: grpo, dapo, dr_grpo, bnpo, …"""
    max_kl: Float | None = setting(None, origin="no bound", unit="nats a token", gt=0)
    """Training stops when the answers of a step are further than this from the reference; needs beta."""
    max_prompt_length: Int = setting(512, origin="TRL", unit="tokens", ge=1)
    """Longest prompt; longer rows are left out, and counted."""
    max_new_tokens: Int = setting(256, origin="TRL GRPOConfig", unit="tokens", ge=1)
    """Longest answer."""
    temperature: Float = setting(1.0, origin="TRL GRPOConfig", gt=0)
    """Sampling temperature."""
    top_p: Float = setting(1.0, origin="TRL GRPOConfig", gt=0, le=1)
    """Nucleus sampling."""
    top_k: Int = setting(0, origin="TRL GRPOConfig (off)", ge=0)
    """Sample among the k likeliest tokens; 0 is off."""


class MergeAdapter(Part):
    """One adapter that is merged."""

    source: Source
    """`job://<job>/adapter`, `s3://…`, `file://…` or `hf://…`."""
    weight: Float = setting(1.0, origin="PEFT")
    """Factor of this adapter."""


class Merge(Part):
    """Merge adapters into their base."""

    adapters: Annotated[tuple[MergeAdapter, ...], Field(min_length=1)]
    """The adapters."""
    combination: Literal["cat", "linear"] = setting("cat", origin="exact (PEFT add_weighted_adapter)")
    """How several are combined: `cat` is exact; `linear` has cross terms and needs equal ranks."""
    max_kl: Float = setting(0.01, origin="Hone", unit="nats", gt=0)
    """Merging is refused when its KL against the adapted model is larger."""


class Method(Part):
    """What to do: exactly one of these."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    sft: Sft | None = None
    """Supervised fine-tuning."""
    dpo: Dpo | None = None
    """Direct preference optimisation."""
    reward: Reward | None = None
    """Reward modelling."""
    ppo: Ppo | None = None
    """Proximal policy optimisation."""
    grpo: Grpo | None = None
    """Group relative policy optimisation."""
    merge: Merge | None = None
    """Merge adapters into their base."""

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        return exactly_one(self, METHODS)

    @property
    def name(self) -> str:
        """The one that was asked for: `sft`, `dpo`, …"""
        return next(name for name in METHODS if getattr(self, name) is not None)

    @property
    def rewarded(self) -> Ppo | Grpo | None:
        """What was asked for, where answers are drawn and learned from by their rewards."""
        return self.ppo or self.grpo
